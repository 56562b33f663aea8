"""Records of what the sparse layers of a model did inside `record_routing`. Nothing is kept on the modules.

Shapes, by suffix: G groups, N tokens in a group, E experts, K choices, B and T batch and length of the input.
"""

import math
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from vmoe.moe.autograd import is_recomputation, needs_operators
from vmoe.moe.groups import TokenGroups
from vmoe.moe.losses import AuxiliaryLosses, entropy_of
from vmoe.moe.router import Routing


@dataclass(frozen=True)
class LayerRouting:
    """The routing of one call of one sparse layer.

    Losses and statistics are computed when they are first read, so that the layer does the same whether or not it is
    recorded: activation checkpointing runs it again when the record is long closed.

    Attributes:
        routing: the gate's decisions.
        expert_index: (G, N, K) chosen experts, best first; all of them (K = E) where experts or slots choose.
        combine_weights: (G, N, K) their weights (with the noise, in training); where experts or slots choose without a
            gradient, and zero for experts that did not take the token.
        kept: (G, N, K) bool, the expert had capacity for the token.
        groups: how the tokens lie in (G, N).
        loss_function: the layer's weighted losses.
        learns: the layer is in training and its gate is not frozen.
        attached: the layer adds the gradients of its losses itself (`auxiliary_loss="attach"`).
        backend: what computed the experts: "reference" or "triton".
    """

    routing: Routing
    expert_index: Tensor
    combine_weights: Tensor
    kept: Tensor
    groups: TokenGroups
    loss_function: AuxiliaryLosses
    learns: bool
    attached: bool
    backend: str

    @property
    def gates(self) -> Tensor:
        """(G, N, E) softmax of the gate's logits, without noise; zero for experts of an ensemble's other members."""
        return self.routing.over_all_experts(self.routing.gates_GNE)

    @property
    def mask(self) -> Tensor:
        """(G, N) bool, False for padding."""
        return torch.ones_like(self.kept[..., 0]) if self.groups.mask_GN is None else self.groups.mask_GN

    @property
    def modality(self) -> Tensor | None:
        """(G, N) index into `modalities`, or None where there is only the first of them."""
        return self.groups.modality_GN

    @property
    def batch_shape(self) -> tuple[int, int]:
        """(B, T) of the layer's input; see `tokens`."""
        *batch, length = self.groups.leading or (1,)
        return math.prod(batch), length

    @property
    def modalities(self) -> tuple[str, ...]:
        """Names of the modalities, such as ("image", "text")."""
        return self.groups.modalities

    @property
    def mask_by_modality(self) -> dict[str, Tensor]:
        """{modality: (G, N) bool, its real tokens}."""
        return {name: self.mask if own_GN is None else own_GN for name, own_GN in self.groups.mask_by_modality.items()}

    def tokens(self, grouped: Tensor) -> Tensor:
        """A (G, N, ...) tensor of this record in the call's own order, (B, T, ...)."""
        return self.groups.ungroup(grouped).view(*self.batch_shape, *grouped.shape[2:])

    def by_image(self, grouped_GNK: Tensor) -> Tensor:
        """A (G, N, K) tensor in the order of the images, (B, T, K); of an ensemble's M copies together, (B, T, M·K)."""
        return self.tokens(grouped_GNK).unflatten(0, (-1, self.groups.ensemble_size)).transpose(1, 2).flatten(2)

    def _compute(self, weighted: bool) -> dict[str, Tensor]:
        # With a graph wherever the forward pass had one, also if the first who asks does so without gradients.
        gates = self.routing.gates_GNE
        leave = torch.is_inference_mode_enabled() and not gates.is_inference()
        with torch.inference_mode(False) if leave else nullcontext(), torch.set_grad_enabled(gates.requires_grad):
            return self.loss_function.compute(self.routing, self.groups, weighted)

    @cached_property
    def _weighted(self) -> dict[str, Tensor]:
        return self._compute(weighted=True)

    @property
    def auxiliary_loss(self) -> Tensor:
        """Scalar, the weighted sum of the losses."""
        return self._weighted["auxiliary_loss"]

    @cached_property
    def losses(self) -> dict[str, Tensor]:
        """{name: scalar} unweighted and differentiable; those with a weight of zero carry no gradient."""
        found = self._weighted | self._compute(weighted=False)
        return {name: loss for name, loss in found.items() if name != "auxiliary_loss"}

    @property
    def load(self) -> Tensor:
        """(E,) kept rows of each expert."""
        return self.counts["load"]

    @property
    def load_by_modality(self) -> dict[str, Tensor]:
        """{modality: (E,) kept rows of each expert}."""
        return {
            name: self.counts["load" if self.modality is None else f"{name}/load"] for name in self.mask_by_modality
        }

    @cached_property
    def metrics(self) -> dict[str, Tensor]:
        """{name: scalar} without gradient: the losses, their weighted sum "auxiliary_loss", and statistics.

        The latter are "share_dropped" (of the assignments; where experts choose, of the tokens that none took),
        "load_max_over_mean", "experts_without_tokens" and "gate_entropy" (nats); by modality too, if there are several.
        """
        return {**statistics_of(self.counts), **self.means}

    @cached_property
    @torch.no_grad()
    def counts(self) -> dict[str, Tensor]:
        """Sums over tokens for `statistics_of`, by modality too, where there are several ("text/load"): "load" (E,),
        "assignments" requested, how many of these were "kept" (where experts choose: tokens, and those that some expert
        took), "tokens" and "gate_entropy"."""
        masks = {"": self.mask}
        if self.modality is not None:
            masks |= {f"{name}/": own_GN for name, own_GN in self.mask_by_modality.items()}
        return {f"{of}{name}": value for of, own in masks.items() for name, value in self._counts(own).items()}

    @property
    def means(self) -> dict[str, Tensor]:
        """The rest of the metrics: the losses, without gradient."""
        return {name: loss.detach() for name, loss in (self.losses | self._weighted).items()}

    def _counts(self, own_GN: Tensor) -> dict[str, Tensor]:
        kept_GNK, tokens = self.kept & own_GN[..., None], own_GN.sum()
        load_E = torch.zeros(self.gates.shape[-1], dtype=torch.long, device=own_GN.device)
        load_E = load_E.scatter_add(0, self.expert_index.flatten(), kept_GNK.flatten().long())
        asked, kept = tokens * self.kept.shape[-1], load_E.sum()
        if self.routing.chosen_GNK is not None:  # what the router itself gave up is not dropped
            asked = (self.routing.chosen_GNK & own_GN[..., None]).sum()
        if not self.routing.per_token:
            asked, kept = tokens, kept_GNK.any(-1).sum()
        entropy = torch.where(own_GN, entropy_of(self.gates), 0).sum()
        return {"load": load_E, "assignments": asked, "kept": kept, "tokens": tokens, "gate_entropy": entropy}


