"""One training step of a real model on the meta device: what it allocates, and how long it should take.

The forward pass, the losses, the backward pass and the optimizer are those of training. What the meta device lacks is
put in here: autocast, fused attention, and the other processes.

Shapes, by suffix: B batch of one process, C embedding width, R rows, D width.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode

import vmoe
from vmoe.distributed.expert_parallel import ExpertExchange
from vmoe.evaluation.inference import PRECISIONS
from vmoe.models.factory import is_contrastive, preprocess_config
from vmoe.moe.experts import Experts
from vmoe.moe.grouped import GroupedLinear
from vmoe.moe.grouped_mm import grouped_linear
from vmoe.moe.router import Gate, is_recomputation
from vmoe.moe.soft import SoftRouter
from vmoe.planning.hardware import Hardware
from vmoe.planning.model_plan import unit_names
from vmoe.planning.tracker import Tracker, WeightWork
from vmoe.training.config import OptimConfig
from vmoe.training.optim import create_optimizer
from vmoe.utils.config import ConfigError

# What CUDA's autocast computes in the lower type. Norms, softmax and losses stay in float32, as they are fed with it.
PRODUCTS = {
    F.linear: 2,
    F.conv2d: 2,
    torch.ops.vmoe.rows_by_matrices.default: 2,
    torch.matmul: 2,
    Tensor.matmul: 2,
    Tensor.__matmul__: 2,
    torch.bmm: 2,
    torch.einsum: 3,
}


@dataclass(frozen=True)
class Moment:
    """Where in a step a peak was.

    Attributes:
        unit: index in `vmoe.planning.model_plan.unit_names` of what worked.
        phase: "forward", "backward", or "reduce" (its last gradient has just become ready).
        ready: bytes of its gradients that were ready.
        rest_ready: bytes of the last unit's that were.
    """

    unit: int
    phase: str
    ready: int
    rest_ready: int


@dataclass(frozen=True)
class Step:
    """What a forward and backward pass of one process takes, without weights and optimizer.

    Attributes:
        peaks: {label: bytes} at the moments when most was there, one between any two gradients that become ready.
            Labels: "activations", "loss", "input", "all_to_all" (rows of other processes), "copies" and "expert_copies"
            (weights in the lower precision), "gradients" and "expert_gradients", and "expert_weights" (gradients of
            experts that are not ready yet).
        moments: where each of the peaks was.
        flops: floating-point operations, forward and backward.
        work: {"products", "memory", "launches": seconds}, see `Tracker`; without `weight_work`.
        weight_work: operations on the experts' weights.
        exchanges: bytes that one process sends in each all-to-all, its share for itself among them.
        ep: processes over which the experts are spread.
    """

    peaks: list[dict[str, int]]
    moments: list[Moment]
    flops: int
    work: dict[str, float]
    weight_work: list[WeightWork]
    exchanges: list[int]
    ep: int

    def seconds(self, ep: int, launch: float) -> dict[str, float]:
        """{"products", "memory", "launches": seconds} if the experts were spread over `ep` processes.

        Args:
            ep: as `self.ep`, 1 or more than 1.
            launch: seconds that any operation takes at least.
        """
        seconds = Counter(self.work)
        for work in self.weight_work:
            parts = {"products": work.products, "memory": work.rows + work.weights * self.ep / ep, "launches": launch}
            bound = max(parts, key=parts.__getitem__)
            seconds[bound] += parts[bound]
        return {part: seconds[part] for part in ("products", "memory", "launches")}


class Meta(TorchFunctionMode):
    """Autocast and fused attention for the meta device.

    Args:
        dtype: of autocast; None: none.
        tracker: is told which storages are copies of weights.
    """

    def __init__(self, dtype: torch.dtype | None, tracker: Tracker) -> None:
        super().__init__()
        self.dtype = dtype
        self.tracker = tracker
        self.exact = 0  # > 0 inside a router, which always computes in float32
        self.copies: dict[int, Tensor] = {}  # autocast keeps those of weights until the forward pass is over

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            query, key, value = (self.lower(tensor) for tensor in args[:3])
            mask = kwargs.get("attn_mask")
            mask = None if mask is None else mask.to(query.dtype)
            # Keeps what the fused kernels of GPUs keep: the output and one number per query and head.
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, attn_mask=mask)[0]
        if func in PRODUCTS:
            args = tuple(self.lower(arg) if isinstance(arg, Tensor) else arg for arg in args)
            if isinstance(kwargs.get("bias"), Tensor):
                kwargs = {**kwargs, "bias": self.lower(kwargs["bias"])}
        return func(*args, **kwargs)

    def lower(self, tensor: Tensor, label: str = "copies") -> Tensor:
        """The tensor in the type of autocast."""
        if self.dtype is None or self.exact or tensor.dtype != torch.float32:
            return tensor
        if not isinstance(tensor, nn.Parameter):
            return tensor.to(self.dtype)
        if label == "copies" and id(tensor) in self.copies:
            return self.copies[id(tensor)]
        with self.tracker.labelled(label):
            copied = tensor.to(self.dtype)
        if label == "copies" and not is_recomputation():
            self.copies[id(tensor)] = copied
        return copied


class _Send(torch.autograd.Function):
    """As many rows come back as are sent, forward and backward: an all-to-all of equal shares."""

    @staticmethod
    def forward(ctx, rows: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.send(rows)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return ctx.exchange.send(grad), None


class Exchange(ExpertExchange):
    """The exchange of rows of expert parallelism, with the other processes left out.

    Where the counts are unknown (nothing is dropped) an even load is assumed.
    """

    def __init__(self, num_processes: int, meta: Meta) -> None:
        self.num_processes = num_processes
        self.meta, self.tracker = meta, meta.tracker
        self.sent: list[int] = []

    def __call__(self, run: Callable, x_RD: Tensor, count_E: Tensor, max_count: int | None) -> Tensor:
        def labelled_run(rows: Tensor, counts: Tensor) -> Tensor:
            rows = self.meta.lower(rows)  # else the experts' first layer would do it
            with self.tracker.labelled("activations"):
                return run(rows, counts)

        with self.tracker.labelled("all_to_all"):
            even = -(-x_RD.shape[0] // len(count_E))
            return super().__call__(labelled_run, x_RD, count_E, even if max_count is None else max_count)

    def _largest(self, number: int) -> int:
        return number

    def _all_to_all(self, rows: Tensor, received_P: list[int] | None, sent_P: list[int] | None) -> Tensor:
        return _Send.apply(rows.contiguous(), self)

    def send(self, rows: Tensor) -> Tensor:
        """What comes back, of the size of what was sent."""
        self.sent.append(rows.numel() * rows.element_size())
        with self.tracker.labelled("all_to_all"):
            return torch.empty_like(rows)


def local_experts(model: nn.Module, num_processes: int) -> nn.Module:
    """A copy of a meta model with the experts of one process out of `num_processes`."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, Experts):
            for part in module.modules():
                for name, parameter in part.named_parameters(recurse=False):
                    shape = (parameter.shape[0] // num_processes, *parameter.shape[1:])
                    local = torch.empty(shape, dtype=parameter.dtype, device="meta")
                    setattr(part, name, nn.Parameter(local, requires_grad=parameter.requires_grad))
    return model


def expert_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The stacked parameters of all experts."""
    return [parameter for layer in model.modules() if isinstance(layer, Experts) for parameter in layer.parameters()]


def simulate_step(
    model: nn.Module,
    batch_size: int,
    hardware: Hardware,
    precision: str = "float32",
    loss: str = "softmax",
    num_processes: int = 1,
    ep: int = 1,
) -> Step:
    """The forward and backward pass of one process.

    Args:
        model: on the meta device, in training mode, whole; set its activation checkpointing as it shall be.
        batch_size: pictures (pairs) of this process.
        hardware: for the times.
        precision: "float32", "bf16" or "fp16".
        loss: of an image-text model: "softmax" or "sigmoid".
        num_processes: of all, whose features a contrastive loss compares.
        ep: processes over which the experts are spread.
    """
    model = local_experts(model, ep) if ep > 1 else model
    experts = {id(parameter): parameter.numel() for parameter in expert_parameters(model)}
    tracker = Tracker(hardware, experts.values())
    meta = Meta(PRECISIONS[precision], tracker)
    exchange = Exchange(ep, meta) if ep > 1 else None
    tracker.own(model.parameters(), "weights")
    tracker.own(model.buffers(), "weights")
    peaks: list[dict[str, int]] = []
    moments: list[Moment] = []
    names = unit_names(model)
    units = [model.get_submodule(name) for name, _ in names]
    owner: dict[int, int] = {}  # {id of a parameter: index of its unit}
    for index, unit in enumerate(units):
        for parameter in unit.parameters():
            owner.setdefault(id(parameter), index)
    ready = [0] * len(units)
    unready = Counter(owner[id(parameter)] for parameter in model.parameters() if parameter.requires_grad)

    def note(index: int, phase: str, peak: dict[str, int]) -> None:
        peaks.append(peak)
        moments.append(Moment(index, phase, ready[index], ready[-1]))

    def gradient_ready(parameter: nn.Parameter) -> None:
        index = owner[id(parameter)]
        tracker.own([parameter.grad], "expert_gradients" if id(parameter) in experts else "gradients")
        note(index, "backward", tracker.cut())
        ready[index] += parameter.grad.numel() * parameter.grad.element_size()
        unready[index] -= 1
        if unready[index] == 0:
            note(index, "reduce", dict(tracker.live))

    def before(index: int) -> None:
        """The unit begins: until now the one around it worked."""
        parent = index + 1 if names[index][1] else len(units) - 1
        note(parent, "backward" if is_recomputation() else "forward", tracker.cut())

    def after(index: int) -> None:
        note(index, "backward" if is_recomputation() else "forward", tracker.cut())

    undo: list[Callable[[], object]] = []
    for index, unit in enumerate(units[:-1]):
        undo.append(unit.register_forward_pre_hook(lambda *_, index=index: before(index)).remove)
        undo.append(unit.register_forward_hook(lambda *_, index=index: after(index)).remove)
    for parameter in model.parameters():
        if parameter.requires_grad:
            undo.append(parameter.register_post_accumulate_grad_hook(gradient_ready).remove)
    undo += _adapt_layers(model, meta, exchange)
    try:
        with tracker:
            with tracker.labelled("input"):
                batch = _inputs(model, batch_size)
            with meta, vmoe.record_routing(model) as record:
                output = model(*batch)
            meta.copies.clear()
            with tracker.labelled("loss"):
                total = task_loss(output, loss, num_processes) + record.auxiliary_loss()
            del output
            # Checkpointing runs blocks again in the backward pass, in the mode; Tensor.backward would leave it.
            gradient = torch.ones_like(total)
            with meta:
                _engine_run_backward(
                    (total,), (gradient,), False, False, (), allow_unreachable=True, accumulate_grad=True
                )
        note(len(units) - 1, "backward", tracker.cut())
        del record, total
    finally:
        for function in undo:
            function()
        for parameter in model.parameters():
            parameter.grad = None
    peaks = [{label: size for label, size in peak.items() if label != "weights"} for peak in peaks]
    sent = [] if exchange is None else exchange.sent
    return Step(peaks, moments, tracker.flops, dict(tracker.seconds), tracker.weight_work, sent, ep)


def _adapt_layers(model: nn.Module, meta: Meta, exchange: Exchange | None) -> list[Callable[[], object]]:
    """What sparse layers need beside `Meta`; returns functions that take it away again."""
    undo: list[Callable[[], object]] = []

    def enter(*_) -> None:
        meta.exact += 1

    def leave(*_) -> None:
        meta.exact -= 1

    for module in model.modules():
        if isinstance(module, (Gate, SoftRouter)):
            undo += [module.register_forward_pre_hook(enter).remove, module.register_forward_hook(leave).remove]
        elif isinstance(module, GroupedLinear):
            module.forward = partial(_grouped_linear, module, meta)
            undo.append(partial(module.__dict__.pop, "forward"))
        elif isinstance(module, Experts) and exchange is not None:
            module.exchange = exchange
            undo.append(partial(module.__dict__.pop, "exchange"))
    return undo


def _grouped_linear(layer: GroupedLinear, meta: Meta, x_RI: Tensor, count_E: Tensor) -> Tensor:
    """As `GroupedLinear.forward` on a GPU: under autocast weights and bias are copied."""
    weight_EOI = meta.lower(layer.weight, "expert_copies")
    bias_EO = None if layer.bias is None else meta.lower(layer.bias, "expert_copies")
    return grouped_linear(meta.lower(x_RI), weight_EOI, bias_EO, count_E)


def _inputs(model: nn.Module, batch_size: int) -> list[Tensor]:
    images = torch.empty(batch_size, *preprocess_config(model)["input_size"], device="meta")
    if not is_contrastive(model):
        return [images]
    return [images, torch.empty(batch_size, model.context_length, dtype=torch.long, device="meta")]


def task_loss(output: Tensor | tuple | dict, loss: str, num_processes: int = 1) -> Tensor:
    """The loss of the task, as in `vmoe.training.tasks`: this process's rows against those of all.

    Args:
        output: of the model.
        loss: "softmax" or "sigmoid", of an image-text model.
        num_processes: of all; the features of the others are as many copies of these.
    """
    if isinstance(output, Tensor):
        return F.cross_entropy(output.float(), _labels(output))
    values = list(output.values()) if isinstance(output, dict) else list(output)
    image_BC, text_BC, scale = (value.float() for value in values[:3])
    bias = values[3].float() if len(values) > 3 and values[3] is not None else None
    losses = []
    pairs = [(image_BC, text_BC), (text_BC, image_BC)] if loss == "softmax" else [(image_BC, text_BC)]
    for own_BC, other_BC in pairs:
        logits = scale * own_BC @ torch.cat([other_BC] * num_processes).T
        if loss == "softmax":
            losses.append(F.cross_entropy(logits, _labels(logits)))
        else:
            logits = logits if bias is None else logits + bias
            losses.append(-F.logsigmoid(torch.ones_like(logits) * logits).sum())
    return torch.stack(losses).mean()


def _labels(logits: Tensor) -> Tensor:
    return torch.zeros(logits.shape[0], dtype=torch.long, device=logits.device)


@dataclass(frozen=True)
class OptimizerMemory:
    """What an optimizer keeps and needs.

    Attributes:
        state: bytes kept for all parameters that are no expert's; expert_state: for the experts'.
        step: bytes that a step needs for a while.
        touched: bytes read and written by a step, from the operations that it is made of.
    """

    state: int
    expert_state: int
    step: int
    touched: float


def simulate_optimizer(model: nn.Module, config: OptimConfig, foreach: bool) -> OptimizerMemory:
    """Makes the optimizer of a config for a meta model and lets it take two steps.

    Args:
        model: on the meta device.
        config: of the optimizer.
        foreach: see `Hardware`.

    Raises:
        ConfigError: the optimizer asks for numbers, which a meta tensor has not.
    """
    # "fused" exists on real devices only; what it keeps is the same, and it needs nothing for a while.
    fused = bool(config.kwargs.get("fused"))
    kwargs = {key: value for key, value in config.kwargs.items() if key != "fused"}
    config = replace(config, kwargs=kwargs)
    experts = {id(parameter) for parameter in expert_parameters(model)}
    optimizer = create_optimizer(model, config)
    tracker = Tracker(Hardware(1, 1, 1, 1, 1, 1, memory_efficiency=1.0, launch=0.0))
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.grad = torch.empty_like(parameter)
    for group in optimizer.param_groups:
        if foreach and group.get("foreach", 0) is None:
            group["foreach"] = True
    tracker.own(trainable, "weights")
    tracker.own((parameter.grad for parameter in trainable), "weights")
    try:
        with tracker, tracker.labelled("optimizer"):
            # The first step makes the state; Lookahead makes its own once in some steps.
            for _ in range(int(optimizer.param_groups[0].get("lookahead_k", 1))):
                optimizer.step()
            tracker.cut()
            before, seconds = sum(tracker.live.values()), sum(tracker.seconds.values())
            optimizer.step()
            step = sum(tracker.cut().values()) - before
            touched = (sum(tracker.seconds.values()) - seconds) * 1e9  # at 1 GB/s
    except (RuntimeError, NotImplementedError) as error:
        raise ConfigError(
            f"optim.name {config.name!r} cannot be planned, because its step looks at numbers ({error}); plan with a "
            "relative, such as adamw"
        ) from error
    finally:
        for parameter in trainable:
            parameter.grad = None
    state, expert_state = 0, 0
    for owner, values in getattr(optimizer, "base_optimizer", optimizer).state.items():
        size = sum(leaf.numel() * leaf.element_size() for leaf in values.values() if isinstance(leaf, Tensor))
        if id(owner) in experts:
            expert_state += size
        else:
            state += size
    return OptimizerMemory(state, expert_state, 0 if fused else step, touched)
