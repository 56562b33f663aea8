"""Gradients of whole models, recomputed ones, and second derivatives, which fused attention on a CPU does not have."""

import pytest
import timm
import torch
from torch.func import functional_call, grad, jvp, vmap

import vmoe
from vmoe.models.factory import save_pretrained
from vmoe.moe import use_backend

MODELS = ["vmoe_tiny_patch8_48", "limoe_tiny_patch12_48", "two_tower_tiny_patch12_48"]
TINY = {"depth": 2, "num_heads": 2, "num_experts": 4, "num_selected_experts": 2, "noise_std": 0.0, "load_loss": 0.0}
TEXT = {"width": 32, "vocab_size": 128, "eot_token_id": 127}


def make(name, **settings):
    torch.manual_seed(1)
    image, text = {**TINY, "img_size": 24, "embed_dim": 32, **settings}, {**TINY, **TEXT, **settings}
    if name.startswith("two_tower"):
        return vmoe.create_model(name, image=image, text=text)
    model = vmoe.create_model(name, **(image if name.startswith("vmoe") else {**text, "img_size": 24}))
    if hasattr(model, "head"):
        torch.nn.init.normal_(model.head.weight, std=0.1)
    return model


def inputs(name, dtype=torch.float64):
    torch.manual_seed(0)
    images, text = torch.randn(2, 3, 24, 24, dtype=dtype), torch.randint(1, 100, (2, 16))
    text[0, 5:] = 127
    return (images,) if name.startswith("vmoe") else (images, text)


def outputs_of(model, *given):
    found = model(*given)
    return found if isinstance(found, torch.Tensor) else torch.cat([each.flatten() for each in found])


def penalty(model, *given):
    """The squared norm of the gradient of all parameters, and its gradient."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    loss = outputs_of(model, *given).square().sum()
    gradients = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
    total = sum(gradient.square().sum() for gradient in gradients if gradient is not None)
    return total, torch.autograd.grad(total, parameters, allow_unused=True)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("training", [True, False])
def test_second_derivatives_exist_with_the_reference_backend(name, training):
    model, given = make(name, backend="reference").double().train(training), inputs(name)
    _, gradients = penalty(model, *given)
    # Against a difference quotient along one direction.
    torch.manual_seed(2)
    directions = [torch.randn_like(p) for p in model.parameters()]
    slope = sum((g * d).sum() for g, d in zip(gradients, directions) if g is not None)
    ends = []
    for step in (1e-6, -1e-6):
        with torch.no_grad():
            for parameter, direction in zip(model.parameters(), directions):
                parameter.add_(direction, alpha=step)
        ends.append(penalty(model, *given)[0])
        with torch.no_grad():
            for parameter, direction in zip(model.parameters(), directions):
                parameter.sub_(direction, alpha=step)
    torch.testing.assert_close(slope, (ends[0] - ends[1]) / 2e-6, rtol=1e-4, atol=1e-6)


def test_the_context_manager_does_the_same_for_any_model():
    model = make("vmoe_tiny_patch8_48").double()
    with pytest.raises(RuntimeError, match="not implemented"):
        penalty(model, *inputs("vmoe"))
    with use_backend("reference"):
        assert penalty(model, *inputs("vmoe"))[0] > 0


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224", "naflexvit_base_patch16_gap"])
def test_upcycled_models_of_timm_have_second_derivatives_with_the_reference_backend(name, tmp_path):
    sizes = {"embed_dim": 32, "num_heads": 2, "depth": 2, "num_classes": 3}
    dense = timm.create_model(name, **sizes, **({} if "naflex" in name else {"img_size": 28, "patch_size": 14}))
    side = 32 if "naflex" in name else 28
    save_pretrained(vmoe.upcycle(dense, 4, [1]), tmp_path / "m.safetensors")
    for model in (
        vmoe.upcycle(dense, 4, [1], backend="reference"),
        vmoe.create_model(pretrained=tmp_path / "m.safetensors", backend="reference"),
    ):
        assert penalty(model.eval(), torch.randn(2, 3, side, side))[0] > 0


def test_the_backend_is_a_setting_of_the_file(tmp_path):
    model = make("limoe_tiny_patch12_48", backend="reference")
    assert all(not block.attn.fused_attn for block in model.blocks)
    save_pretrained(model, tmp_path / "m.safetensors")
    assert vmoe.create_model(pretrained=tmp_path / "m.safetensors").blocks[1].mlp.experts.backend == "reference"


@pytest.mark.parametrize("name", MODELS)
def test_gradient_checkpointing_changes_no_gradient(name):
    model, given, gradients = make(name), inputs(name, torch.float32), []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        with vmoe.record_routing(model) as record:
            loss = outputs_of(model, *given).square().mean() + record.auxiliary_loss()
        loss.backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("training", [True, False])
def test_per_sample_gradients_and_forward_mode_with_the_reference_backend(name, training):
    model, given = make(name, backend="reference").double().train(training), inputs(name)
    parameters = {key: parameter.detach() for key, parameter in model.named_parameters()}

    def loss(parameters, *one):
        return outputs_of(lambda *x: functional_call(model, parameters, x), *one).square().sum()

    alone = [each[:, None] for each in given]
    gradients = vmap(grad(loss), in_dims=(None, *[0] * len(given)))(parameters, *alone)
    for index in range(2):
        one = [each[index] for each in alone]
        _, slope = jvp(lambda p, one=one: loss(p, *one), (parameters,), (parameters,))
        total = sum((gradients[key][index] * parameters[key]).sum() for key in parameters)
        torch.testing.assert_close(slope, total)
        model.zero_grad()
        loss(dict(model.named_parameters()), *one).backward()
        for key, parameter in model.named_parameters():
            theirs = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            torch.testing.assert_close(gradients[key][index], theirs, msg=key)
