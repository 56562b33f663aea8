"""A training step of a real model on the meta device: the memory that it allocates, and a roofline of its time.

Meta tensors have shapes and no values: the real model, autograd and optimizer decide which tensors exist and how long
they are kept. What the meta device lacks is added here: autocast, and attention as GPUs compute it.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import vmoe
import vmoe.models.flops  # completes flop_registry
from vmoe.evaluation.inference import PRECISIONS
from vmoe.models.factory import is_contrastive, preprocess_config
from vmoe.moe.experts import Experts
from vmoe.moe.grouped import GroupedLinear
from vmoe.moe.grouped_mm import grouped_linear
from vmoe.moe.router import Gate, is_recomputation
from vmoe.moe.soft import SoftRouter
from vmoe.planning.hardware import Hardware
from vmoe.planning.model_plan import expert_parameters
from vmoe.training.config import OptimConfig
from vmoe.training.optim import create_optimizer
from vmoe.utils.config import ConfigError


class Tracker(TorchDispatchMode):
    """Follows the storage of every tensor that is made while the mode is on, until it is freed.

    Args:
        hardware: for the time of the operations.
        expert_sizes: numbers of elements of the experts' stacked weights. Other tensors of these sizes with three
            dimensions are their gradients and copies, which get the label "expert_weights" unless they have another.

    Attributes:
        live: {label: bytes} that exist now.
        flops: of all matrix multiplications so far, a multiply-add counted as two.
        seconds: {"matmul", "memory", "launch": seconds} so far; each operation counts for what bounds it (a roofline).
        expert_bytes: of experts' weights read or written, which are not in `seconds`.
    """

    def __init__(self, hardware: Hardware, expert_sizes: Collection[int] = ()) -> None:
        super().__init__()
        self.hardware, self.expert_sizes, self.label = hardware, frozenset(expert_sizes), "activations"
        self.live, self.seconds = Counter(), Counter()
        self.flops = self.expert_bytes = 0
        self._storages: dict[int, tuple[str, int, weakref.ref]] = {}
        self._peak: dict[str, int] = {}

    @contextmanager
    def labelled(self, label: str):
        """Storages made inside the block are of this kind."""
        before, self.label = self.label, label
        try:
            yield
        finally:
            self.label = before

    def own(self, tensors: Iterable[Tensor], label: str) -> None:
        """Counts storages that exist already, or gives known ones another label."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key in self._storages:
                self.live[self._storages[key][0]] -= size
            self._storages[key] = (label, size, weakref.ref(storage, lambda _, key=key: self._free(key)))
            self.live[label] += size

    def cut(self) -> dict[str, int]:
        """`live` when its sum was largest since the last cut."""
        peak, self._peak = self._peak, dict(self.live)
        return peak

    def _free(self, key: int) -> None:
        label, size, _ = self._storages.pop(key)
        self.live[label] -= size

    def _is_expert_weight(self, tensor: Tensor) -> bool:
        return tensor.ndim == 3 and tensor.numel() in self.expert_sizes

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.is_view:
            return out
        outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        for tensor in outputs:
            if tensor.untyped_storage()._cdata not in self._storages:
                stacked = self.label in ("activations", "expert_rows") and self._is_expert_weight(tensor)
                self.own([tensor], "expert_weights" if stacked else self.label)
        if sum(self.live.values()) > sum(self._peak.values()):
            self._peak = dict(self.live)
        touched = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)] + outputs
        formula = flop_registry.get(func._overloadpacket, lambda *_, **__: 0)
        self._count(touched, formula(*args, **(kwargs or {}), out_val=out))
        return out

    def _count(self, touched: list[Tensor], flops: int) -> None:
        moved = sum(tensor.nbytes for tensor in touched)
        stacked = sum(tensor.nbytes for tensor in touched if self._is_expert_weight(tensor))
        hardware = self.hardware
        half = bool(touched) and touched[-1].dtype in (torch.bfloat16, torch.float16)
        peak = 1e12 * hardware.matmul_efficiency * (hardware.half_tflops if half else hardware.float32_tflops)
        memory = (moved - stacked) / hardware.bytes_per_second
        seconds = {"matmul": flops / peak, "memory": memory, "launch": hardware.launch * 1e-6}
        bound = max(seconds, key=seconds.__getitem__)
        self.seconds[bound] += seconds[bound]
        self.flops += flops
        self.expert_bytes += stacked


# What CUDA's autocast computes in the lower type. Norms, softmax and losses get float32 and stay in it.
AUTOCAST = {F.linear, F.conv2d, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, torch.einsum}


