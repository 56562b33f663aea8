"""How the experts are computed: `select_backend` chooses, once per call.

"triton" (docs/kernels.md) was never measured on a GPU, so it is taken only where it is asked for.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from vmoe.moe.backends import reference, triton
from vmoe.moe.config import CHOICES


def check_backend(name: str, setting: str = "backend") -> str:
    """The name; ValueError if there is no such backend."""
    if name not in CHOICES["backend"]:
        raise ValueError(f"{setting} must be one of {', '.join(CHOICES['backend'])}, got {name!r}")
    return name


# Overrides the setting of the experts, unless it is "auto".
_forced = check_backend(os.environ.get("VMOE_BACKEND") or "auto", "VMOE_BACKEND")


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Computes all experts by "reference" (then attention is plain too) or "triton", whatever their own setting."""
    global _forced
    before, _forced = _forced, check_backend(name)
    try:
        with sdpa_kernel(SDPBackend.MATH) if name == "reference" else nullcontext():
            yield
    finally:
        _forced = before


def backend_name(experts: nn.Module, x_RD: Tensor) -> str:
    """What computes these experts now, "reference" or "triton"; ValueError if that was asked for and cannot."""
    if (experts.backend if _forced == "auto" else _forced) != "triton":
        return "reference"
    reason = triton.reason_against(experts, x_RD)
    if reason is not None:
        raise ValueError(f"backend 'triton' cannot compute these experts: {reason}; choose 'auto' or 'reference'")
    return "triton"


def select_backend(experts: nn.Module, x_RD: Tensor) -> Callable[[nn.Module, Tensor, Tensor], Tensor]:
    """The function that computes experts: (experts, (R, D) rows sorted by expert, (E,) rows of each) -> (R, O)."""
    if backend_name(experts, x_RD) == "reference":
        return reference.run
    from vmoe.moe.backends.triton import kernels

    return kernels.run
