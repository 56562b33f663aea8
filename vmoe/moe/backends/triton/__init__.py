"""Which experts the Triton kernels can compute (`kernels.py`, which needs Triton and is imported when it is used)."""

import os
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from vmoe.moe.grouped import compute_dtype

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Triton's interpreter runs its kernels on the CPU, slowly, for tests.
DEVICES = ("cuda", "cpu") if os.environ.get("TRITON_INTERPRET") == "1" else ("cuda",)
_INSTALLED = find_spec("triton") is not None


def activation_name(act: nn.Module) -> str | None:
    """What the kernels call an activation; None: they do not have it."""
    if type(act) is nn.GELU:
        return "gelu" if act.approximate == "none" else "gelu_tanh"
    # By name: this package does not know timm, whose models bring activations of their own.
    timms = {"timm.layers.activations.GELU": "gelu", "timm.layers.activations.GELUTanh": "gelu_tanh"}
    return timms.get(f"{type(act).__module__}.{type(act).__qualname__}")


def reason_against(experts: nn.Module, x_RD: Tensor) -> str | None:
    """Why the kernels cannot compute these experts; None if they can."""
    dtype = compute_dtype(x_RD)
    parts = (experts.fc1, experts.act, experts.drop, experts.fc2)
    weight = getattr(experts.fc1, "_parameters", {}).get("weight")
    reasons = {
        "the package triton is not installed; it comes with PyTorch for CUDA on Linux": not _INSTALLED,
        f"their rows are on {x_RD.device.type}": x_RD.device.type not in DEVICES,
        f"it has no {dtype}": dtype not in DTYPES,
        "it has no gated experts": experts.gated,
        "they have a norm between their layers": experts.norm is not None,
        "they have dropout": experts.training and experts.drop.p > 0,
        f"it has no {type(experts.act).__name__}": activation_name(experts.act) is None,
        "they are quantized or have adapters": not isinstance(weight, Tensor),
        "their parts have hooks": any(map(_has_hooks, parts)),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _has_hooks(module: nn.Module) -> bool:
    """The module's calls are listened to, or its `forward` was replaced."""
    own = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(own) or "forward" in vars(module) or torch.nn.modules.module._has_any_global_hook()
