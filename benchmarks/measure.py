"""Times measured in turn, activation memory, and what the machine itself can do.

Contenders run one after the other in every round (A B C A B C ...), so that a machine that drifts slows all of them,
and are compared round by round. Every round has another input: the experts' numbers of rows change from call to call,
as in training, so a kernel that only the same shapes make quick shows it.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")
WARM_UP = 2
# Side of the large matrix multiplication's matrices and bytes that the large copy reads, by kind of device.
PRODUCT_SIZE = {"cpu": 2048, "cuda": 8192}
COPY_BYTES = {"cpu": 2**27, "cuda": 2**30}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def spread(values: Sequence[float], digits: int = 4) -> dict[str, float]:
    """{"median", "min", "max"} of some numbers, rounded to significant digits."""
    figures = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: float(f"{value:.{digits}g}") for name, value in figures.items()}


def synchronizer(device: torch.device) -> Callable[[], None]:
    """What waits for all work of a device."""
    return torch.cuda.synchronize if device.type == "cuda" else lambda: None


def alternate(
    calls: Mapping[str, Callable[[T], Any]],
    make_input: Callable[[int], T],
    rounds: int,
    *,
    warmup: int = WARM_UP,
    before: Callable[[], None] = lambda: None,
    synchronize: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each call in each round, in turn.

    Args:
        calls: {name: what is measured}, given the round's input; what they return is dropped within the time.
        make_input: number of the round -> its input; negative in the warm-up. Not timed.
        rounds: measured ones; ValueError if there are none.
        warmup: rounds before them.
        before: done before every call, not timed.
        synchronize: waits for the device.
        clock: seconds.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    with _without_garbage_collection():
        for number in range(-warmup, rounds):
            value = make_input(number)
            for name, call in calls.items():
                before()
                synchronize()
                start = clock()
                call(value)
                synchronize()
                elapsed = clock() - start
                if number >= 0:
                    seconds[name].append(elapsed)
    return seconds


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def milliseconds(seconds: Sequence[float]) -> dict[str, float]:
    """{"median", "min", "max"} in ms."""
    return spread([1e3 * value for value in seconds])


def ratios(seconds: Sequence[float], base: Sequence[float]) -> dict[str, float]:
    """{"median", "min", "max"} of the ratios round by round."""
    return spread([own / other for own, other in zip(seconds, base, strict=True)])


def activation_bytes(call: Callable[[], Tensor], modules: Sequence[nn.Module], device: torch.device) -> int:
    """Memory that the activations of a call, which gives the output of a forward pass, take.

    On a CPU: what autograd keeps for the backward pass, each storage counted once, without parameters and buffers of
    the modules. On CUDA: the peak during forward and backward pass beyond what was there before and the gradients.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        output = call()
        output.backward(torch.ones_like(output))
        torch.cuda.synchronize()
        gradients = [p.grad for module in modules for p in module.parameters() if p.grad is not None]
        peak = torch.cuda.max_memory_allocated() - before - sum(g.numel() * g.element_size() for g in gradients)
        for module in modules:
            module.zero_grad(set_to_none=True)
        return peak
    own = {t.untyped_storage().data_ptr() for m in modules for t in (*m.parameters(), *m.buffers())}
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor  # alive as long as the graph, so that no other tensor takes its place

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = call()
    del output
    return sum(saved.values())


class Ceiling:
    """The most that the machine can do: a large matrix multiplication of one type, and a large copy."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.size, self.bytes = PRODUCT_SIZE[device.type], COPY_BYTES[device.type]
        self.a, self.b = torch.randn(2, self.size, self.size, device=device, dtype=dtype).unbind()
        self.source = torch.ones(self.bytes, dtype=torch.uint8, device=device)
        self.target = torch.empty_like(self.source)

    @property
    def calls(self) -> dict[str, Callable[[Any], Any]]:
        """To be measured in turn with others; they ignore the input."""
        return {"gemm": lambda _: self.a @ self.b, "copy": lambda _: self.target.copy_(self.source)}

    def rates(self, seconds: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float]]:
        """GFLOP/s of "gemm" and GB/s (read and written) of "copy"."""
        flops, moved = 2 * self.size**3, 2 * self.bytes
        return {
            "gemm_gflops": spread([flops / value / 1e9 for value in seconds["gemm"]]),
            "copy_gbps": spread([moved / value / 1e9 for value in seconds["copy"]]),
        }

    def share(self, flops: float, seconds: Sequence[float], gemm_seconds: Sequence[float]) -> dict[str, float]:
        """Share of the large matrix multiplication's speed that calls of so many FLOPs reach, round by round."""
        own = 2 * self.size**3
        return spread([flops / s / (own / g) for s, g in zip(seconds, gemm_seconds, strict=True)])
