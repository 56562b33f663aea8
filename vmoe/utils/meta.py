"""Models on the meta device: shapes without memory."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

# What initialisations are made of.
FILLS = {"normal_", "uniform_", "erfinv_", "mul_", "add_", "clamp_", "zero_", "fill_"}


@contextmanager
def meta_device() -> Iterator[None]:
    """Tensors made inside are on the meta device, and initialisations skip them.

    They would change nothing there, but PyTorch runs each of their steps in Python: half of the time, or more, that a
    model takes to build.
    """
    with torch.device("meta"), _SkipFills():
        yield


class _SkipFills(TorchFunctionMode):
    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if getattr(function, "__name__", None) in FILLS:
            tensor = args[0] if args else kwargs.get("tensor")  # torch.nn.init gives it by name
            if isinstance(tensor, Tensor) and tensor.is_meta:
                return tensor
        return function(*args, **kwargs)
