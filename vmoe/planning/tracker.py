"""Counts what PyTorch operations allocate and how long they should take; on the meta device, without doing any of them.

On meta tensors every operation runs as it would on a GPU, with shapes alone: the real model, autograd and optimizer say
themselves which tensors they make and how long they keep them.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import vmoe.models.flops  # noqa: F401  (completes the registry)
from vmoe.planning.hardware import Hardware

HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class WeightWork:
    """Time of an operation on the weights or gradients of experts, which depends on how many a process has.

    Attributes:
        products: seconds that the products take.
        rows: seconds for reading and writing all but the weights.
        weights: seconds for reading and writing these.
    """

    products: float
    rows: float
    weights: float


class Tracker(TorchDispatchMode):
    """Follows the storage of every tensor that is made while the mode is on, until it is freed.

    Args:
        hardware: for the time of the operations.
        expert_sizes: numbers of elements of the stacked parameters of experts. Tensors of these sizes and three axes
            are such weights, their gradients and copies: they get the label "expert_weights" unless they have another,
            and work on them is kept apart.

    Attributes:
        label: kind of the storages that are made from now on; see `labelled`.
        live: {label: bytes} that exist now.
        flops: floating-point operations so far, a multiply-add counted as two; products only.
        seconds: {"products", "memory", "launches": seconds} of the operations so far, by what bounds each (a roofline),
            without those on experts' weights.
        weight_work: these.
    """

    def __init__(self, hardware: Hardware, expert_sizes: Collection[int] = ()) -> None:
        super().__init__()
        self.hardware = hardware
        self.expert_sizes = frozenset(expert_sizes)
        self.label = "activations"
        self.live: Counter[str] = Counter()
        self.flops = 0
        self.seconds: Counter[str] = Counter()
        self.weight_work: list[WeightWork] = []
        self._storages: dict[int, tuple[str, int, weakref.ref]] = {}
        self._total = 0
        self._largest = -1
        self._peak: dict[str, int] = {}
        self._known: dict[tuple, list[tuple]] = {}
        self._functional: dict[object, bool] = {}
        self._bandwidth = hardware.memory_bandwidth * 1e9 * hardware.memory_efficiency

    @contextmanager
    def labelled(self, label: str) -> Iterator[None]:
        """Storages made inside the block are of this kind."""
        before, self.label = self.label, label
        try:
            yield
        finally:
            self.label = before

    def own(self, tensors: Iterable[Tensor], label: str) -> None:
        """Count storages that exist already, or call known ones by another label."""
        for tensor in tensors:
            self._register(tensor, label)
            key = tensor.untyped_storage()._cdata
            before, size, reference = self._storages[key]
            self.live[before] -= size
            self.live[label] += size
            self._storages[key] = (label, size, reference)

    def cut(self) -> dict[str, int]:
        """`live` when its sum was largest since the last cut."""
        peak = self._peak
        self._largest = -1
        self._update_peak()
        return peak

    def _register(self, tensor: Tensor, label: str) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            return
        size = storage.nbytes()
        if label == "activations" and self._is_expert_weight(tensor):
            label = "expert_weights"
        self._storages[key] = (label, size, weakref.ref(storage, lambda _: self._free(key)))
        self.live[label] += size
        self._total += size

    def _free(self, key: int) -> None:
        label, size, _ = self._storages.pop(key)
        self.live[label] -= size
        self._total -= size

    def _update_peak(self) -> None:
        if self._total > self._largest:
            self._largest, self._peak = self._total, dict(self.live)

    def _is_expert_weight(self, tensor: Tensor) -> bool:
        return tensor.ndim == 3 and tensor.numel() in self.expert_sizes

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.is_view:
            return func(*args, **kwargs)
        out = self._run(func, args, kwargs)
        outputs = list(_tensors((out,)))
        for tensor in outputs:
            self._register(tensor, self.label)
        self._update_peak()
        self._count_time(func, args, kwargs, out, [*_tensors(args), *_tensors(kwargs.values()), *outputs])
        return out

    def _run(self, func, args, kwargs):
        """The operation; on the meta device the same one on the same shapes is asked only once what it gives.

        Blocks repeat, and most meta kernels are slow Python.
        """
        if not self._is_functional(func):
            return func(*args, **kwargs)
        try:
            key = (func, _signature(args), _signature(tuple(kwargs.items())))
            known = self._known.get(key)
        except TypeError:  # an argument that cannot be compared
            return func(*args, **kwargs)
        if known is not None:
            out = tuple(_made_again(one) for one in known)
            return out if len(out) > 1 else out[0]
        out = func(*args, **kwargs)
        outputs = out if isinstance(out, tuple) else (out,)
        if outputs and all(isinstance(one, Tensor) and one.is_meta for one in outputs):
            # Some, such as _unsafe_view, share a storage without saying so.
            before = {one.untyped_storage()._cdata for one in (*_tensors(args), *_tensors(kwargs.values()))}
            if before.isdisjoint(one.untyped_storage()._cdata for one in outputs):
                self._known[key] = [(one.shape, one.stride(), one.dtype) for one in outputs]
        return out

    def _is_functional(self, func) -> bool:
        """The operation changes none of its arguments and gives no view of them."""
        if func not in self._functional:
            schema = func._schema
            aliases = any(item.alias_info is not None for item in (*schema.arguments, *schema.returns))
            self._functional[func] = not (schema.is_mutable or aliases)
        return self._functional[func]

    def _count_time(self, func, args, kwargs, out, touched: list[Tensor]) -> None:
        hardware, rows, weights, products = self.hardware, 0, 0, 0.0
        for tensor in touched:
            size = tensor.numel() * tensor.element_size()
            if self._is_expert_weight(tensor):
                weights += size
            else:
                rows += size
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            flops = formula(*args, **kwargs, out_val=out)
            self.flops += flops
            peak = hardware.half_tflops if touched[-1].dtype in HALF else hardware.float32_tflops
            products = flops / (peak * 1e12 * hardware.product_efficiency)
        if weights:
            self.weight_work.append(WeightWork(products, rows / self._bandwidth, weights / self._bandwidth))
            return
        seconds = {"products": products, "memory": rows / self._bandwidth, "launches": hardware.launch * 1e-6}
        bound = max(seconds, key=seconds.__getitem__)
        self.seconds[bound] += seconds[bound]


def _tensors(values: Iterable) -> Iterator[Tensor]:
    """The tensors among arguments or results of an operation."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value)


def _signature(value):
    """What the shapes of an operation's results may depend on, of its arguments; can be a dictionary's key."""
    if isinstance(value, Tensor):
        return (value.shape, value.stride(), value.dtype, value.device)
    if isinstance(value, (tuple, list)):
        return tuple(_signature(one) for one in value)
    return (type(value), value)  # 1, 1.0 and True give different types


def _made_again(known: tuple) -> Tensor:
    shape, stride, dtype = known
    return torch.empty_strided(shape, stride, dtype=dtype, device="meta")
