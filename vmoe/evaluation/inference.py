"""How every evaluation calls a model: evaluation mode, no gradients, one precision, one device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import nn

PRECISIONS = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name: str) -> torch.device:
    """The device of a config: "auto" takes CUDA, then MPS, then the CPU; anything else is torch's own name."""
    if name != "auto":
        return torch.device(name)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


@contextmanager
def evaluating(model: nn.Module, device: torch.device | str, precision: str = "float32") -> Iterator[None]:
    """Evaluation mode without gradients, under autocast unless precision is "float32"; the mode is restored after.

    Args:
        model: put into eval() inside the block; its device is not changed.
        device: where the model runs.
        precision: "float32", "bf16" or "fp16".

    Raises:
        ValueError: unknown precision.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    dtype = PRECISIONS[precision]
    autocast = nullcontext() if dtype is None else torch.autocast(torch.device(device).type, dtype)
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad(), autocast:
            yield
    finally:
        for module in training:  # module by module: frozen parts may have been in eval mode
            module.training = True
