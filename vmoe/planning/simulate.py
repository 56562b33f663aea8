"""A training step of a real model on the meta device: the memory that it allocates, and what it computes and moves.

Meta tensors have shapes and no values: the real model, autograd and optimizer decide which tensors exist and how long
they are kept. All is in float32; the planner scales it to autocast.
"""

import weakref
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from vmoe.models.factory import is_contrastive, preprocess_config
from vmoe.moe import record_routing
from vmoe.moe.autograd import is_recomputation
from vmoe.moe.experts import Experts
from vmoe.training.config import OptimConfig
from vmoe.training.optim import create_optimizer, is_fused
from vmoe.utils.config import ConfigError


class Tracker(TorchDispatchMode):
    """Follows the storage of every tensor that is made while the mode is on, until it is freed.

    Not counted are the `known` tensors, and those with three dimensions of as many elements as one of the `stacks`.
    """

    def __init__(self, known: Iterable[Tensor] = (), stacks: Collection[int] = ()) -> None:
        super().__init__()
        self.live = self._peak = 0  # bytes
        self.flops = 0  # of matrix multiplications, a multiply-add counted as two
        self.moved = 0  # bytes that all other operations read and write
        self._known, self._stacks = {tensor.untyped_storage()._cdata for tensor in known}, frozenset(stacks)

    def cut(self, freed: int = 0) -> int:
        """`live` when it was largest since the last cut; `freed` bytes of it are freed before the next operation."""
        peak, self._peak = self._peak, self.live - freed
        return peak

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.is_view:
            return out
        outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        for tensor in outputs:
            storage, stacked = tensor.untyped_storage(), tensor.ndim == 3 and tensor.numel() in self._stacks
            if storage._cdata not in self._known and not stacked:
                self._known.add(storage._cdata)
                self.live += storage.nbytes()
                weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        self._peak = max(self._peak, self.live)
        if formula := flop_registry.get(func._overloadpacket):
            self.flops += formula(*args, **kwargs, out_val=out)
        else:
            touched = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)] + outputs
            self.moved += sum(tensor.nbytes for tensor in touched)
        return out


class FusedAttention(TorchFunctionMode):
    """Attention that keeps what fused kernels of GPUs keep: the output and one number per query and head."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        mask = kwargs.get("attn_mask")
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*args[:3], attn_mask=mask)[0]


@dataclass(frozen=True)
class Step:
    """Forward and backward pass of one process that holds all experts, in float32, without weights and optimizer."""

    # Before each gradient becomes ready: bytes of (activations at their peak, the experts' gradients, other gradients).
    peaks: list[tuple[int, int, int]]
    flops: int  # of matrix multiplications
    moved: int  # bytes that all other operations read and write
    exchanges: list[int]  # bytes that one process sends in each all-to-all if experts lie in several


def simulate_step(model: nn.Module, batch_size: int, loss: str = "softmax", num_processes: int = 1) -> Step:
    """The forward and backward pass of one process on `batch_size` images (pairs), of a meta model in training mode.

    A contrastive loss compares with the features of all processes.
    """
    layers = [module for module in model.modules() if isinstance(module, Experts)]
    experts = {id(parameter): parameter.numel() for layer in layers for parameter in layer.parameters()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter)  # exists already, so that only `ready` counts it
    known = [*model.parameters(), *model.buffers(), *(parameter.grad for parameter in trained)]
    tracker, ready, peaks, exchanges = Tracker(known, experts.values()), {True: 0, False: 0}, [], []

    def gradient_ready(parameter: nn.Parameter) -> None:
        expert = id(parameter) in experts
        # Until now this gradient was one of the activations, where experts' gradients are not counted.
        peaks.append((tracker.cut(freed=0 if expert else parameter.nbytes), ready[True], ready[False]))
        ready[expert] += parameter.nbytes

    def note(layer: Experts, args: tuple, out: Tensor) -> None:
        rows, count_E, max_count = (*args, None)[:3]
        even = -(-rows.shape[0] // len(count_E))  # without a capacity an even load is assumed
        number = len(count_E) * (even if max_count is None else max_count)
        sizes = [number * tensor.shape[1] * tensor.element_size() for tensor in (rows, out)]
        exchanges.extend(sizes if is_recomputation() else sizes + sizes[::-1])  # forward, and backward once

    hooks = [parameter.register_post_accumulate_grad_hook(gradient_ready) for parameter in trained]
    hooks += [layer.register_forward_hook(note) for layer in layers]
    try:
        with tracker, FusedAttention():
            batch = [torch.empty(batch_size, *preprocess_config(model)["input_size"], device="meta")]
            if is_contrastive(model):
                batch.append(torch.empty(batch_size, model.context_length, dtype=torch.long, device="meta"))
            with record_routing(model) as record:
                output = model(*batch)
            total = task_loss(output, loss, num_processes) + record.auxiliary_loss()
            del output, record
            # Checkpointing runs blocks again in the backward pass; torch.autograd.backward would leave the mode.
            ones = torch.ones_like(total)
            _engine_run_backward((total,), (ones,), False, False, (), allow_unreachable=True, accumulate_grad=True)
    finally:
        for hook in hooks:
            hook.remove()
        model.zero_grad(set_to_none=True)
    peaks.append((0, ready[True], ready[False]))
    return Step(peaks, tracker.flops, tracker.moved, exchanges)


def task_loss(output: Tensor | tuple | dict, loss: str, num_processes: int = 1) -> Tensor:
    """The loss as in `vmoe.training.objectives`, with copies of the features instead of other processes'."""

    def cross_entropy(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits, torch.zeros(logits.shape[0], dtype=torch.long, device=logits.device))

    if isinstance(output, Tensor):
        return cross_entropy(output.float())
    values = output.values() if isinstance(output, dict) else output
    image_BC, text_BC, scale = [value.float() for value in values if value is not None][:3]
    logits = scale * image_BC @ torch.cat([text_BC] * num_processes).T
    if loss == "sigmoid":
        return -F.logsigmoid(torch.ones_like(logits) * logits).sum()
    return (cross_entropy(logits) + cross_entropy(scale * text_BC @ torch.cat([image_BC] * num_processes).T)) / 2


def optimizer_state(model: nn.Module, config: OptimConfig) -> dict[int, int]:
    """{id of a parameter of a meta model: bytes that the optimizer of a config keeps for it}, found by taking steps."""
    if is_fused(config):  # which needs a real device
        config = replace(config, kwargs={**config.kwargs, "fused": False})
    optimizer = create_optimizer(model, config)
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
    try:
        for _ in range(int(optimizer.param_groups[0].get("lookahead_k", 1))):  # the last of them makes Lookahead's own
            optimizer.step()
    except (RuntimeError, NotImplementedError) as error:
        reason = f"because its step reads values ({error}); plan with a relative, such as adamw"
        raise ConfigError(f"optim.name {config.name!r} cannot be planned, {reason}") from error
    finally:
        model.zero_grad(set_to_none=True)
    return {
        id(owner): sum(value.nbytes for value in values.values() if isinstance(value, Tensor))
        for owner, values in getattr(optimizer, "base_optimizer", optimizer).state.items()
    }