class Autocast(TorchFunctionMode):
    """Autocast to `dtype` (None: none) and fused attention for the meta device; labels the copies of weights."""

    def __init__(self, dtype: torch.dtype | None, tracker: Tracker) -> None:
        super().__init__()
        self.dtype, self.tracker = dtype, tracker
        self.exact = 0  # > 0 inside a router, which computes in float32
        self.copies: dict[int, Tensor] = {}  # autocast keeps those of weights until the forward pass ends

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            query, key, value = map(self.lower, args[:3])
            mask = kwargs.get("attn_mask")
            mask = None if mask is None else mask.to(query.dtype)
            # Keeps what fused kernels of GPUs keep: the output and one number per query and head.
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, attn_mask=mask)[0]
        if func in AUTOCAST:
            args = tuple(map(self.lower, args))
            kwargs = {name: self.lower(value) for name, value in kwargs.items()}
        return func(*args, **kwargs)

    def lower(self, value, label: str = "copies"):
        """A tensor in the type of autocast; other values as they are."""
        if self.dtype is None or self.exact or not isinstance(value, Tensor) or value.dtype != torch.float32:
            return value
        if not isinstance(value, nn.Parameter):
            return value.to(self.dtype)
        if label == "copies" and id(value) in self.copies:
            return self.copies[id(value)]
        with self.tracker.labelled(label):
            copied = value.to(self.dtype)
        if label == "copies" and not is_recomputation():
            self.copies[id(value)] = copied
        return copied

    def grouped_linear(self, layer: GroupedLinear, x_RI: Tensor, count_E: Tensor) -> Tensor:
        """As `GroupedLinear.forward` under autocast."""
        weight_EOI, bias_EO = (self.lower(tensor, "expert_copies") for tensor in (layer.weight, layer.bias))
        return grouped_linear(self.lower(x_RI), weight_EOI, bias_EO, count_E)

    def switch(self, *_, exact: int) -> None:
        """A router begins (1) or ends (-1)."""
        self.exact += exact


@dataclass(frozen=True)
class Step:
    """Forward and backward pass of one process that holds all experts, without weights and optimizer.

    Attributes:
        peaks: {label: bytes} of the largest memory between any two gradients that become ready. Labels: "activations",
            "expert_rows" (activations inside experts), "loss", "input", "copies" and "expert_copies" (weights in the
            lower precision), "gradients" and "expert_gradients", "expert_weights" (gradients of experts that are not
            ready yet).
        flops: floating-point operations, forward and backward.
        seconds: see `Tracker`.
        expert_bytes: see `Tracker`.
        exchanges: bytes that one process sends in each all-to-all if experts lie in several, its own share included.
        padding: rows of these buffers over the rows that are routed.
    """

    peaks: list[dict[str, int]]
    flops: int
    seconds: dict[str, float]
    expert_bytes: int
    exchanges: list[int]
    padding: float


def simulate_step(
    model: nn.Module,
    batch_size: int,
    hardware: Hardware,
    precision: str = "float32",
    loss: str = "softmax",
    num_processes: int = 1,
) -> Step:
    """The forward and backward pass of one process.

    Args:
        model: on the meta device, in training mode, with activation checkpointing set as wanted.
        batch_size: images (pairs) of this process.
        hardware: for the times.
        precision: "float32", "bf16" or "fp16".
        loss: of an image-text model: "softmax" or "sigmoid".
        num_processes: all processes, whose features a contrastive loss compares.
    """
    stacked = expert_parameters(model)
    tracker = Tracker(hardware, [parameter.numel() for parameter in stacked])
    tracker.own([*model.parameters(), *model.buffers()], "weights")
    autocast = Autocast(PRECISIONS[precision], tracker)
    peaks: list[dict[str, int]] = []
    exchanges: list[int] = []
    paddings = [1.0]
    undo = _prepare(model, autocast, exchanges, paddings)

    def gradient_ready(parameter: nn.Parameter, label: str) -> None:
        tracker.own([parameter.grad], label)
        peaks.append(tracker.cut())

    experts = set(map(id, stacked))
    for parameter in model.parameters():
        if parameter.requires_grad:
            label = "expert_gradients" if id(parameter) in experts else "gradients"
            undo.append(parameter.register_post_accumulate_grad_hook(partial(gradient_ready, label=label)).remove)
    try:
        with tracker:
            with tracker.labelled("input"):
                batch = [torch.empty(batch_size, *preprocess_config(model)["input_size"], device="meta")]
                if is_contrastive(model):
                    batch.append(torch.empty(batch_size, model.context_length, dtype=torch.long, device="meta"))
            with autocast, vmoe.record_routing(model) as record:
                output = model(*batch)
            autocast.copies.clear()
            with tracker.labelled("loss"):
                total = task_loss(output, loss, num_processes) + record.auxiliary_loss()
            del output
            # Checkpointing runs blocks again in the backward pass; Tensor.backward would leave the autocast mode.
            ones = torch.ones_like(total)
            with autocast:
                _engine_run_backward((total,), (ones,), False, False, (), allow_unreachable=True, accumulate_grad=True)
        peaks.append(tracker.cut())
    finally:
        for function in undo:
            function()
        model.zero_grad(set_to_none=True)
    return Step(peaks, tracker.flops, dict(tracker.seconds), tracker.expert_bytes, exchanges, max(paddings))


