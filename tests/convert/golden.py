"""Golden values: a config, weights, inputs, and what the reference computes from them."""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import vmoe
from vmoe.convert import from_reference, to_reference

GOLDEN = Path(__file__).parents[1] / "golden"


def load(name: str, folder: Path = GOLDEN) -> tuple[dict, dict[str, np.ndarray]]:
    """The config and the arrays of a case."""
    with np.load(folder / f"{name}.npz") as file:
        return json.loads((folder / f"{name}.json").read_text()), {key: file[key] for key in file}


def part(figures: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """The arrays under a prefix, without it."""
    return {key.removeprefix(prefix): value for key, value in figures.items() if key.startswith(prefix)}


def close(ours: torch.Tensor, theirs: np.ndarray, what: str) -> None:
    """1e-5, absolute or relative: outputs and losses."""
    torch.testing.assert_close(
        ours.detach(), torch.as_tensor(theirs, dtype=ours.dtype), atol=1e-5, rtol=1e-5, msg=lambda m: f"{what}: {m}"
    )


def gradients_close(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    """1e-4 of each array's largest entry; 1e-7 where the reference's own gradient is rounding noise around zero."""
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        difference = np.abs(ours[name] - gradient).max()
        assert difference <= max(1e-4 * np.abs(gradient).max(), 1e-7), (name, difference, np.abs(gradient).max())


def gradients(model: nn.Module, loss_of: Callable[[nn.Module], torch.Tensor]) -> dict[str, np.ndarray]:
    """Those of all weights, by the reference's names; zero where the loss has no path. Key biases in float64.

    A bias of the keys moves all scores of a query alike, so without a norm on keys its gradient is exactly zero, and in
    float32 the rounding noise of a machine.
    """
    found = {}
    for copied in (copy.deepcopy(model), copy.deepcopy(model).double()):
        loss_of(copied).backward()
        parameters = dict(copied.named_parameters())
        grads = {key: torch.zeros_like(each) if each.grad is None else each.grad for key, each in parameters.items()}
        own = to_reference(model, grads)
        found |= {key: grad for key, grad in own.items() if not found or key.endswith("key/bias")}
    return found


def check_vision(name: str, folder: Path = GOLDEN) -> None:
    """Logits, auxiliary losses per layer, and the gradients of the images and of all weights."""
    config, figures = load(name, folder)
    model = from_reference(config, part(figures, "params/"))
    images = torch.tensor(figures["images_nhwc"]).permute(0, 3, 1, 2).requires_grad_()

    def run(model: nn.Module, images: torch.Tensor) -> tuple:
        with vmoe.record_routing(model) as record:
            logits = model(images)
            return logits, logits.square().mean() + record.auxiliary_loss(), record

    logits, loss, record = run(model, images)
    loss.backward()
    close(logits, figures["logits"], "logits")
    close(loss, figures["loss"], "loss")
    checked = 0
    for layer, routing in record.layers.items():
        theirs = part(figures, f"metrics/encoderblock_{layer.split('.')[1]}/")
        for metric in theirs.keys() & routing.metrics.keys():
            close(routing.metrics[metric], theirs[metric].mean(), f"{layer} {metric}")  # one figure per group
            checked += 1
    assert checked >= len(record.layers)
    images_grad = images.grad.permute(0, 2, 3, 1).numpy()
    gradients_close({"images": images_grad}, {"images": figures["grad_images_nhwc"]})
    plain = images.detach()
    own = gradients(from_reference(config, part(figures, "params/")), lambda m: run(m, plain.to(type_of(m)))[1])
    gradients_close(own, part(figures, "grads/"))


def type_of(model: nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype


def check_ensemble(name: str) -> None:
    """What `check_vision` compares, for an ensemble, with its losses and predictions; in float64.

    The weights of these cases are so large that float32 cannot resolve them. Run again from the same weights and
    images, the reference's own logits are up to 1.2e-3 (1.3e-3 under jit) off these; ours are up to 8.6e-4 off them in
    float32 and 1.2e-4 in float64. So what depends on the logits is compared in float64, to 5e-4 of the largest entry.
    """
    config, figures = load(name)
    model, M = from_reference(config, part(figures, "params/")).double(), config["encoder"]["moe"]["ensemble_size"]
    images = torch.tensor(figures["images_nhwc"]).permute(0, 3, 1, 2).double().requires_grad_()
    with vmoe.record_routing(model) as record:
        logits = model.member_logits(images)
        loss = logits.square().mean() + record.auxiliary_loss()
    loss.backward()
    close(loss, figures["loss"], "loss")
    for layer, routing in record.layers.items():
        theirs = part(figures, f"metrics/encoderblock_{layer.split('.')[1]}/")
        assert len(theirs) == 3
        for metric in theirs:  # one figure per group and member
            close(routing.metrics[metric], theirs[metric].mean(), f"{layer} {metric}")
    labels, log_probabilities = torch.tensor(figures["labels"]).argmax(1), model(images)
    found = {
        "logits": logits,
        "ensemble_log_probabilities": log_probabilities,
        "softmax_xent_train": F.cross_entropy(logits, labels.repeat_interleave(M), reduction="none"),
        "softmax_xent_eval": F.nll_loss(log_probabilities, labels, reduction="none"),
    }
    found = {key: ours.detach().numpy() for key, ours in found.items()}
    found |= {"grad_images_nhwc": images.grad.permute(0, 2, 3, 1).numpy()}
    own = to_reference(model, {key: parameter.grad for key, parameter in model.named_parameters()})
    gradients = part(figures, "grads/")
    assert own.keys() == gradients.keys()
    found |= {f"grads/{key}": own[key] for key in gradients if not key.endswith("key/bias")}  # which are zero
    for key, ours in found.items():
        difference, largest = np.abs(ours - figures[key]).max(), np.abs(figures[key]).max()
        assert difference <= 5e-4 * largest, (key, difference, largest)


def check_two_tower(name: str, folder: Path = GOLDEN) -> None:
    """Embeddings, logits, the sigmoid loss and its gradients."""
    config, figures = load(name, folder)
    model = from_reference(config, part(figures, "params/"))
    images, texts = torch.tensor(figures["images_nhwc"]).permute(0, 3, 1, 2), torch.tensor(figures["texts"])

    def run(model: nn.Module) -> tuple:
        outputs = model(images.to(type_of(model)), texts)
        outputs = dict(zip(("image", "text", "scale", "bias"), outputs, strict=False))
        logits = outputs["scale"] * outputs["image"] @ outputs["text"].T + outputs.get("bias", 0.0)
        sign = 2 * torch.eye(len(logits)) - 1
        return outputs, logits, -F.logsigmoid(sign * logits).sum(1).mean()

    outputs, logits, loss = run(model)
    close(outputs["image"], figures["zimg"], "zimg")
    close(outputs["text"], figures["ztxt"], "ztxt")
    close(logits, figures["logits"], "logits")
    close(loss, figures["sigmoid_loss"], "sigmoid loss")
    gradients_close(gradients(model, lambda m: run(m)[2]), part(figures, "grads/"))
