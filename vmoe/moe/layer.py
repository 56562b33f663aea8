"""The sparse layer: route -> dispatch -> experts -> combine, in place of a transformer block's MLP.

Shapes, by suffix: B batch, T length, D width, G groups, N tokens in a group, E experts, K choices, M modalities,
R rows.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmoe.moe.backends import triton as kernels
from vmoe.moe.config import RoutingSettings, with_preset
from vmoe.moe.dispatch import Places, combine, dispatch, expert_capacity, masked_capacity, plan_dispatch
from vmoe.moe.expert_choice import ExpertChoiceRouter, choose_tokens, gather_tokens, return_rows
from vmoe.moe.experts import Experts, SharedExpert, has_hooks
from vmoe.moe.losses import AuxiliaryLosses, members
from vmoe.moe.record import LayerRouting, active_records, attach_loss, is_recomputation
from vmoe.moe.router import Routing, TopKRouter
from vmoe.moe.soft import SoftRouter, fill_slots, mix_slots

# Settings that may be changed on a layer at any time; the others are built into its parts.
CHANGEABLE = (
    "capacity",
    "capacity_factor",
    "eval_capacity_factor",
    "capacity_rounding",
    "capacity_multiple_of",
    "batch_priority",
    "group_size",
    "auxiliary_loss",
)


class _Factor:
    """A number on a layer that may be changed at any time, also after `torch.compile`.

    Kept as text: the compiler would make a symbol of a float that changes, and it cannot compute a capacity from that.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = f"_{name}"

    def __get__(self, layer: nn.Module, owner: type) -> float | None:
        text = getattr(layer, self.name)
        return None if text is None else float(text)

    def __set__(self, layer: nn.Module, value: float | None) -> None:
        setattr(layer, self.name, None if value is None else repr(float(value)))


