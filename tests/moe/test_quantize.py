import json

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import vmoe
from vmoe.models import factory
from vmoe.models.densify import densify
from vmoe.models.flops import count_parameters, forward_flops
from vmoe.models.spec import model_spec
from vmoe.moe import GroupedLinear, SparseMoE
from vmoe.moe.quantize import WeightOnlyLinear, expert_bytes, experts_kept_as, quantize_experts

KINDS = ["int8", "bfloat16"]
TINY = {"depth": 2, "num_heads": 2}


def vision(**settings) -> nn.Module:
    model = vmoe.create_model("vmoe_tiny_patch8_48", num_classes=10, embed_dim=32, **TINY, **settings).eval()
    nn.init.normal_(model.head.weight)
    return model


@pytest.mark.parametrize("bias", [True, False])
def test_int8_is_the_nearest_of_255_steps_of_each_output(bias):
    torch.manual_seed(0)
    linear = GroupedLinear(3, 6, 5, bias)
    linear.weight.data *= torch.logspace(-3, 3, 15).view(3, 5, 1)
    linear.weight.data[1, 2] = 0
    kept = WeightOnlyLinear(linear, "int8").eval()
    step = linear.weight.abs().amax(-1) / 127
    assert kept.stored.dtype == torch.int8
    error = kept.stored * kept.scale[..., None] - linear.weight
    assert (error.abs() <= 0.5001 * step[..., None]).all()
    assert kept.stored.abs().amax(-1).flatten().tolist() == [127] * 7 + [0] + [127] * 7
    x, count = torch.randn(7, 6), torch.tensor([3, 0, 4])
    linear.weight.data += error
    with torch.no_grad():
        torch.testing.assert_close(kept(x, count), linear(x, count))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_products_are_in_the_inputs_type(kind, dtype):
    torch.manual_seed(0)
    linear = GroupedLinear(2, 64, 16)
    # Large enough that whole numbers times rows would leave float16.
    x, count = 30 * torch.ones(5, 64), torch.tensor([2, 3])
    linear.weight.data.abs_()
    expected = linear(x, count).detach()
    kept = WeightOnlyLinear(linear, kind).eval()
    kept.requires_grad_(False)
    y = kept(x.to(dtype), count)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), expected, rtol=0.02, atol=0)
    if dtype != torch.float32:
        with torch.autocast("cpu", dtype):
            torch.testing.assert_close(kept(x, count), y)


ROUTERS = {
    "top_k": {"num_selected_experts": 2},
    "capacity": {"eval_capacity_factor": 0.5, "batch_priority": True},
    "gated": {"router_preset": "mixtral"},
    "shared": {"router_preset": "deepseek"},
    "expert_choice": {"router": "expert_choice"},
    "soft": {"router": "soft"},
}


@pytest.mark.parametrize(
    ("settings", "kind"), [(settings, KINDS[i % 2]) for i, settings in enumerate(ROUTERS.values())], ids=ROUTERS
)
def test_every_router_computes_nearly_the_same_in_less_memory(settings, kind):
    torch.manual_seed(0)
    model, x = vision(**settings), torch.randn(2, 3, 48, 48)
    numbers, memory, kept = count_parameters(model), expert_bytes(model), {}
    with torch.no_grad():
        expected, flops = model(x), forward_flops(lambda: model(x))
    for name, tensor in model.state_dict().items():
        if ".experts.fc1.weight" not in name and ".experts.fc2.weight" not in name:
            kept[name] = tensor.clone()
    assert quantize_experts(model, kind) is model
    y = model(x)  # without no_grad: nothing asks for a gradient
    assert 0 < (y - expected).norm() < 0.02 * expected.norm()
    assert expert_bytes(model) < memory * (0.3 if kind == "int8" else 0.52)
    assert count_parameters(model) == numbers
    assert forward_flops(lambda: model(x)) == flops
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in kept.items())


