"""Device, precision and mode of a model that is evaluated."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from vmoe.models.calls import evaluation_mode

PRECISIONS = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name: str) -> torch.device:
    """The device of a config: "auto" takes CUDA, then MPS, then the CPU; anything else is torch's own name.

    Under `torchrun`, "auto" and "cuda" are this process's own GPU. ValueError: the device cannot be used.
    """
    if name in ("auto", "cuda") and "LOCAL_RANK" in os.environ and torch.cuda.is_available():
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    if name != "auto":
        try:
            return torch.empty(0, device=name).device
        except (RuntimeError, AssertionError) as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(f"device {name!r} cannot be used ({reason}); 'auto' takes what there is") from error
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def float64_device(device: torch.device) -> torch.device:
    """Where float64 is computed for a model on `device`: there, unless it is Apple's MPS, which has none."""
    return torch.device("cpu") if device.type == "mps" else device


def pick_precision(name: str, device: torch.device) -> str:
    """The precision of a config: "auto" is bf16 on GPUs that multiply in it, else float32.

    It is float32 on every CPU: bf16 makes small sparse models slower there, with AMX too, and results would depend on
    the CPU.
    """
    if name != "auto":
        return name
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "float32"


@contextmanager
def arithmetic(precision: str, device: torch.device | str) -> Iterator[None]:
    """Autocast on a device to "bf16" or "fp16"; "float32" changes nothing. ValueError: another precision."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    if PRECISIONS[precision] is None:
        yield
        return
    with torch.autocast(torch.device(device).type, PRECISIONS[precision]), attention_kernel(precision, device):
        yield


def attention_kernel(precision: str, device: torch.device | str) -> AbstractContextManager:
    """The attention kernel under `arithmetic`; for backward passes too, where checkpointing runs it again.

    In bf16 on a CPU the backward pass of PyTorch's fused attention is several times slower than plain attention.
    """
    plain = torch.device(device).type == "cpu" and PRECISIONS[precision] is not None
    return sdpa_kernel(SDPBackend.MATH) if plain else nullcontext()


@contextmanager
def evaluating(model: nn.Module, device: torch.device | str, precision: str = "float32") -> Iterator[None]:
    """The model in eval() without gradients inside the block, under `arithmetic`; its mode is restored after."""
    with evaluation_mode(model), arithmetic(precision, device):
        yield


@contextmanager
def changed(modules: Iterable[nn.Module], **values: Any) -> Iterator[None]:
    """The modules with other attributes inside the block."""
    before = [(module, name, getattr(module, name)) for module in modules for name in values]
    try:
        for module, name, _ in before:
            setattr(module, name, values[name])
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)