def statistics_of(counts: dict[str, Tensor]) -> dict[str, Tensor]:
    """The statistics of `LayerRouting.metrics` from `LayerRouting.counts`, or their sum over calls or processes."""
    statistics = {}
    for of in [name.removesuffix("load") for name in counts if name.endswith("load")]:
        load_E = counts[f"{of}load"]
        statistics |= {
            f"{of}share_dropped": 1 - counts[f"{of}kept"] / counts[f"{of}assignments"].clamp(min=1),
            f"{of}load_max_over_mean": load_E.max() / load_E.float().mean().clamp(min=1 / len(load_E)),
            f"{of}experts_without_tokens": (load_E == 0).sum(),
            f"{of}gate_entropy": counts[f"{of}gate_entropy"] / counts[f"{of}tokens"].clamp(min=1),
        }
    return statistics


class RoutingRecord:
    """What `record_routing` yields; `calls` lists (layer name, LayerRouting) of every call inside the block."""

    def __init__(self, model: nn.Module) -> None:
        model = unwrap(model)
        self.names = {
            module: ".".join(part for part in name.split(".") if part not in WRAPPERS)
            for name, module in model.named_modules()
            if isinstance(vars(module).get("losses"), AuxiliaryLosses)  # the sparse layers themselves
        }
        self.calls: list[tuple[str, LayerRouting]] = []
        self.thread = threading.get_ident()

    @property
    def layers(self) -> dict[str, LayerRouting]:
        """{layer name: its last call} in the order of the model."""
        last = dict(self.calls)
        return {name: last[name] for name in self.names.values() if name in last}

    def auxiliary_loss(self) -> Tensor:
        """Weighted auxiliary losses, summed over all calls of the layers; a differentiable scalar, zero without layers.

        Layers that attach their losses count without a gradient. RuntimeError: no sparse layer of the model ran inside
        the block, or one whose gate learns ran without gradients.
        """
        expected = torch.is_grad_enabled()
        if not self.calls:
            if expected and any(layer.training for layer in self.names):
                raise RuntimeError(
                    "no sparse layer of the recorded model ran inside the block: call the model itself there "
                    "(replicas of torch.nn.DataParallel are not recorded; use DistributedDataParallel)"
                )
            return torch.zeros(())
        losses = []
        for name, routing in self.calls:
            weighted = len(routing._weighted) > 1  # beside their sum
            if expected and weighted and routing.learns and not routing.gates.requires_grad:
                raise RuntimeError(
                    f"the auxiliary loss of {name} has no gradient, because its forward pass ran under torch.no_grad() "
                    "or in re-entrant activation checkpointing: use checkpoint(..., use_reentrant=False), or read "
                    "the loss under torch.no_grad() too"
                )
            losses.append(routing.auxiliary_loss.detach() if routing.attached else routing.auxiliary_loss)
        return torch.stack(losses).sum()