@pytest.mark.parametrize("name", ["limoe_tiny_patch8_48", "two_tower_tiny_patch8_48"])
def test_image_text_models(name):
    torch.manual_seed(0)
    towers = {"image": {"depth": 2, "embed_dim": 32, "num_heads": 2}}
    model = vmoe.create_model(name, **(towers if name.startswith("two") else {"width": 32, **TINY})).eval()
    text = torch.randint(1, 200, (2, model.context_length))
    calls = [lambda: model.encode_image(torch.ones(2, 3, 48, 48)), lambda: model.encode_text(text)]
    with torch.no_grad():
        expected = [call() for call in calls]
    quantize_experts(model, "int8")
    results = [call() for call in calls]
    assert any(not torch.equal(y, before) for y, before in zip(results, expected))
    for y, before in zip(results, expected):
        assert (y - before).norm() < 0.05 * before.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_files_and_state_dicts_bring_it_back(kind, tmp_path):
    model, x = quantize_experts(vision(), kind), torch.randn(2, 3, 48, 48)
    factory.save_pretrained(model, tmp_path / "m.safetensors")
    again = vmoe.create_model(pretrained=tmp_path / "m.safetensors").eval()
    assert model_spec(again)["experts"] == experts_kept_as(again) == kind
    assert torch.equal(again(x), model(x))
    other = quantize_experts(vision(), kind)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))
    with pytest.raises(RuntimeError, match=r"Missing key.*experts.fc1.weight"):
        vision().load_state_dict(model.state_dict())
    plain = vision()
    factory.save_pretrained(plain, tmp_path / "plain.safetensors")
    whole, small = (file.stat().st_size for file in (tmp_path / "plain.safetensors", tmp_path / "m.safetensors"))
    assert whole - small > 0.9 * (expert_bytes(plain) - expert_bytes(model))


def test_a_files_kind_is_checked(tmp_path):
    file = tmp_path / "m.safetensors"
    factory.save_pretrained(vision(), file)
    settings = factory.read_pretrained_metadata(file) | {"experts": "int2"}
    save_file(load_file(file), file, {"vmoe": json.dumps(settings)})
    with pytest.raises(factory.WeightsError, match="experts is none of int8, bfloat16"):
        vmoe.create_model(pretrained=file)
    factory.save_pretrained(quantize_experts(vision(), "int8"), file)
    with pytest.raises(ValueError, match="timm cannot make"):
        timm.create_model("vmoe_tiny_patch8_48", pretrained=True, pretrained_cfg_overlay={"file": str(file)})


def test_nothing_learns():
    layer = SparseMoE(8, 16, num_experts=4)
    x = torch.randn(2, 5, 8)
    quantize_experts(layer, "int8")
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    with pytest.raises(RuntimeError, match=r"int8 cannot be trained.*model.eval()"):
        layer.eval()(x.requires_grad_())
    with pytest.raises(RuntimeError, match="int8 cannot be trained"):
        layer.train()(x.detach())
    with torch.no_grad():
        assert layer.eval()(x).isfinite().all()


def test_what_needs_the_weights_themselves_says_so():
    model = quantize_experts(vision(), "int8")
    with pytest.raises(RuntimeError, match="kept as int8, for inference alone"):
        densify(model)


def test_what_cannot_be_kept_is_one_sentence_and_changes_nothing():
    with pytest.raises(ValueError, match="'int8' or 'bfloat16', got 'int4'"):
        quantize_experts(vision(), "int4")
    with pytest.raises(ValueError, match="no experts to keep as int8"):
        quantize_experts(nn.Linear(2, 2), "int8")
    model = quantize_experts(vision(), "int8")
    assert quantize_experts(model, "int8") is model
    with pytest.raises(ValueError, match=r"blocks.1.mlp.experts.fc1 is kept as int8 already"):
        quantize_experts(model, "bfloat16")
    broken = vision()
    broken.blocks[1].mlp.experts.fc2.weight.data[0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"blocks.1.mlp.experts.fc2.weight is not finite"):
        quantize_experts(broken, "int8")
    assert experts_kept_as(broken) is None
    assert all(parameter.requires_grad for parameter in broken.parameters())


def test_compiled_is_eager():
    torch.manual_seed(0)
    torch._dynamo.reset()
    layer = quantize_experts(SparseMoE(8, 16, num_experts=4, eval_capacity_factor=0.5), "int8")
    compiled, x = torch.compile(layer, fullgraph=True, backend="eager"), torch.randn(2, 9, 8)
    torch.testing.assert_close(compiled(x), layer(x), rtol=1e-4, atol=1e-5)
