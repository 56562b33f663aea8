"""The experts on Triton kernels, for CUDA; off unless `VMOE_TRITON=1` is set or `enable()` called.

Not yet measured on a GPU. The results are those of the plain path, within rounding; `docs/kernels.md` says more.
Triton is imported with the first use, so nothing changes where it is missing.

Shapes, by suffix: G groups, N tokens in a group, K choices per token, D width, R rows sorted by expert, E experts.
"""

import os
from importlib.util import find_spec

import torch
from torch import Tensor

from vmoe.moe.backends.activations import activation_name
from vmoe.moe.dispatch import DispatchPlan, gather_rows
from vmoe.moe.experts import Experts, has_hooks, own_experts

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Triton's interpreter: the kernels run on the CPU, slowly, for tests.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_enabled = False


def enable(on: bool = True) -> None:
    """Use the kernels wherever `can_run` allows, or no longer.

    Raises:
        ModuleNotFoundError: if Triton is not installed.
    """
    global _enabled
    if on and find_spec("triton") is None:
        raise ModuleNotFoundError(
            "VMOE_TRITON=1 and vmoe.moe.backends.triton.enable() need the package triton, which comes with PyTorch for "
            "CUDA on Linux and is not installed here; install it, or leave the kernels off"
        )
    _enabled = on


def can_run(experts: Experts, x: Tensor) -> bool:
    """`run` stands for dispatch, experts and combine: switched on, on a device that has them, for plain experts.

    Gated experts, norms, dropout, other activations, hooks, and experts spread over processes go the plain way.
    """
    if not (_enabled and (x.is_cuda or (_INTERPRETED and x.device.type == "cpu"))):
        return False
    return (
        experts.exchange is None
        and not experts.gated
        and activation_name(experts.act) is not None
        and _dtype(x) in DTYPES
        and not has_hooks(experts)
        and experts.is_plain_mlp(x)
    )


def run(experts: Experts, x_GND: Tensor, plan: DispatchPlan, combine_weights_GNK: Tensor) -> Tensor:
    """Tokens through their experts and back; only if `can_run`.

    Returns:
        (G, N, O) in the tokens' dtype, or autocast's; zero for a token without a row.
    """
    from vmoe.moe.backends.triton.mlp import routed_mlp

    G, N, K = plan.shape
    dtype = _dtype(x_GND)
    weight_R1 = gather_rows(
        combine_weights_GNK.reshape(-1, 1), plan.assignment_R, plan.row_A[:, None], plan.may_pad, plan.may_drop
    )
    fc1, fc2 = (
        tuple(None if p is None else own_experts(p).to(dtype) for p in (layer.weight, layer.bias))
        for layer in (experts.fc1, experts.fc2)
    )
    y_SO = routed_mlp(
        x_GND.reshape(G * N, -1).to(dtype),
        plan.token_R,
        plan.row_A.view(G * N, K),
        weight_R1[:, 0],
        plan.count_E,
        fc1,
        fc2,
        activation_name(experts.act),
    )
    return y_SO.view(G, N, -1)


def _dtype(x: Tensor) -> torch.dtype:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


if os.environ.get("VMOE_TRITON", "0") not in ("", "0", "1"):
    raise ValueError(f"VMOE_TRITON must be 0 or 1, got {os.environ['VMOE_TRITON']!r}")
enable(os.environ.get("VMOE_TRITON") == "1")