class SparseMoE(nn.Module):
    """A sparse mixture of MLPs, a drop-in for `timm.layers.Mlp`.

    Args:
        in_features: D.
        hidden_features: hidden width of each expert, by default D; the setting `expert_width` goes over it.
        out_features: width of the result, by default D.
        act_layer: makes the experts' activation.
        norm_layer: makes a norm of each expert's hidden activations, as in `timm.layers.Mlp`; None: no norm.
        bias: biases in the experts.
        drop: dropout after the activation.
        router_preset: a router that a paper uses, by name (`vmoe.moe.config.PRESETS`); settings given beside it win.
        num_tokens: length of the model's sequences; for router="soft" without `num_slots` or `group_size`.
        modalities: names of the modalities of the input's tokens.
        **settings: see `vmoe.moe.config.RoutingSettings`.

    Raises:
        ValueError: for a setting out of range.
        TypeError: for one that does not exist.
    """

    capacity_factor, eval_capacity_factor = _Factor(), _Factor()

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
        s = RoutingSettings(**resolved)
        self._built_with = s
        self.router_type = s.router
        self.num_experts = s.num_experts
        self.num_selected_experts = s.num_selected_experts
        for name in CHANGEABLE:
            setattr(self, name, getattr(s, name))
        self.normalize_weights = s.normalize_weights
        self.bias_update_rate = s.bias_update_rate
        self.in_features = in_features
        self.out_features = out_features or in_features
        self.modalities = tuple(modalities)
        self.losses = AuxiliaryLosses.from_settings(s, modalities)
        factory = {"device": device, "dtype": dtype}
        self.router = _make_router(in_features, num_tokens, s, factory)
        hidden_features = s.expert_width or hidden_features or in_features
        kind = s.expert_mlp
        drop = drop if s.expert_drop is None else s.expert_drop
        self.experts = Experts(
            self.num_experts,
            in_features,
            hidden_features,
            self.out_features,
            act_layer,
            norm_layer,
            bias,
            drop,
            kind,
            **factory,
        )
        self.shared = None
        if s.num_shared_experts:
            width = s.num_shared_experts * hidden_features
            self.shared = SharedExpert(in_features, width, self.out_features, act_layer, bias, drop, kind, **factory)

    @property
    def settings(self) -> RoutingSettings:
        """The settings of the layer as it is now, with what was changed on it since it was made."""
        return replace(self._built_with, **{name: getattr(self, name) for name in CHANGEABLE})

    def takes_packed(self) -> bool:
        """`forward` can be called with `place_S`: tokens choose, and the whole batch is one group.

        Not with experts in other processes, which must know how many rows can come; not with random numbers other than
        noise of the logits; and not while somebody listens to the calls of the layer or its router, or has put another
        `forward` in the place of theirs: those see rows on every device.
        """
        return (
            self.router_type == "top_k"
            and self.group_size is None
            and self.experts.exchange is None
            and type(self).forward is SparseMoE.forward
            and type(self.router).forward is TopKRouter.forward
            and not (self.training and self._draws_for_each_token())
            and not (has_hooks(self) or has_hooks(self.router))
        )

    def _draws_for_each_token(self) -> bool:
        """In training, random numbers other than noise of the logits depend on the number of tokens."""
        drops = self.shared is not None and self.shared.drop.p > 0
        return drops or self.router.input_jitter > 0 or self.router.random_threshold is not None

    def forward(
        self,
        x_BTD: Tensor,
        mask_BT: Tensor | None = None,
        modality_BT: Tensor | None = None,
        place_S: Tensor | None = None,
    ) -> Tensor:
        """Each token through its experts.

        Args:
            x_BTD: tokens; (..., D) with any leading shape if there is neither mask nor modality.
            mask_BT: True where the token is real. Padding takes no room, counts in no loss, and comes out as zero.
            modality_BT: index of each token's modality; None: all of the first.
            place_S: only if `takes_packed`: the tokens are (S, D), without some or all of the padding and in any order,
                and this is the flat index into (B, T) of each. They are routed as if they lay there.

        Returns:
            (B, T, D), or what leading shape the tokens have; zero for a token that every chosen expert dropped (with
            shared experts, what they give).

        Raises:
            ValueError: if the mask, the modality or the places do not fit the tokens, or places are not taken.
        """
        if torch.jit.is_tracing():
            raise RuntimeError(
                "torch.jit.trace would fix the routing of its example for all inputs: use torch.export or torch.compile"
            )
        leading = x_BTD.shape[:-1]
        if x_BTD.shape[-1] != self.in_features:
            raise ValueError(f"the tokens have {x_BTD.shape[-1]} channels, and the layer takes {self.in_features}")
        places, shape = None, (leading[:-1].numel(), leading[-1] if leading else 1)
        own_mask, own_modality = mask_BT, modality_BT
        if place_S is not None:
            places, shape = self._places(place_S, leading, mask_BT, modality_BT), tuple(mask_BT.shape)
            own_mask = mask_BT.flatten()[place_S]
            own_modality = None if modality_BT is None else modality_BT.flatten()[place_S]
        x_GND, mask_GN, modality_GN = self._into_groups(x_BTD, own_mask, own_modality)
        if self.router_type == "top_k":
            y_GND, routing, describe = self._top_k(x_GND, mask_GN, modality_GN, places)
        else:
            route = {"expert_choice": self._expert_choice, "soft": self._soft}[self.router_type]
            y_GND, routing, describe = route(x_GND, mask_GN, modality_GN)
        if self.shared is not None:
            y_GND = y_GND + self._of_real(self.shared(x_GND), mask_GN)

        attached = self.auxiliary_loss == "attach" and self.training and torch.is_grad_enabled()
        if attached:
            losses = self.losses.terms(routing, mask_GN, modality_GN)
            y_GND = attach_loss(y_GND, self.losses.weighted(losses, routing.gates_GNE))
        for record in active_records(self):
            listed, kept_GNK, statistics = describe()
            learns = self.training and any(parameter.requires_grad for parameter in self.router.parameters())
            mask_GN = torch.ones_like(kept_GNK[..., 0]) if mask_GN is None else mask_GN
            call = LayerRouting(
                listed,
                kept_GNK,
                mask_GN,
                modality_GN,
                shape,
                self.losses,
                learns,
                attached,
                statistics,
                self.router_type,
                None if modality_BT is None else modality_BT.reshape(shape),
                places,
            )
            record.add(self, call)
        return y_GND.flatten(0, 1)[: leading.numel()].view(*leading, self.out_features)

    # --- the three ways to route; each gives (G, N, D), the gates' decisions, and a function that describes them for a
    # --- record: (the decisions with all that is listed, kept (G, N, K), further statistics)

    def _top_k(self, x_GND: Tensor, mask_GN: Tensor | None, modality_GN: Tensor | None, places: Places | None):
        routing = self.router(x_GND) if places is None else self.router(x_GND, places)
        if self.bias_update_rate > 0 and self.training and not is_recomputation():
            self._count(routing, mask_GN)
        G, N, _ = x_GND.shape
        capacity, max_capacity = self._capacity(mask_GN, (N if G else 0) if places is None else places.number)
        plan = plan_dispatch(
            routing.expert_index_GNK,
            self.num_experts,
            capacity,
            routing.priority_GN if self.batch_priority else None,
            mask_GN,
            max_capacity,
            routing.chosen_GNK,
            places,
        )
        if kernels.can_run(self.experts, x_GND):
            y_GND = kernels.run(self.experts, x_GND, plan, routing.combine_weights_GNK)
        elif self.experts.can_route(x_GND):
            weight_R = routing.combine_weights_GNK.flatten().index_select(0, plan.assignment_R)
            row_SK = plan.row_A.view(G * N, self.num_selected_experts)
            y_SD = self.experts.run_routed(x_GND.flatten(0, 1), plan.token_R, row_SK, weight_R, plan.count_E)
            y_GND = y_SD.view(G, N, self.out_features)
        else:
            y_RD = self.experts(dispatch(x_GND, plan), plan.count_E, self._max_count(G, max_capacity))
            y_GND = combine(y_RD, routing.combine_weights_GNK, plan)
        return y_GND, routing, lambda: (routing, plan.kept_GNK, dict)

    def _expert_choice(self, x_GND: Tensor, mask_GN: Tensor | None, modality_GN: Tensor | None):
        G, N, _ = x_GND.shape
        routing = self.router(x_GND)
        members_GMN = self._members(mask_GN, modality_GN)
        capacity, max_capacity = self._capacity(members_GMN, N if G else 0)
        gates_GNE = routing.noisy_gates_GNE
        chosen = choose_tokens(gates_GNE, capacity, max_capacity, members_GMN, self.normalize_weights)
        if self.experts.can_route(x_GND) and not chosen.has_holes:
            y_SD = self.experts.run_routed(x_GND.flatten(0, 1), chosen.token_R, None, chosen.weight_R, chosen.count_E)
            y_GND = y_SD.view(G, N, self.out_features)
        else:
            rows = gather_tokens(x_GND, chosen)
            queues = G if members_GMN is None else G * members_GMN.shape[1]
            y_RD = self.experts(rows, chosen.count_E, self._max_count(queues, min(max_capacity, N)))
            y_GND = return_rows(y_RD, chosen, G, N)

        def describe():
            listed = routing.with_all_experts(chosen.weights_GNE)
            kept_GNK = chosen.taken_GNE.gather(-1, listed.expert_index_GNK)
            number_GN = chosen.taken_GNE.sum(-1)

            def statistics():  # which tokens are real is a question to the device: only when somebody reads them
                real_S = number_GN.flatten() if mask_GN is None else number_GN[mask_GN]
                if real_S.numel() == 0:
                    return {}
                return {"experts_per_token_min": real_S.min(), "experts_per_token_max": real_S.max()}

            return listed, kept_GNK, statistics

        return y_GND, routing, describe

    def _soft(self, x_GND: Tensor, mask_GN: Tensor | None, modality_GN: Tensor | None):
        members_GMN = self._members(mask_GN, modality_GN)
        soft = self.router(x_GND, members_GMN)
        z_RD, count_E = fill_slots(x_GND, soft, self.num_experts)
        y_RD = self.experts(z_RD, count_E, self._max_count(1, z_RD.shape[0] // self.num_experts))
        y_GND = mix_slots(y_RD, soft, self.num_experts, members_GMN)

        def describe():
            listed = soft.routing.with_all_experts(soft.routing.noisy_gates_GNE)
            kept_GNK = torch.ones_like(listed.expert_index_GNK, dtype=torch.bool)
            return listed, self._of_real(kept_GNK, mask_GN), lambda: soft.statistics(members_GMN)

        return y_GND, soft.routing, describe

    # ---

    def _places(
        self, place_S: Tensor, leading: torch.Size, mask_BT: Tensor | None, modality_BT: Tensor | None
    ) -> Places:
        if self.router_type != "top_k" or self.group_size is not None:
            raise ValueError("place_S needs router='top_k' and no group_size: see takes_packed()")
        if mask_BT is None or mask_BT.dim() != 2 or (modality_BT is not None and modality_BT.shape != mask_BT.shape):
            raise ValueError("place_S needs a mask of (B, T), and a modality of the same shape or none")
        if place_S.shape != leading:
            raise ValueError(f"place_S must have the tokens' shape {tuple(leading)}, got {tuple(place_S.shape)}")
        return Places(place_S, tuple(mask_BT.shape))

    def _into_groups(
        self, x_BTD: Tensor, mask_BT: Tensor | None, modality_BT: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Flatten the tokens and cut them into groups; what the last group lacks is padding."""
        leading = x_BTD.shape[:-1]
        for name, tensor, kind in (("mask", mask_BT, "bool"), ("modality", modality_BT, "int")):
            if tensor is not None and tensor.shape != leading:
                raise ValueError(f"the {name} must have the tokens' shape {tuple(leading)}, got {tuple(tensor.shape)}")
            if tensor is not None and (tensor.dtype == torch.bool) != (kind == "bool"):
                raise ValueError(f"the {name} must be a tensor of {kind}, got {tensor.dtype}")
        num_tokens = leading.numel()
        size = self.group_size
        if size is None:
            by_sequence = self.router_type != "top_k" and len(leading) > 1
            size = leading[1:].numel() if by_sequence else num_tokens
        size = max(1, min(int(size), num_tokens))  # an empty batch is no group
        missing = -num_tokens % size
        x_SD = x_BTD.reshape(num_tokens, x_BTD.shape[-1])
        mask_S = None if mask_BT is None else mask_BT.reshape(num_tokens)
        modality_S = None if modality_BT is None else modality_BT.reshape(num_tokens)
        if missing:
            if mask_S is None:
                mask_S = torch.ones(num_tokens, dtype=torch.bool, device=x_SD.device)
            x_SD = F.pad(x_SD, (0, 0, 0, missing))
            mask_S = F.pad(mask_S, (0, missing))
            modality_S = None if modality_S is None else F.pad(modality_S, (0, missing))
        if mask_S is not None:
            # Padding may hold anything, NaN too; as zeros it reaches neither the gate's gradient nor the output.
            if x_SD.device.type == "cpu" and not torch.compiler.is_compiling():
                x_SD = x_SD.index_fill(0, (~mask_S).nonzero()[:, 0], 0)  # a third of the time of `where`
            else:
                x_SD = torch.where(mask_S[:, None], x_SD, 0)
        G = (num_tokens + missing) // size
        return (
            x_SD.view(G, size, x_SD.shape[1]),
            None if mask_S is None else mask_S.view(G, size),
            None if modality_S is None else modality_S.view(G, size),
        )

    def _members(self, mask_GN: Tensor | None, modality_GN: Tensor | None) -> Tensor | None:
        """(G, M, N) bool, the real tokens of each modality; None: all tokens, and of one modality."""
        if modality_GN is None:
            return None if mask_GN is None else mask_GN[:, None]
        return torch.stack(list(members(self.modalities, mask_GN, modality_GN).values()), dim=1)

    def _capacity(self, mask: Tensor | None, num_tokens: int) -> tuple[int | Tensor | None, int | None]:
        """Rows that an expert takes from a group: (a number or one per group of the mask, the most it can be)."""
        if self.capacity is not None:
            return self.capacity, self.capacity
        factor = self.capacity_factor if self.training else self.eval_capacity_factor
        K = self.num_selected_experts
        if self.router_type == "expert_choice":
            factor, K = factor or self.capacity_factor, 1
        if factor is None:
            return None, None
        rounding = {"rounding": self.capacity_rounding, "multiple_of": self.capacity_multiple_of}
        most = expert_capacity(num_tokens, self.num_experts, K, factor, **rounding)
        return (most if mask is None else masked_capacity(mask, self.num_experts, K, factor, **rounding)), most

    def _max_count(self, num_queues: int, capacity: int | None) -> int | None:
        """The most rows that an expert can have in this call, where that is the same in all processes.

        In evaluation it is not: batches differ in size.
        """
        return num_queues * capacity if self.training and capacity is not None else None

    def _count(self, routing: Routing, mask_GN: Tensor | None) -> None:
        """Keep count for the balancing bias, and warn those who never update it."""
        router = self.router
        router.count(routing, mask_GN)
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        router.calls_without_update += 1
        if router.calls_without_update == router.CALLS_BEFORE_WARNING:
            warnings.warn(
                f"the expert bias of this router was not updated in {router.CALLS_BEFORE_WARNING} training steps: "
                "call vmoe.update_expert_bias(model) after each optimizer.step()",
                stacklevel=4,
            )

    @staticmethod
    def _of_real(y_GND: Tensor, mask_GN: Tensor | None) -> Tensor:
        """Zero for padding."""
        return y_GND if mask_GN is None else torch.where(mask_GN[..., None], y_GND, torch.zeros_like(y_GND))


def _make_router(dim: int, num_tokens: int | None, settings: RoutingSettings, factory: dict) -> nn.Module:
    s = settings
    if s.router == "expert_choice":
        return ExpertChoiceRouter(dim, s.num_experts, s.noise_std, s.input_jitter, **factory)
    if s.router == "soft":
        num_slots = s.num_slots
        if num_slots is None:
            tokens = s.group_size or num_tokens
            if tokens is None:
                raise ValueError(
                    "router='soft' needs num_slots, or the number of tokens to compute it from (group_size, num_tokens)"
                )
            args = (tokens, s.num_experts, 1, s.capacity_factor, s.capacity_rounding, s.capacity_multiple_of)
            num_slots = expert_capacity(*args)
        return SoftRouter(dim, s.num_experts, int(num_slots), s.noise_std, **factory)
    return TopKRouter(
        dim,
        s.num_experts,
        s.num_selected_experts,
        s.noise_std,
        s.input_jitter,
        s.learned_noise,
        s.gate,
        s.normalize_weights,
        s.random_threshold,
        s.bias_update_rate,
        **factory,
    )
