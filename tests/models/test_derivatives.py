"""Second derivatives of whole models on a CPU, where fused attention has none."""

import pytest
import torch

import vmoe
from vmoe.moe import use_backend

TINY = {"depth": 2, "num_experts": 4, "num_selected_experts": 2, "noise_std": 0.0, "load_loss": 0.0}
WORDS = {"vocab_size": 128, "eot_token_id": 127}


def inputs(name):
    torch.manual_seed(0)
    images = torch.randn(2, 3, 48, 48, dtype=torch.float64)
    text = torch.randint(1, 100, (2, 16))
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


@pytest.mark.parametrize("name", ["vmoe_tiny_patch8_48", "limoe_tiny_patch12_48", "two_tower_tiny_patch12_48"])
@pytest.mark.parametrize("training", [True, False])
def test_second_derivatives_exist_with_the_reference_backend(name, training):
    tower = {**TINY, "backend": "reference"}
    settings = {"image": tower, "text": {**tower, **WORDS}} if name.startswith("two_tower") else tower
    settings |= WORDS if name.startswith("limoe") else {}
    torch.manual_seed(1)
    model = vmoe.create_model(name, **settings).double().train(training)
    if hasattr(model, "head"):
        torch.nn.init.normal_(model.head.weight, std=0.1)
    given = inputs(name)
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
    torch.manual_seed(0)
    model = vmoe.create_model("vmoe_tiny_patch8_48", **TINY).double()
    torch.nn.init.normal_(model.head.weight, std=0.1)
    with pytest.raises(RuntimeError, match="not implemented"):
        penalty(model, *inputs("vmoe"))
    with use_backend("reference"):
        assert penalty(model, *inputs("vmoe"))[0] > 0


def test_the_backend_is_a_setting_of_the_file(tmp_path):
    model = vmoe.create_model("limoe_tiny_patch12_48", depth=2, backend="reference")
    assert all(not block.attn.fused_attn for block in model.blocks)
    from vmoe.models.factory import save_pretrained

    save_pretrained(model, tmp_path / "m.safetensors")
    assert vmoe.create_model(pretrained=tmp_path / "m.safetensors").blocks[1].mlp.experts.backend == "reference"
