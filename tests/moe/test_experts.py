from copy import deepcopy

import pytest
import torch
from timm.layers import GluMlp, Mlp, SwiGLU
from torch import nn
from torch.utils.checkpoint import checkpoint

from vmoe.moe import Experts, SparseMoE


def rows(count: list[int], D: int = 6) -> torch.Tensor:
    return torch.randn(sum(count), D)


def twice_relu2(x: torch.Tensor) -> torch.Tensor:
    return 2 * x.clamp(min=0) ** 2


def copy_of(experts: Experts, dense: nn.Module, e: int) -> None:
    """Give expert e the weights of a dense MLP of timm."""
    with torch.no_grad():
        for name, parameter in dense.named_parameters():
            experts.get_parameter(name)[e].copy_(parameter)


@pytest.mark.parametrize(
    ("kind", "make"),
    [
        ("mlp", lambda norm: Mlp(6, 10, norm_layer=norm)),
        ("swiglu", lambda norm: GluMlp(6, 20, act_layer=nn.SiLU, gate_last=False, norm_layer=norm)),
        ("geglu", lambda norm: GluMlp(6, 20, act_layer=nn.GELU, gate_last=False, norm_layer=norm)),
        ("relu2glu", lambda norm: GluMlp(6, 20, act_layer=lambda: twice_relu2, gate_last=False, norm_layer=norm)),
    ],
)
@pytest.mark.parametrize("norm", [None, nn.LayerNorm])
def test_each_expert_is_timms_mlp(kind, make, norm):
    torch.manual_seed(0)
    dense = [make(norm) for _ in range(3)]
    experts = Experts(3, 6, 10, kind=kind, norm_layer=norm)
    for e, mlp in enumerate(dense):
        if norm is not None:
            nn.init.normal_(mlp.norm.weight)
            nn.init.normal_(mlp.norm.bias)
        copy_of(experts, mlp, e)
    count = [3, 0, 4]
    x = rows(count)
    y = experts(x, torch.tensor(count))
    expected = torch.cat([mlp(part) for mlp, part in zip(dense, x.split(count))])
    torch.testing.assert_close(y, expected)


def test_swiglu_of_timm_is_the_packed_layout():
    dense, experts = SwiGLU(6, 10), Experts(1, 6, 10, kind="swiglu")
    with torch.no_grad():
        experts.fc1.weight[0] = torch.cat([dense.fc1_g.weight, dense.fc1_x.weight])
        experts.fc1.bias[0] = torch.cat([dense.fc1_g.bias, dense.fc1_x.bias])
        experts.fc2.weight[0], experts.fc2.bias[0] = dense.fc2.weight, dense.fc2.bias
    x = rows([5])
    torch.testing.assert_close(experts(x, torch.tensor([5])), dense(x))


def test_a_norm_of_another_kind_is_named():
    with pytest.raises(TypeError, match="nn.LayerNorm"):
        Experts(2, 4, 4, norm_layer=nn.BatchNorm1d)


def test_expert_dropout_goes_over_the_blocks_own():
    assert SparseMoE(4, 4, drop=0.1).experts.drop.p == 0.1
    assert SparseMoE(4, 4, drop=0.1, expert_drop=0.4).experts.drop.p == 0.4
    assert SparseMoE(4, 4, drop=0.1, expert_drop=0.0).experts.drop.p == 0.0


def test_the_width_of_experts_can_be_set():
    layer = SparseMoE(6, 10, expert_width=3, num_shared_experts=2)
    assert layer.experts.fc2.weight.shape == (8, 6, 3)
    assert layer.shared.fc2.in_features == 6
    assert layer(torch.randn(2, 5, 6)).shape == (2, 5, 6)


def saved_bytes(model: nn.Module, x: torch.Tensor) -> int:
    """Of all that a forward pass keeps for the backward pass, but for the parameters."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model(x)
    total = sum(size for size, _ in storages.values())
    assert y.requires_grad
    return total


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_that_of_the_dense_mlp_and_one_gathered_copy(dtype):
    torch.manual_seed(0)
    S, D, F = 1024, 64, 256
    x = torch.randn(S, D).to(dtype).requires_grad_()
    dense = saved_bytes(Mlp(D, F).to(dtype), x)
    assert dense >= (D + 2 * F) * S * dtype.itemsize  # the measure sees the tokens and the hidden layer
    sparse = SparseMoE(D, F, num_experts=4, capacity_factor=1.0, batch_priority=True).to(dtype)
    assert saved_bytes(sparse, x) <= 1.15 * dense + S * D * dtype.itemsize


@pytest.mark.parametrize("kwargs", [{}, {"num_selected_experts": 2}, {"router": "expert_choice"}, {"router": "soft"}])
def test_the_result_may_be_changed_in_place(kwargs):
    kwargs = {**kwargs, **({"num_slots": 2} if "soft" in kwargs.values() else {})}
    layer = SparseMoE(8, 12, num_experts=3, noise_std=0.0, **kwargs).double()
    x = torch.randn(2, 9, 8, dtype=torch.float64, requires_grad=True)
    expected = torch.autograd.grad((layer(x) * 2 + x).square().sum(), [x, *layer.parameters()])
    y = layer(x)
    y *= 2
    y.add_(x)
    for own, other in zip(torch.autograd.grad(y.square().sum(), [x, *layer.parameters()]), expected):
        torch.testing.assert_close(own, other)


def test_checkpointing_copies_and_inference_mode_give_the_same():
    layer = SparseMoE(8, 12, num_experts=3, num_selected_experts=2, capacity_factor=0.8, noise_std=0.0)
    x = torch.randn(2, 9, 8, requires_grad=True)
    y = layer(x)
    gradients = torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])
    copied = deepcopy(layer)
    for model, run in ((layer, lambda x: checkpoint(layer, x, use_reentrant=False)), (copied, copied)):
        again = run(x)
        assert torch.equal(again, y)
        others = torch.autograd.grad(again.square().sum(), [x, *model.parameters()])
        assert all(map(torch.equal, others, gradients))
    with torch.inference_mode():
        assert torch.equal(layer(x), y)


def test_the_default_device_changes_nothing():
    layer, x = SparseMoE(8, 12, num_experts=3), torch.randn(2, 9, 8)
    y = layer.eval()(x)
    with torch.device("meta"):
        assert torch.equal(layer(x), y)


@pytest.mark.parametrize("part", ["fc1", "act", "fc2", "drop"])
def test_hooks_and_other_forwards_of_the_parts_are_called(part):
    layer, x = SparseMoE(8, 12, num_experts=3), torch.randn(2, 9, 8)
    calls = []
    module = getattr(layer.experts, part)
    handle = module.register_forward_hook(lambda *_: calls.append("hook"))
    layer(x)
    handle.remove()
    own = module.forward
    module.forward = lambda *args: calls.append("forward") or own(*args)
    layer(x)
    assert calls == ["hook", "forward"]


def test_layers_of_no_width():
    experts = Experts(3, 8, 0, out_features=6)
    nn.init.ones_(experts.fc2.bias)
    assert torch.equal(experts(torch.randn(5, 8), torch.tensor([2, 0, 3])), torch.ones(5, 6))