# Names that wrappers of PyTorch put into the path of a module.
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def unwrap(model: nn.Module) -> nn.Module:
    """The model that a user knows, inside torch.compile and data parallelism."""
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return unwrap(model.module)
    inner = getattr(model, "_orig_mod", None)
    return unwrap(inner) if isinstance(inner, nn.Module) else model


_ACTIVE: list[RoutingRecord] = []


@contextmanager
def record_routing(model: nn.Module) -> Iterator[RoutingRecord]:
    """Record the routing of every sparse layer of `model` that runs inside the block, in the same thread.

    Example:
        with vmoe.record_routing(model) as record:
            loss = criterion(model(images), labels) + record.auxiliary_loss()
        record.layers["blocks.1.mlp"].load

    The model may be wrapped by `torch.compile` or DDP; layer names are those of the inner module. The record holds the
    graph of the losses until it is dropped.
    """
    record = RoutingRecord(model)
    _ACTIVE.append(record)
    try:
        yield record
    finally:
        _ACTIVE.remove(record)


def active_records(layer: nn.Module) -> list[RoutingRecord]:
    """The records that this call of `layer` belongs to: those of this thread (compiled code does not know its own)."""
    if not _ACTIVE or is_recomputation():
        return []
    own = [record for record in _ACTIVE if layer in record.names]
    return own if torch.compiler.is_compiling() else [one for one in own if one.thread == threading.get_ident()]


_WARNED = False
LIBRARIES = ("vmoe", "timm", "open_clip", "torch")  # the warning points at the call of a model from outside of them


def warn_of_lost_losses() -> None:
    """Says once per process that the losses of a layer reach no gradient."""
    if torch.compiler.is_dynamo_compiling():  # said while compiling: neither in the graph nor in its guards
        from torch._dynamo.comptime import comptime

        comptime(_warn_once)
    elif not torch.compiler.is_compiling():  # an export does not train
        _warn_once()


def _warn_once(_context: object = None) -> None:
    global _WARNED
    if _WARNED or torch._C._current_graph_task_id() != -1:  # in a backward pass layers run again, maybe compiled
        return
    _WARNED = True
    level, frame = 1, sys._getframe()
    while frame.f_back and frame.f_globals.get("__name__", "torch").partition(".")[0] in LIBRARIES:
        level, frame = level + 1, frame.f_back
    warnings.warn(
        "a sparse layer trains without its auxiliary losses: add record.auxiliary_loss() of "
        "`with vmoe.record_routing(model) as record` to the loss, or build the model with auxiliary_loss='attach', "
        "which needs nothing else (docs/integrations.md); to train without them, set their weights to 0",
        stacklevel=level,
    )


# In a tensor, so that compiled code reads its present value.
_ATTACHED_SCALE = torch.ones(())


def set_auxiliary_loss_scale(scale: float) -> None:
    """Scale of the gradients that layers with `auxiliary_loss="attach"` add, from the next forward pass on; 1 at first.

    It is whatever the training loop multiplies its own loss with: 1 / accumulation steps, `scaler.get_scale()`...
    """
    if not math.isfinite(scale):
        raise ValueError(f"the auxiliary loss scale must be finite, got {scale}")
    _ATTACHED_SCALE.fill_(scale)


class _AttachLoss(torch.autograd.Function):
    @staticmethod
    def forward(y: Tensor, loss: Tensor, scale: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx, grad_y: Tensor):
        (scale,) = ctx.saved_tensors
        return grad_y, scale, None


class _AttachLossTransformed(_AttachLoss):
    """For vmap and forward mode; torch.compile refuses what has a jvp."""

    generate_vmap_rule = True

    @staticmethod
    def jvp(ctx, y: Tensor, *_: Tensor) -> Tensor:
        return y.view_as(y)


def attach_loss(y: Tensor, loss: Tensor) -> Tensor:
    """`y` itself, whose backward pass also starts that of `loss`, with the gradient of `set_auxiliary_loss_scale`."""
    # A copy, so that the scale may be changed for the next forward pass before this one's backward.
    function = _AttachLossTransformed if needs_operators() else _AttachLoss
    return function.apply(y, loss, _ATTACHED_SCALE.to(loss.device, loss.dtype, copy=True))
