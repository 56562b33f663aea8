"""A whole training step: forward, the routing's losses, backward, clipping, fused AdamW. V-MoE and LIMoE.

The V-MoE and its dense baseline are those of `benchmarks.model`, with the capacity of training; LIMoE is the tiny one
of `configs/limoe_tiny_emoji.yaml`, against itself with num_experts=0. As in training, weights are float32 and bfloat16
means autocast.

Shapes, by suffix: B batch, L text tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss
from torch import Tensor, nn

import vmoe
from benchmarks.measure import activation_bytes, spread
from benchmarks.model import vision_models
from benchmarks.session import Session, make_parser
from vmoe.evaluation.inference import arithmetic
from vmoe.models.factory import create_model
from vmoe.training.config import OptimConfig
from vmoe.training.optim import create_optimizer

PRECISIONS = {"float32": "float32", "bfloat16": "bf16"}
FUSED_ADAMW = OptimConfig(name="adamw", lr=1e-5, kwargs={"fused": True})


@dataclass
class Trained:
    """A model in training."""

    model: nn.Module  # float32
    loss: Callable[[Any, Any], Tensor]  # (what is called, input) -> the task's loss
    called: Any  # the model, or its compiled form

    def __post_init__(self) -> None:
        self.optimizer = create_optimizer(self.model, FUSED_ADAMW)

    def total(self, value: Any, precision: str, device: torch.device) -> tuple[Tensor, Any]:
        """(loss with the routing's own, the record)."""
        with vmoe.record_routing(self.model) as record, arithmetic(precision, device):
            loss = self.loss(self.called, value)
        return loss + record.auxiliary_loss().to(device), record

    def step(self, precision: str, device: torch.device, value: Any) -> None:
        """What the training loop does with a batch."""
        loss, _ = self.total(value, precision, device)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        loss.item()


def _classify(model: Any, value: tuple[Tensor, Tensor]) -> Tensor:
    images, labels_B = value
    return F.cross_entropy(model(images).float(), labels_B)


def _contrast(model: Any, value: tuple[Tensor, Tensor]) -> Tensor:
    image_features, text_features, scale = model(*value)
    with torch.autocast(image_features.device.type, enabled=False):
        return ClipLoss()(image_features.float(), text_features.float(), scale.float())


def vision(args, device: torch.device) -> tuple[dict[str, nn.Module], Callable, Callable]:
    """(models, loss, number of the round -> input) of the V-MoE and its dense baseline."""
    sizes = {} if args.depth is None else {"depth": args.depth}
    models = vision_models(["capacity 1.05"], args.image_size, **sizes)

    def make_input(number: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator(device).manual_seed(60_000 + number)
        shape = (args.batch, 3, args.image_size, args.image_size)
        images = torch.randn(shape, generator=generator, device=device)
        return images, torch.randint(1000, (args.batch,), generator=generator, device=device)

    return {"dense": models["dense"], "sparse": models["capacity 1.05"]}, _classify, make_input


def limoe(args, device: torch.device) -> tuple[dict[str, nn.Module], Callable, Callable]:
    """The same of the tiny LIMoE; captions have 4 to 12 tokens, as the emoji's names do with their ends."""
    name = "limoe_tiny_patch12_48"
    models = {
        "dense": create_model(name, num_experts=0),
        "sparse": create_model(name, capacity_factor=1.25),
    }
    length, end = models["dense"].context_length, models["dense"].eot_token_id

    def make_input(number: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator(device).manual_seed(70_000 + number)
        images = torch.randn(args.pairs, 3, 48, 48, generator=generator, device=device)
        tokens_BL = torch.randint(1, end - 1, (args.pairs, length), generator=generator, device=device)
        last_B = torch.randint(3, 12, (args.pairs,), generator=generator, device=device)
        return images, tokens_BL.scatter(1, last_B[:, None], end)

    return models, _contrast, make_input


MODELS = {"vmoe_small": vision, "limoe_tiny": limoe}


def measure(session: Session, name: str, dtype: str) -> None:
    """Steps of a sparse model and its dense baseline, in turn."""
    args, device = session.args, session.device
    models, loss, make_input = MODELS[name](args, device)
    trained = {}
    for kind, model in models.items():
        model.to(device).train()
        called = torch.compile(model, mode=args.compile) if args.compile else model
        trained[kind] = Trained(model, loss, called)
    precision = PRECISIONS[dtype]
    memory, kept = {}, {}
    for kind, one in trained.items():
        one.model.zero_grad(set_to_none=True)
        value = make_input(10_000)
        memory[kind] = activation_bytes(lambda: one.total(value, precision, device)[0], [one.model], device)  # noqa: B023
        with torch.no_grad():
            _, record = one.total(value, precision, device)
        shares = [call.metrics["share_dropped"].item() for _, call in record.calls]
        kept[kind] = 1 - sum(shares) / len(shares) if shares else 1.0
    # LIMoE's steps are short: more of them.
    rounds = args.rounds * (4 if name == "limoe_tiny" else 1)
    calls = {kind: partial(one.step, precision, device) for kind, one in trained.items()}
    seconds = session.alternate(calls, make_input, rounds=rounds)
    batch = args.pairs if name == "limoe_tiny" else args.batch
    rows = {
        kind: {
            **{"comparison": name, "dtype": dtype, "pass": "step", "batch": batch, "kept": round(kept[kind], 4)},
            "images_per_second": spread([batch / value for value in own]),
            "activations_mib": round(memory[kind] / 2**20, 1),
            "activations_ratio": round(memory[kind] / memory["dense"], 4),
        }
        for kind, own in seconds.items()
    }
    session.add_times(seconds, "dense", rows.__getitem__)


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser("train_step", __doc__.splitlines()[0], rounds=5)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS), help="which (both)")
    parser.add_argument("--batch", type=int, default=32, help="images of the V-MoE (%(default)s)")
    parser.add_argument("--pairs", type=int, default=256, help="images with captions of the LIMoE (%(default)s)")
    parser.add_argument("--image_size", type=int, default=224, help="of the V-MoE, side in pixels (%(default)s)")
    parser.add_argument("--depth", type=int, help="blocks of the V-MoE, in place of 12")

    def measure_all(session: Session, dtype: str, _rates: dict) -> None:
        for name in session.args.models:
            measure(session, name, dtype)

    Session("train_step", parser, argv).run(measure_all)


if __name__ == "__main__":
    main()