def _prepare(
    model: nn.Module, autocast: Autocast, exchanges: list[int], paddings: list[float]
) -> list[Callable[[], object]]:
    """Tells autocast of routers and experts, and notes what experts would send; returns functions that undo it."""

    def begin(*_) -> None:
        autocast.tracker.label = "expert_rows"

    def note(experts: Experts, args: tuple, out: Tensor) -> None:
        rows, count_E, max_count = (*args, None)[:3]
        even = -(-rows.shape[0] // len(count_E))  # without a capacity an even load is assumed
        number = len(count_E) * (even if max_count is None else max_count)
        autocast.tracker.label = "activations"
        paddings.append(number / rows.shape[0])
        sizes = [number * tensor.shape[1] * tensor.element_size() for tensor in (rows, out)]
        exchanges.extend(sizes if is_recomputation() else sizes + sizes[::-1])  # forward, and backward once

    undo = []
    for module in model.modules():
        if isinstance(module, (Gate, SoftRouter)):
            undo.append(module.register_forward_pre_hook(partial(autocast.switch, exact=1)).remove)
            undo.append(module.register_forward_hook(partial(autocast.switch, exact=-1)).remove)
        elif isinstance(module, GroupedLinear):
            module.forward = partial(autocast.grouped_linear, module)
            undo.append(partial(module.__dict__.pop, "forward"))
        elif isinstance(module, Experts):
            undo.append(module.register_forward_pre_hook(begin).remove)
            undo.append(module.register_forward_hook(note).remove)
    return undo


def task_loss(output: Tensor | tuple | dict, loss: str, num_processes: int = 1) -> Tensor:
    """The loss of the task as in `vmoe.training.tasks`, with copies of the features instead of other processes'."""

    def cross_entropy(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits, torch.zeros(logits.shape[0], dtype=torch.long, device=logits.device))

    if isinstance(output, Tensor):
        return cross_entropy(output.float())
    values = list(output.values()) if isinstance(output, dict) else list(output)
    image_BC, text_BC, scale, bias = (None if value is None else value.float() for value in [*values, None][:4])
    pairs = [(image_BC, text_BC), (text_BC, image_BC)] if loss == "softmax" else [(image_BC, text_BC)]
    losses = []
    for own_BC, other_BC in pairs:
        logits = scale * own_BC @ torch.cat([other_BC] * num_processes).T
        if loss == "softmax":
            losses.append(cross_entropy(logits))
        else:
            logits = logits if bias is None else logits + bias
            losses.append(-F.logsigmoid(torch.ones_like(logits) * logits).sum())
    return torch.stack(losses).mean()


@dataclass(frozen=True)
class OptimizerMemory:
    """What an optimizer keeps for {id of a parameter: bytes}, and the temporary bytes and traffic of a step."""

    state: dict[int, int]
    step: int
    touched: float


def simulate_optimizer(model: nn.Module, config: OptimConfig, foreach: bool) -> OptimizerMemory:
    """Creates the optimizer of a config for a meta model and takes steps; `foreach` as in `Hardware`.

    Raises:
        ConfigError: the optimizer reads values, which a meta tensor has not.
    """
    # "fused" needs a real device; it keeps the same state and needs no temporary memory.
    kwargs = {key: value for key, value in config.kwargs.items() if key != "fused"}
    optimizer = create_optimizer(model, replace(config, kwargs=kwargs))
    tracker = Tracker(Hardware(1, 1, 1, 1, 1, 1, memory_efficiency=1.0, launch=0.0))  # 1 GB/s
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter)
    for group in optimizer.param_groups:
        if foreach and group.get("foreach", 0) is None:
            group["foreach"] = True
    tracker.own([*trained, *(parameter.grad for parameter in trained)], "weights")
    try:
        with tracker, tracker.labelled("optimizer"):
            # The first step creates the state; Lookahead creates its own once in some steps.
            for _ in range(int(optimizer.param_groups[0].get("lookahead_k", 1))):
                optimizer.step()
            tracker.cut()
            before, seconds = sum(tracker.live.values()), sum(tracker.seconds.values())
            optimizer.step()
    except (RuntimeError, NotImplementedError) as error:
        raise ConfigError(
            f"optim.name {config.name!r} cannot be planned, because its step reads values ({error}); plan with a "
            "relative, such as adamw"
        ) from error
    finally:
        model.zero_grad(set_to_none=True)
    state = {
        id(owner): sum(value.nbytes for value in values.values() if isinstance(value, Tensor))
        for owner, values in getattr(optimizer, "base_optimizer", optimizer).state.items()
    }
    step = 0 if config.kwargs.get("fused") else sum(tracker.cut().values()) - before
    return OptimizerMemory(state, step, (sum(tracker.seconds.values()) - seconds) * 1e9)
