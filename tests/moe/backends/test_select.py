"""Which backend computes the experts, and why not another one."""

import importlib

import pytest
import torch
from torch import nn

import vmoe
from vmoe.moe import SparseMoE, backends, use_backend


def layer(**kwargs):
    return SparseMoE(8, 12, num_experts=3, **kwargs)


def backend_of(layer):
    with vmoe.record_routing(layer) as record:
        layer(torch.randn(2, 5, 8))
    return record.layers[""].backend


def test_triton_is_never_chosen_by_itself():
    assert backend_of(layer()) == backend_of(layer(backend="reference")) == "reference"


def test_a_backend_can_be_forced():
    with use_backend("triton"):
        with pytest.raises(ValueError, match="backend 'triton' cannot compute these experts: their rows are on cpu"):
            layer()(torch.randn(2, 5, 8))
        with use_backend("reference"):
            assert backend_of(layer(backend="triton")) == "reference"
        with use_backend("auto"):
            assert backend_of(layer()) == "reference"
    with pytest.raises(ValueError, match="their rows are on cpu; choose 'auto' or 'reference'"):
        layer(backend="triton")(torch.randn(2, 5, 8))
    assert backend_of(layer()) == "reference"
    with pytest.raises(ValueError, match=r"backend must be one of .*, got 'fast'"), use_backend("fast"):
        pass
    with pytest.raises(ValueError, match=r"backend must be one of .*, got 'fast'"):
        layer(backend="fast")


REASONS = {
    "norm": (lambda: layer(norm_layer=nn.LayerNorm), "a norm between their layers"),
    "dropout": (lambda: layer(drop=0.1), "dropout"),
    "activation": (lambda: layer(act_layer=nn.Tanh), "it has no Tanh"),
    "gated": (lambda: layer(expert_mlp="swiglu"), "gated"),
    "float64": (lambda: layer(dtype=torch.float64), "it has no torch.float64"),
    "quantized": (lambda: vmoe.quantize_experts(layer(), "int8"), "quantized"),
}


@pytest.mark.parametrize(("make", "reason"), REASONS.values(), ids=REASONS)
def test_experts_that_the_kernels_do_not_know_are_named(make, reason, monkeypatch):
    monkeypatch.setattr(backends.triton, "DEVICES", ("cpu",))
    model = make()
    x = torch.randn(2, 5, 8, dtype=model.router.weight.dtype)
    with torch.no_grad(), use_backend("triton"), pytest.raises(ValueError, match=reason):
        model(x)


@pytest.mark.parametrize("part", ["fc1", "act", "drop", "fc2"])
def test_so_are_hooks(part, monkeypatch):
    monkeypatch.setattr(backends.triton, "DEVICES", ("cpu",))
    model = layer()
    getattr(model.experts, part).register_forward_hook(lambda *_: None)
    with use_backend("triton"), pytest.raises(ValueError, match="hooks"):
        model(torch.randn(2, 5, 8))


def test_without_triton_that_is_said(monkeypatch):
    monkeypatch.setattr(backends.triton, "_INSTALLED", False)
    with use_backend("triton"), pytest.raises(ValueError, match="the package triton is not installed"):
        layer()(torch.randn(2, 5, 8))


def test_the_environment_sets_a_backend(monkeypatch):
    monkeypatch.setenv("VMOE_BACKEND", "yes")
    with pytest.raises(ValueError, match="VMOE_BACKEND must be one of auto, reference, triton, got 'yes'"):
        importlib.reload(backends)
    monkeypatch.setenv("VMOE_BACKEND", "")
    importlib.reload(backends)
