"""Which backend computes the experts, and why not another one."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import vmoe
from vmoe.moe import SparseMoE, use_backend


def layer(**kwargs):
    return SparseMoE(8, 12, num_experts=3, **kwargs)


def backend_of(layer, x=None, **how):
    with vmoe.record_routing(layer) as record:
        layer(torch.randn(2, 5, 8) if x is None else x)
    return record.layers[""].backend


def test_plain_experts_on_a_cpu_are_fused():
    assert backend_of(layer()) == backend_of(layer(backend="cpu")) == backend_of(layer(expert_mlp="swiglu")) == "cpu"
    assert "backend='cpu'" in repr(layer(backend="cpu").experts)


def test_a_backend_can_be_forced():
    assert backend_of(layer(backend="reference")) == "reference"
    with use_backend("reference"):
        assert backend_of(layer(backend="cpu")) == "reference"
        with use_backend("auto"):
            assert backend_of(layer()) == "cpu"
    assert backend_of(layer()) == "cpu"
    with pytest.raises(ValueError, match="backend must be one of"), use_backend("fast"):
        pass


def hooked(part):
    model = layer()
    getattr(model.experts, part).register_forward_hook(lambda *_: None)
    return model


def replaced(part):
    model = layer()
    module = getattr(model.experts, part)
    module.forward = module.forward
    return model


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


REASONS = {
    "norm": (lambda: layer(norm_layer=nn.LayerNorm), "a norm between their layers"),
    "dropout": (lambda: layer(drop=0.1), "dropout"),
    "activation": (lambda: layer(act_layer=Doubled), "does not know their activation Doubled"),
    "in place": (lambda: layer(act_layer=lambda: nn.SiLU(inplace=True)), "does not know their activation SiLU"),
    "learned": (lambda: layer(act_layer=nn.PReLU), "does not know their activation PReLU"),
    "random": (lambda: layer(act_layer=nn.RReLU), "does not know their activation RReLU"),
    "quantized": (lambda: vmoe.quantize_experts(layer(), "int8"), "not GroupedLinear"),
    **{f"hook on {part}": (lambda part=part: hooked(part), "have hooks") for part in ("fc1", "act", "drop", "fc2")},
    "another forward": (lambda: replaced("fc1"), "have hooks"),
}


@pytest.mark.parametrize(("make", "reason"), REASONS.values(), ids=REASONS)
def test_other_experts_take_the_reference_and_a_forced_backend_says_why_not(make, reason):
    model = make()
    with torch.no_grad():
        assert backend_of(model) == "reference"
        with use_backend("cpu"), pytest.raises(ValueError, match=f"backend 'cpu' cannot compute these.*{reason}.*auto"):
            model(torch.randn(2, 5, 8))


def test_so_do_those_that_are_watched():
    model, x = layer(), torch.randn(2, 5, 8)
    with FlopCounterMode(display=False):
        assert backend_of(model) == "reference"
    assert backend_of(layer(dtype=torch.bfloat16), x.bfloat16()) == "cpu"
    with torch.autocast("cpu", torch.bfloat16):
        assert backend_of(model) == "cpu"
    with use_backend("cpu"), pytest.raises(ValueError, match="their rows are on meta"):
        model.to("meta")(x.to("meta"))


def test_triton_is_never_chosen_by_itself():
    with use_backend("triton"), pytest.raises(ValueError, match="backend 'triton' cannot.*their rows are on cpu"):
        layer()(torch.randn(2, 5, 8))


def test_the_environment_sets_a_backend(monkeypatch):
    import importlib

    from vmoe.moe import backends

    monkeypatch.setenv("VMOE_BACKEND", "yes")
    with pytest.raises(ValueError, match="VMOE_BACKEND must be one of auto, reference, cpu, triton, got 'yes'"):
        importlib.reload(backends)
    monkeypatch.setenv("VMOE_BACKEND", "")
    importlib.reload(backends)
