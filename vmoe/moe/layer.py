"""The sparse layer: route, dispatch, experts, combine, replacing a transformer block's MLP.

Shapes, by suffix: B batch, T length, D width, G groups, N tokens in a group, E experts, K choices, R rows.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import wraps

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from vmoe.moe.backends import backend_name
from vmoe.moe.config import RoutingSettings, with_preset
from vmoe.moe.dispatch import Capacity, expert_capacity
from vmoe.moe.expert_choice import ExpertChoiceRouter
from vmoe.moe.experts import Experts, Mlp
from vmoe.moe.groups import TokenGroups
from vmoe.moe.losses import AuxiliaryLosses
from vmoe.moe.record import LayerRouting, active_records, attach_loss, warn_of_lost_losses
from vmoe.moe.router import Assignment
from vmoe.moe.soft import SoftRouter
from vmoe.moe.top_k import TopKRouter

ROUTERS = {"top_k": TopKRouter, "expert_choice": ExpertChoiceRouter, "soft": SoftRouter}


def routers_where(trait: str, value: bool) -> str:
    """The routers with a value of `per_token` or `soft`, for messages, such as "router='top_k' or 'expert_choice'"."""
    return f"router={' or '.join(repr(name) for name, router in ROUTERS.items() if getattr(router, trait) == value)}"


# Settings that may be changed on a layer at any time; the others are built into its parts.
CHANGEABLE = ("capacity", "capacity_factor", "eval_capacity_factor", "capacity_rounding", "capacity_multiple_of")
CHANGEABLE += ("batch_priority", "group_size", "auxiliary_loss")


def _changeable_number(name: str) -> property:
    """A number on a layer that may be changed at any time, also after `torch.compile`.

    Kept as text: the compiler would make a symbol of a float that changes, and it cannot compute a capacity from that.
    """

    def get(layer: nn.Module) -> float | None:
        return None if vars(layer)[name] is None else float(vars(layer)[name])

    def set(layer: nn.Module, value: float | None) -> None:
        vars(layer)[name] = None if value is None else repr(float(value))

    return property(get, set)


def _one_node(forward: Callable) -> Callable:
    """A `forward` that the tracers of torch.fx, of torchvision and timm too, keep as one node."""

    @wraps(forward)
    def call(layer: nn.Module, *args, **kwargs) -> Tensor | Proxy:
        proxies = [each for each in (*args, *kwargs.values()) if isinstance(each, Proxy)]
        if not proxies:
            return forward(layer, *args, **kwargs)
        tracer = proxies[0].tracer
        if (path := tracer.path_of_module(layer)) == "":
            raise RuntimeError("torch.fx cannot trace a sparse layer itself, only a model that holds it as one node")
        return tracer.create_proxy("call_module", path, args, kwargs)

    return call


class SparseMoE(nn.Module):
    """A sparse mixture of MLPs, a drop-in for `timm.layers.Mlp`, whose arguments come first.

    Args:
        hidden_features: of each expert, by default D; the setting `expert_width` wins.
        norm_layer: makes a norm of each expert's hidden activations; None: no norm.
        router_preset: a router that a paper uses, by name (`vmoe.moe.config.PRESETS`); settings given beside it win.
        num_tokens: length of the model's sequences; for router="soft" without `num_slots` or `group_size`.
        modalities: names of the modalities of the input's tokens.
        **settings: see `vmoe.moe.config.RoutingSettings`. ValueError: one is out of range; TypeError: there is none.
    """

    capacity_factor = _changeable_number("_capacity_factor")
    eval_capacity_factor = _changeable_number("_eval_capacity_factor")

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        norm_layer: Callable[[int], nn.Module] | None = None,
        bias: bool = True,
        drop: float = 0.0,
        *,
        router_preset: str | None = None,
        num_tokens: int | None = None,
        modalities: Sequence[str] = ("image",),
        device=None,
        dtype=None,
        **settings,
    ) -> None:
        super().__init__()
        resolved = with_preset({}, {**settings, "router_preset": router_preset})
        del resolved["router_preset"]
        self._built_with = config = _with_slots(RoutingSettings(**resolved), num_tokens)
        factory = {"device": device, "dtype": dtype}
        for name in CHANGEABLE:
            setattr(self, name, getattr(config, name))
        self.router_type = config.router
        self.num_experts = config.num_experts
        self.num_selected_experts = config.num_selected_experts
        self.ensemble_size = config.ensemble_size
        self.in_features, self.out_features = in_features, out_features or in_features
        self.modalities = tuple(modalities)
        self.losses = AuxiliaryLosses.from_settings(config, self.modalities)
        self.router = ROUTERS[config.router](in_features, config, **factory)
        # Of the layer, since adapters wrap the router.
        self.per_token, self.soft = self.router.per_token, self.router.soft
        hidden_features = config.expert_width or hidden_features or in_features
        drop = drop if config.expert_drop is None else config.expert_drop
        mlp = {"out_features": out_features, "act_layer": act_layer, "bias": bias, "drop": drop, **factory}
        mlp["kind"] = config.expert_mlp
        own = {"norm_layer": norm_layer, "backend": config.backend}
        self.experts = Experts(self.num_experts, in_features, hidden_features, **own, **mlp)
        shared_features = config.num_shared_experts * hidden_features
        self.shared = Mlp(in_features, shared_features, **mlp) if shared_features else None

    @property
    def settings(self) -> RoutingSettings:
        """The settings of the layer as it is now, with what was changed on it since it was made."""
        return replace(self._built_with, **{name: getattr(self, name) for name in CHANGEABLE})

    @_one_node
    def forward(self, x_BTD: Tensor, mask_BT: Tensor | None = None, modality_BT: Tensor | None = None) -> Tensor:
        """Each token through its experts.

        Args:
            x_BTD: (..., D) tokens, any leading shape. In an ensemble the first axis holds the copies of each image.
            mask_BT: True where the token is real. Padding takes no capacity, counts in no loss, and comes out as zero.
            modality_BT: index of each token's modality; None: all of the first.

        Returns (..., O): zero, or what shared experts give, for a token that all chosen experts dropped.
        """
        x_GND, groups = self._group(x_BTD, mask_BT, modality_BT)
        assignment = self.router(x_GND, groups, self._capacity(), self.batch_priority)
        x_RD = assignment.dispatch(x_GND)
        # Unknown in evaluation, where batches differ between processes.
        max_count = assignment.max_count if self.training else None
        y_RD = self.experts(x_RD, assignment.count_E, max_count)
        y_GND = assignment.combine(y_RD)
        if self.shared is not None:
            y_GND = y_GND + groups.real(self.shared(x_GND))
        self._record(y_GND, assignment, groups)
        if self._attaches:
            y_GND = attach_loss(y_GND, self.losses.compute(assignment.routing, groups)["auxiliary_loss"])
        return groups.ungroup(y_GND)

    def _group(self, x_BTD: Tensor, mask_BT: Tensor | None, modality_BT: Tensor | None) -> tuple[Tensor, TokenGroups]:
        """Groups of `group_size`; without one all tokens are one group, or where tokens are chosen each sequence is."""
        if torch.jit.is_tracing():
            raise RuntimeError(
                "torch.jit.trace would fix the routing of its example for all inputs: use torch.export or torch.compile"
            )
        if x_BTD.shape[-1] != self.in_features:
            raise ValueError(f"the tokens have {x_BTD.shape[-1]} channels, and the layer takes {self.in_features}")
        leading = x_BTD.shape[:-1]
        by_sequence = not self.per_token and len(leading) > 1
        size = math.prod(leading[1:]) if by_sequence else None
        if self.group_size:
            if self.group_size % self.ensemble_size:
                raise ValueError(f"ensemble_size must divide group_size ({self.group_size}), got {self.ensemble_size}")
            size = self.group_size // self.ensemble_size
        return TokenGroups.cut(x_BTD, mask_BT, modality_BT, size, self.modalities, self.ensemble_size)

    def __prepare_scriptable__(self) -> nn.Module:
        """What torch.jit.script calls first. RuntimeError."""
        raise RuntimeError("torch.jit.script cannot compile sparse layers: use torch.export or torch.compile")

    def _capacity(self) -> Capacity:
        factor = self.capacity_factor if self.training else self.eval_capacity_factor
        if factor is None and not self.per_token:  # experts that choose always have a limit
            factor = self.capacity_factor
        return Capacity(self.capacity, factor, self.capacity_rounding, self.capacity_multiple_of)

    @property
    def _learns(self) -> bool:
        """In training, and the gate is not frozen."""
        return self.training and any(parameter.requires_grad for parameter in self.router.parameters())

    @property
    def _attaches(self) -> bool:
        return self.auxiliary_loss == "attach" and self.training and torch.is_grad_enabled()

    def _record(self, y_GND: Tensor, assignment: Assignment, groups: TokenGroups) -> None:
        """Hands the routing to the active records, and warns if nobody sees the losses."""
        records, lost = active_records(self), torch.is_grad_enabled() and not self._attaches
        if not records and lost and self._learns and self.losses.any_for(assignment.routing):
            warn_of_lost_losses()
        for record in records:
            about = (groups, self.losses, self._learns, self._attaches, backend_name(self.experts, y_GND))
            record.calls.append((record.names[self], LayerRouting(assignment.routing, *assignment.listed(), *about)))


def _with_slots(config: RoutingSettings, num_tokens: int | None) -> RoutingSettings:
    """Soft routing with its number of slots, which follows from the capacity factor if it is not given."""
    if not ROUTERS[config.router].soft or config.num_slots is not None:
        return config
    tokens = config.group_size or num_tokens
    if tokens is None:
        raise ValueError("router='soft' needs num_slots, or the number of tokens for it (group_size or num_tokens)")
    capacity = expert_capacity(
        tokens, config.num_experts, 1, config.capacity_factor, config.capacity_rounding, config.capacity_multiple_of
    )
    return replace(config, num_slots=capacity)
