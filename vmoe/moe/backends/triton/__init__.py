"""The experts on Triton kernels, for CUDA. Never measured on a GPU: only where the backend "triton" is asked for.

Only the hidden layer before its activation is kept for the backward pass.

Shapes, by suffix: R rows sorted by expert, D model width, F hidden width, O the result's width, E experts, T tiles.
"""

import os
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from vmoe.moe.grouped import local_experts

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Triton's interpreter runs its kernels on the CPU, slowly, for tests.
DEVICES = ("cuda", "cpu") if os.environ.get("TRITON_INTERPRET") == "1" else ("cuda",)
_INSTALLED = find_spec("triton") is not None
_ACTIVATIONS = {  # by name: this package does not know timm, whose models bring activations of their own
    "torch.nn.modules.activation.SiLU": "silu",
    "torch.nn.modules.activation.ReLU": "relu",
    "timm.layers.activations.GELU": "gelu",
    "timm.layers.activations.GELUTanh": "gelu_tanh",
}


def activation_name(act: nn.Module) -> str | None:
    """What the kernels call an activation; None: they do not have it."""
    if type(act) is nn.GELU:
        return "gelu" if act.approximate == "none" else "gelu_tanh"
    return _ACTIVATIONS.get(f"{type(act).__module__}.{type(act).__qualname__}")


def reason_against(experts: nn.Module, x_RD: Tensor) -> str | None:
    """Why the kernels cannot compute these experts; None if they can."""
    dtype = _dtype(x_RD)
    hooked = any(_has_hooks(part) for part in (experts.fc1, experts.act, experts.drop, experts.fc2))
    reasons = {
        "the package triton is not installed; it comes with PyTorch for CUDA on Linux": not _INSTALLED,
        f"their rows are on {x_RD.device.type}": x_RD.device.type not in DEVICES,
        f"it has no {dtype}": dtype not in DTYPES,
        "it has no gated experts": experts.gated,
        "they have a norm between their layers": experts.norm is not None,
        "they have dropout": experts.training and experts.drop.p > 0,
        f"it has no {type(experts.act).__name__}": activation_name(experts.act) is None,
        "they are quantized": not isinstance(getattr(experts.fc1, "_parameters", {}).get("weight"), Tensor),
        "their parts have hooks": hooked,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _has_hooks(module: nn.Module) -> bool:
    """The module's calls are listened to, or its `forward` was replaced."""
    own = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(own) or "forward" in vars(module) or torch.nn.modules.module._has_any_global_hook()


def run(experts: nn.Module, x_RD: Tensor, count_E: Tensor) -> Tensor:
    """(R, D) rows sorted by expert, (E,) rows of each -> (R, O), zero in unused rows."""
    from vmoe.moe.backends.triton.kernels import block_rows, tile_table

    dtype = _dtype(x_RD)
    parameters = [local_experts(p) for fc in (experts.fc1, experts.fc2) for p in (fc.weight, fc.bias)]
    parameters = [None if p is None else p.to(dtype) for p in parameters]
    # The kernels take the strides of rows and matrices as they are, but not of biases.
    parameters[1::2] = [None if p is None else p.contiguous() for p in parameters[1::2]]
    block_m = block_rows(x_RD.shape[0], count_E.shape[0])
    tile_T3 = tile_table(count_E, x_RD.shape[0], block_m)
    x_RD = x_RD.to(dtype)
    differentiated = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x_RD, *parameters))
    layers = _TritonExperts.apply if differentiated else partial(_TritonExperts.forward, None)
    return layers(x_RD, *parameters, tile_T3, count_E.cumsum(0).int(), block_m, activation_name(experts.act))


def _dtype(x: Tensor) -> torch.dtype:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class _TritonExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_RD, w1_EFD, b1_EF, w2_EOF, b2_EO, tile_T3, end_E, block_m, activation):
        from vmoe.moe.backends.triton.kernels import grouped_linear

        a_RF, h_RF = grouped_linear(x_RD, w1_EFD, b1_EF, None, tile_T3, block_m, activation, ctx is not None)
        if ctx is not None:
            ctx.save_for_backward(x_RD, w1_EFD, w2_EOF, tile_T3, end_E, h_RF)
            ctx.block_m, ctx.activation = block_m, activation
        return grouped_linear(a_RF, w2_EOF, b2_EO, None, tile_T3, block_m, "none", False)[0]

    @staticmethod
    def backward(ctx, g_RO):
        from vmoe.moe.backends.triton.kernels import grouped_linear, grouped_weight_gradient

        if torch.is_grad_enabled():
            raise RuntimeError("the Triton kernels have no second derivatives: take the backend 'reference'")
        x_RD, w1_EFD, w2_EOF, tile_T3, end_E, h_RF = ctx.saved_tensors
        needs_x, needs_w1, needs_b1, needs_w2, needs_b2 = ctx.needs_input_grad[:5]
        grad_x = grad_w1 = grad_b1 = grad_w2 = grad_b2 = None
        w2_EFO = w2_EOF.transpose(1, 2)
        grad_h_RF, a_RF = grouped_linear(g_RO, w2_EFO, None, h_RF, tile_T3, ctx.block_m, ctx.activation, True)
        if needs_w2 or needs_b2:
            grad_w2, grad_b2 = grouped_weight_gradient(g_RO, a_RF, end_E, needs_b2)
        del a_RF
        if needs_w1 or needs_b1:
            grad_w1, grad_b1 = grouped_weight_gradient(grad_h_RF, x_RD, end_E, needs_b1)
        if needs_x:
            w1_EDF = w1_EFD.transpose(1, 2)
            grad_x, _ = grouped_linear(grad_h_RF, w1_EDF, None, None, tile_T3, ctx.block_m, "none", False)
        gradients = (grad_x, grad_w1, grad_b1, grad_w2, grad_b2)
        return *(g if need else None for g, need in zip(gradients, ctx.needs_input_grad[:5])), *[None] * 4
