import pytest
import torch
from timm.layers import GluMlp, Mlp, SwiGLU
from torch import nn

from vmoe.moe import Experts, SparseMoE


def rows(count: list[int], D: int = 6) -> torch.Tensor:
    return torch.randn(sum(count), D)


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
    ],
)
@pytest.mark.parametrize("norm", [None, nn.LayerNorm])
@pytest.mark.parametrize("compiled", [False, True])
def test_each_expert_is_timms_mlp(kind, make, norm, compiled):
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
    run = torch.compile(experts, backend="aot_eager") if compiled else experts
    y = run(x, torch.tensor(count))
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


@pytest.mark.parametrize("kind", ["mlp", "swiglu"])
def test_shared_experts_add_to_what_is_routed(kind):
    layer = SparseMoE(6, 10, num_experts=4, num_shared_experts=2, expert_mlp=kind).eval()
    x = torch.randn(2, 5, 6)
    mask = torch.rand(2, 5) < 0.6
    y = layer(x, mask)
    shared, layer.shared = layer.shared, None
    torch.testing.assert_close(y, layer(x, mask) + torch.where(mask[..., None], shared(x), 0))
    assert shared.fc1.out_features == 20 * (2 if kind == "swiglu" else 1)
