"""How the experts are computed: `select_backend` chooses, once per call and in no other place.

- "reference": plain PyTorch. It supports everything, and all other backends are tested against it.
- "cpu": both layers of one expert after the other, fused, on a CPU.
- "triton": Triton kernels on CUDA; never measured on a GPU, so only where it is asked for (docs/kernels.md).
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from vmoe.moe.backends import cpu, reference, triton

if TYPE_CHECKING:
    from vmoe.moe.experts import Experts

BACKENDS = ("auto", "reference", "cpu", "triton")
# Triton's interpreter runs its kernels on the CPU, slowly, for tests.
_DEVICES = {"cpu": ("cpu",), "triton": ("cuda", "cpu") if os.environ.get("TRITON_INTERPRET") == "1" else ("cuda",)}
# Goes over what the experts themselves say; "auto": leaves it to them.
_forced = os.environ.get("VMOE_BACKEND") or "auto"
if _forced not in BACKENDS:
    raise ValueError(f"VMOE_BACKEND must be one of {', '.join(BACKENDS)}, got {_forced!r}")


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Computes all experts by one backend inside the block, whatever their own setting.

    Args:
        name: "reference", "cpu" or "triton"; "auto": as without it.

    Raises:
        ValueError: unknown backend; inside the block, experts that it cannot compute.
    """
    global _forced
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {name!r}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def backend_name(experts: "Experts", x_RD: Tensor) -> str:
    """The backend that computes these experts now: "reference", "cpu" or "triton".

    Raises:
        ValueError: the one that was asked for cannot.
    """
    wanted = experts.backend if _forced == "auto" else _forced
    if wanted == "reference":
        return wanted
    name = "cpu" if wanted == "auto" else wanted
    reason = _reason_against(name, experts, x_RD)
    if reason is None:
        return name
    if wanted == "auto":
        return "reference"
    raise ValueError(f"backend {name!r} cannot compute these experts: {reason}; choose 'auto' or 'reference'")


def select_backend(experts: "Experts", x_RD: Tensor) -> Callable[["Experts", Tensor, Tensor], Tensor]:
    """The function that computes experts: (experts, (R, D) rows sorted by expert, (E,) rows of each) -> (R, O)."""
    return {"reference": reference.run, "cpu": cpu.run, "triton": triton.run}[backend_name(experts, x_RD)]


def _reason_against(name: str, experts: "Experts", x_RD: Tensor) -> str | None:
    """Why a fused backend cannot compute these experts; None if it can."""
    compiling = torch.compiler.is_compiling()
    if name == "cpu" and compiling:
        return "it is not for compiled code"
    if x_RD.device.type not in _DEVICES[name]:
        return f"their rows are on {x_RD.device.type}"
    if type(experts.fc1).__name__ != "GroupedLinear" or type(experts.fc2).__name__ != "GroupedLinear":
        return "their layers are not GroupedLinear"
    if experts.norm is not None:
        return "they have a norm between their layers"
    if experts.training and experts.drop.p > 0:
        return "they have dropout"
    if cpu.activation_name(experts.act) is None:
        return f"it does not know their activation {type(experts.act).__name__}"
    if any(map(_has_hooks, (experts.fc1, experts.act, experts.drop, experts.fc2))):
        return "their parts have hooks"
    if not (x_RD.dtype == experts.fc1.weight.dtype or torch.is_autocast_enabled(x_RD.device.type)):
        return f"their rows are {x_RD.dtype} and their weights {experts.fc1.weight.dtype}"
    if not compiling and (
        torch.jit.is_tracing()
        or forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
    ):
        return "PyTorch's own operations are watched (torch.func, FLOP counters, fake tensors)"
    return triton.reason_against(experts, x_RD) if name == "triton" else None


def _has_hooks(module: nn.Module) -> bool:
    """The module's calls are listened to, or its `forward` was replaced."""
    own = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(own) or "forward" in vars(module) or torch.nn.modules.module._has_any_global_hook()
