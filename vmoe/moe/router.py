"""What every router returns, the gate, and the router whose tokens choose their experts.

Shapes, by suffix: G groups, N tokens in a group, I images in a group, D width, E experts, K choices, R rows handed to
the experts.
"""

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmoe.moe.autograd import apply, transformable, transforms_active, zeros_if_none
from vmoe.moe.config import RoutingSettings
from vmoe.moe.dispatch import Capacity, DispatchPlan, combine, dispatch, plan_dispatch
from vmoe.moe.groups import TokenGroups


@dataclass(frozen=True)
class Routing:
    """What the gate decided, before any token is dropped.

    Attributes:
        logits_GNE: the gate's own output, without noise.
        noisy_logits_GNE: what the choice was made from; the same tensor where there is no noise.
        gates_GNE: softmax of `logits_GNE` (for a sigmoid gate, its values divided by their sum).
        noisy_gates_GNE: the same of `noisy_logits_GNE`.
        noise_std: standard deviation of the noise, a number or (G, N, E) where it is learned; None: no noise.
        expert_index_GNK: the K chosen experts, best first; None where experts or slots choose.
        combine_weights_GNK: their weights; None likewise.
        chosen_GNK: bool, False where the router itself dropped a choice; None: none.
        importance_GNE: what the importance loss sums over the tokens, if not the gates (Shazeer et al.: the weights).
        soft: the experts see weighted means of tokens, see `Router`.
        ensemble_size: M. The groups of the first member come first, and E of all tensors is the number of experts of
            one member; `expert_index_GNK` counts all experts, member by member.
    """

    logits_GNE: Tensor
    noisy_logits_GNE: Tensor
    gates_GNE: Tensor
    noisy_gates_GNE: Tensor
    noise_std: float | Tensor | None = None
    expert_index_GNK: Tensor | None = None
    combine_weights_GNK: Tensor | None = None
    chosen_GNK: Tensor | None = None
    importance_GNE: Tensor | None = None
    soft: bool = False
    ensemble_size: int = 1

    @property
    def per_token(self) -> bool:
        """Each token chooses its experts. False: the experts or slots choose."""
        return self.expert_index_GNK is not None

    @property
    def has_load(self) -> bool:
        """There is a load loss. Without noise the load has no gradient, and the reference no such loss."""
        return self.noise_std is not None and self.per_token

    @property
    def priority_GN(self) -> Tensor:
        """How sure each token is of its first choice: its gate, before any normalisation."""
        first_GN1 = self.expert_index_GNK[..., :1] % self.noisy_gates_GNE.shape[-1]  # among the experts of a member
        return self.noisy_gates_GNE.gather(-1, first_GN1).squeeze(-1)

    def map(self, function: Callable[[Tensor], Tensor]) -> "Routing":
        """The same with a function of all its tensors."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: function(of) for name, of in values.items() if isinstance(of, Tensor)})

    def global_index(self, index_GNK: Tensor) -> Tensor:
        """Indices among the experts of each group's member as indices among all experts."""
        if (M := self.ensemble_size) == 1:
            return index_GNK
        own = self.gates_GNE.shape[-1]
        return add_by_member(index_GNK, torch.arange(0, M * own, own, device=index_GNK.device), M)

    def over_all_experts(self, x_GNE: Tensor) -> Tensor:
        """Values for the experts of each group's member as values for all experts, zero for those of other members."""
        if (M := self.ensemble_size) == 1:
            return x_GNE
        is_own = torch.eye(M, dtype=x_GNE.dtype, device=x_GNE.device).view(M, 1, 1, M, 1)
        return (x_GNE.unflatten(0, (M, -1))[..., None, :] * is_own).flatten(-2).flatten(0, 1)


def add_by_member(x_GNX: Tensor, own: Tensor, ensemble_size: int) -> Tensor:
    """Adds to each group what is its member's own: `own` holds as many numbers for each member, or all for one."""
    if ensemble_size == 1:
        return x_GNX + own
    return (x_GNX.unflatten(0, (ensemble_size, -1)) + own.view(ensemble_size, 1, 1, -1)).flatten(0, 1)


@dataclass(frozen=True)
class Assignment(ABC):
    """Which rows the experts compute, and what becomes of the results: what a router returns."""

    routing: Routing
    max_count: int | None  # the most rows that an expert can have; None: unknown

    @property
    def count_E(self) -> Tensor:
        """Rows of each expert; rows are sorted by expert. Where experts or slots choose, all have the most."""
        gates_GNE = self.routing.gates_GNE
        E, device = self.routing.ensemble_size * gates_GNE.shape[-1], gates_GNE.device
        if not isinstance(self.max_count, int):  # of a batch of any size; Inductor has no cumulative sum of a constant
            return (torch.arange(E + 1, device=device) * self.max_count).diff()
        return torch.full((E,), self.max_count, dtype=torch.long, device=device)

    @abstractmethod
    def dispatch(self, x_GND: Tensor) -> Tensor:
        """The experts' input: (R, D) rows sorted by expert. Differentiable."""

    @abstractmethod
    def combine(self, y_RD: Tensor) -> Tensor:
        """The experts' results brought back to the tokens: (G, N, D). Differentiable."""

    @abstractmethod
    def listed(self) -> tuple[Tensor, Tensor, Tensor]:
        """For records: the K experts of each token, their combine weights, and whether each was kept; (G, N, K)."""

    def list_all(self, weights_GNE: Tensor, kept_GNE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`listed` of routers whose experts or slots choose: K = E, all experts of each token, best first."""
        index_GNE = self.routing.noisy_gates_GNE.detach().argsort(dim=-1, descending=True, stable=True)
        # Without a gradient: under activation checkpointing a layer must save the same, recorded or not.
        weights_GNE, kept_GNE = weights_GNE.detach().gather(-1, index_GNE), kept_GNE.gather(-1, index_GNE)
        return self.routing.global_index(index_GNE), weights_GNE, kept_GNE


@dataclass(frozen=True)
class TopKAssignment(Assignment):
    """Each token goes to its K experts, as far as their capacity allows."""

    plan: DispatchPlan

    @property
    def count_E(self) -> Tensor:
        return self.plan.count_E

    def dispatch(self, x_GND: Tensor) -> Tensor:
        return dispatch(x_GND, self.plan)

    def combine(self, y_RD: Tensor) -> Tensor:
        return combine(y_RD, self.routing.combine_weights_GNK, self.plan)

    def listed(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.routing.expert_index_GNK, self.routing.combine_weights_GNK, self.plan.kept_GNK


def without_autocast(device: torch.device) -> AbstractContextManager:
    """The block computes in the types that it names; the meta device, which only counts, knows no autocast."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


@transformable
class _GateLinear(torch.autograd.Function):
    """x Wᵀ in at least float32. Kept for the backward pass is x in its own type, not the copy that is multiplied."""

    @staticmethod
    def forward(x_GND: Tensor, weight_ED: Tensor) -> Tensor:
        dtype = torch.promote_types(x_GND.dtype, torch.float32)
        return F.linear(x_GND.to(dtype), weight_ED.to(dtype))

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad_GNE: Tensor):
        x_GND, weight_ED = ctx.saved_tensors
        dtype = grad_GNE.dtype
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad_GNE @ weight_ED.to(dtype)).to(x_GND.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = (grad_GNE.flatten(0, 1).T @ x_GND.flatten(0, 1).to(dtype)).to(weight_ED.dtype)
        return grad_x, grad_weight

    @staticmethod
    def tangent(ctx, x: Tensor | None, weight: Tensor | None) -> Tensor:
        x_GND, weight_ED = ctx.saved_tensors
        x, weight = (zeros_if_none(*pair) for pair in ((x, x_GND), (weight, weight_ED)))
        return apply(_GateLinear, x, weight_ED) + apply(_GateLinear, x_GND, weight)


def top_k_experts(gates_GNE: Tensor, num_selected_experts: int) -> Tensor:
    """Indices (..., K) of the K largest gates, best first; equal gates: the lower index first."""
    # torch.topk leaves the order of equal values open; the maximum is the first of equal ones. K passes over the
    # experts are much cheaper than sorting them.
    indices = [gates_GNE.max(dim=-1, keepdim=True).indices]
    for _ in range(num_selected_experts - 1):
        gates_GNE = gates_GNE.scatter(-1, indices[-1], -math.inf)
        indices.append(gates_GNE.max(dim=-1, keepdim=True).indices)
    return torch.cat(indices, dim=-1)


def normalized(weights: Tensor, dim: int = -1) -> Tensor:
    """Weights divided by their sum; zero stays zero where all are."""
    return weights / weights.sum(dim, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)


def lecun_normal_(weight: Tensor, fan_in: int) -> None:
    """Truncated normal of variance 1/fan_in, the initialisation of the reference's gate."""
    std = fan_in**-0.5 / 0.87962566103423978  # truncation at two deviations shrinks the variance
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


class Router(nn.Module, ABC):
    """Tokens to logits, which is `forward`: hooks and tools see tensors only. A call of the router assigns them too.

    Attributes:
        per_token: each token chooses its experts. False: the experts or slots choose among the tokens of a sequence.
        soft: the experts see weighted means of tokens. Loads are then sums of weights, and no token is dropped.
    """

    per_token: bool
    soft = False

    def __call__(self, x_GND: Tensor, groups: TokenGroups, capacity: Capacity, batch_priority: bool) -> Assignment:
        return self.assign(super().__call__(x_GND), groups, capacity, batch_priority)

    @abstractmethod
    def forward(self, x_GND: Tensor) -> Tensor | tuple[Tensor, ...]:
        """(G, N, D) -> logits. In float32 (float64 for float64 input), under autocast too."""

    @abstractmethod
    def assign(
        self, logits: Tensor | tuple[Tensor, ...], groups: TokenGroups, capacity: Capacity, batch_priority: bool
    ) -> Assignment:
        """What follows from the result of `forward`."""


class Gate(Router):
    """A linear layer without bias from tokens to experts, computed in float32 (float64 for float64 input).

    In training, noise of standard deviation `noise_std / E` is added to the logits. `weight` is (E, D), and so is
    `noise_weight`, with `learned_noise` only. With gate="cosine" `weight` is (E, P), `projection` (P, D),
    `projection_bias` (P,), and `temperature` (1,) the logarithm of the scale, as in Tutel. In an ensemble E of all else
    is the experts of one member, and the rows of `weight` are the gates of the members, one after the other.
    """

    SHARED = ("projection", "projection_bias", "temperature")  # parameters that belong to no single expert

    def __init__(self, dim: int, config: RoutingSettings, device=None, dtype=None) -> None:
        super().__init__()
        self.num_experts = config.num_experts
        self.ensemble_size = config.ensemble_size
        self.gate = config.gate
        self.learned_noise = config.learned_noise
        self.noise_std = 0.0 if config.learned_noise else config.noise_std
        self.input_jitter = config.input_jitter
        self.normalize_weights = config.normalize_weights
        factory, cosine = {"device": device, "dtype": dtype}, config.gate == "cosine"
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.cosine_dim if cosine else dim, **factory))
        if self.learned_noise:
            self.noise_weight = nn.Parameter(torch.empty_like(self.weight))
        if cosine:
            self.projection = nn.Parameter(torch.empty(config.cosine_dim, dim, **factory))
            self.projection_bias = nn.Parameter(torch.empty(config.cosine_dim, **factory))
            self.temperature = nn.Parameter(torch.empty(1, **factory))

    def reset_parameters(self) -> None:
        """LeCun normal; zeros with learned noise (arXiv 1701.06538, appendix A: no signal and some noise); a cosine
        gate as Tutel's, with a scale of 2."""
        if self.learned_noise:
            nn.init.zeros_(self.weight)
            nn.init.zeros_(self.noise_weight)
        elif self.gate == "cosine":
            nn.init.normal_(self.weight, std=0.01)
            lecun_normal_(self.projection, fan_in=self.projection.shape[1])
            nn.init.zeros_(self.projection_bias)
            nn.init.constant_(self.temperature, math.log(2))
        else:
            lecun_normal_(self.weight, fan_in=self.weight.shape[1])

    def forward(self, x_GND: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """(G, N, D) -> (G, N, E) logits without noise; in training with learned noise, also its standard deviation."""
        with without_autocast(x_GND.device):
            if self.training and self.input_jitter > 0:  # in the precision of the gate
                x_GND = x_GND.to(torch.promote_types(x_GND.dtype, torch.float32))
                x_GND = x_GND * torch.empty_like(x_GND).uniform_(1 - self.input_jitter, 1 + self.input_jitter)
            logits_GNE = self._cosines(x_GND) if self.gate == "cosine" else self._linear(x_GND, self.weight)
            if self.training and self.learned_noise:  # arXiv 1701.06538, eq. 4
                return logits_GNE, F.softplus(self._linear(x_GND, self.noise_weight))
            return logits_GNE

    def _cosines(self, x_GND: Tensor) -> Tensor:
        """(G, N, E) cosines of the projected tokens and the experts' vectors, scaled (arXiv 2204.09636, eq. 4)."""
        z_GNP = apply(_GateLinear, x_GND, self.projection)
        z_GNP = F.normalize(z_GNP + self.projection_bias.to(z_GNP.dtype), dim=-1)
        weight_EP = F.normalize(self.weight.to(z_GNP.dtype), dim=-1)
        scale = self.temperature.to(z_GNP.dtype).clamp(max=math.log(100)).exp()
        return self._linear(z_GNP, weight_EP) * scale

    def _linear(self, x_GND: Tensor, weight_ED: Tensor) -> Tensor:
        if (M := self.ensemble_size) == 1:
            return apply(_GateLinear, x_GND, weight_ED)
        members = zip(x_GND.unflatten(0, (M, -1)), weight_ED.unflatten(0, (M, -1)), strict=True)
        return torch.cat([apply(_GateLinear, *member) for member in members])

    def gates(self, logits: Tensor | tuple[Tensor, Tensor]) -> tuple[Routing, Tensor]:
        """The routing without a choice, and what is chosen by and weighted with, (G, N, E)."""
        logits_GNE, noise_std = logits if isinstance(logits, tuple) else (logits, None)
        noisy_logits_GNE = logits_GNE
        if self.training and self.noise_std > 0:
            noise_std = self.noise_std / (self.num_experts // self.ensemble_size)
        if noise_std is not None:
            noisy_logits_GNE = logits_GNE + noise_std * torch.randn_like(logits_GNE)
        scores_GNE, noisy_gates_GNE = self._distribution(noisy_logits_GNE)
        gates_GNE = noisy_gates_GNE if noise_std is None else self._distribution(logits_GNE)[1]
        routing = Routing(logits_GNE, noisy_logits_GNE, gates_GNE, noisy_gates_GNE, noise_std)
        return replace(routing, ensemble_size=self.ensemble_size), scores_GNE

    def _distribution(self, logits_GNE: Tensor) -> tuple[Tensor, Tensor]:
        """(what is chosen by and weighted with, the distribution over the experts)."""
        if self.gate == "sigmoid":
            scores_GNE = logits_GNE.sigmoid()
            return scores_GNE, normalized(scores_GNE)
        gates_GNE = logits_GNE.softmax(-1)
        return gates_GNE, gates_GNE


class TopKRouter(Gate):
    """Each token takes its K best experts; V-MoE's router (arXiv 2106.05974, section 2.2) and its relatives.

    With `per_image` each image does so by its mean token, and all its tokens follow (arXiv 2309.04354).

    With `bias_update_rate` it has `expert_bias`, (E,) float32 whatever the type of the model, and `expert_load`, (E,)
    how often each expert was chosen since the last update.
    """

    per_token = True
    # A user who forgets `update_expert_bias` gets an unbalanced model and no error, so there is one warning.
    CALLS_BEFORE_WARNING = 1000

    def __init__(self, dim: int, config: RoutingSettings, device=None, dtype=None) -> None:
        super().__init__(dim, config, device, dtype)
        self.num_selected_experts = config.num_selected_experts
        self.per_image = config.per_image
        self.random_threshold = config.random_threshold
        self.bias_update_rate = config.bias_update_rate
        if self.bias_update_rate > 0:
            self.register_buffer("expert_bias", torch.empty(self.num_experts, device=device, dtype=torch.float32))
            # Not a buffer: DistributedDataParallel would overwrite each process's own counts with those of the first.
            self.expert_load = torch.empty(self.num_experts, dtype=torch.long, device=device)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.bias_update_rate > 0:
            nn.init.zeros_(self.expert_bias)
            self.expert_load.zero_()
            self.calls_without_update = 0

    def __call__(self, x_GND: Tensor, groups: TokenGroups, capacity: Capacity, batch_priority: bool) -> Assignment:
        seen = groups.image_means(x_GND) if self.per_image else x_GND
        return super().__call__(seen, groups, capacity, batch_priority)

    def assign(
        self, logits: Tensor | tuple[Tensor, Tensor], groups: TokenGroups, capacity: Capacity, batch_priority: bool
    ) -> Assignment:
        """Chooses the experts and queues the tokens, or the images, with `batch_priority` the surest first."""
        routing, mask = self.choose(logits), groups.image_mask_GI if self.per_image else groups.mask_GN
        G, N, K = routing.expert_index_GNK.shape
        # A number of tokens that an export leaves open is counted by the graph.
        counted = mask
        if mask is None and not isinstance(N, int):
            counted = torch.ones_like(routing.expert_index_GNK[..., 0])
        M, E = self.ensemble_size, self.num_experts
        rows, most = capacity.rows(N if G else 0, E, K, counted, M)
        priority = routing.priority_GN if batch_priority else None
        plan = plan_dispatch(routing.expert_index_GNK, E, rows, priority, mask, most, routing.chosen_GNK, M)
        if self.per_image:
            kept_GNK = groups.to_tokens(plan.kept_GNK) if plan.may_drop else None
            routing, most = routing.map(groups.to_tokens), None if most is None else most * groups.tokens_per_image
            # The images that were kept have capacity for all their tokens: the limit only bounds the number of rows.
            index_GNK = routing.expert_index_GNK
            plan = plan_dispatch(index_GNK, E, most, mask_GN=groups.mask_GN, chosen_GNK=kept_GNK, ensemble_size=M)
        if self.bias_update_rate > 0 and self.training:
            self._count(routing, groups.mask_GN)
        return TopKAssignment(routing, None if most is None else G // M * most, plan)

    def route(self, x_GND: Tensor) -> Routing:
        """(G, N, D) -> `Routing`, without a queue."""
        return self.choose(self.forward(x_GND))

    def choose(self, logits: Tensor | tuple[Tensor, Tensor]) -> Routing:
        """The K experts of each token and their weights."""
        device = self.weight.device
        with without_autocast(device):
            routing, scores_GNE = self.gates(logits)
            choice_GNE = scores_GNE.detach()
            if self.bias_update_rate > 0:
                choice_GNE = add_by_member(choice_GNE, self.expert_bias, self.ensemble_size)
            index_GNK = top_k_experts(choice_GNE, self.num_selected_experts)
            weights_GNK = scores_GNE.gather(-1, index_GNK)
            if self.normalize_weights:
                weights_GNK = normalized(weights_GNK)
            chosen_GNK = None
            if self.random_threshold is not None and self.training:
                chosen_GNK = torch.rand_like(weights_GNK) * self.random_threshold < weights_GNK
                chosen_GNK = chosen_GNK | (torch.arange(self.num_selected_experts, device=device) == 0)
        choice = {"combine_weights_GNK": weights_GNK, "chosen_GNK": chosen_GNK}
        choice["expert_index_GNK"] = routing.global_index(index_GNK)
        if self.learned_noise:
            choice["importance_GNE"] = torch.zeros_like(scores_GNE).scatter(-1, index_GNK, weights_GNK)
        return replace(routing, **choice)

    # --- the balancing bias ---

    def _apply(self, fn, recurse: bool = True):
        bias_E = getattr(self, "expert_bias", None)
        super()._apply(fn, recurse)
        if bias_E is not None:
            if self.expert_bias.dtype != torch.float32:  # steps of 0.001 vanish in half precision
                self.expert_bias = bias_E.to(self.expert_bias.device)
            load_E = fn(self.expert_load)
            self.expert_load = torch.zeros_like(load_E) if self.expert_load.is_meta else load_E
        return self

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if self.bias_update_rate > 0:
            self.expert_bias = self.expert_bias.float()  # with assign=True it has the type of the state dict

    @torch.no_grad()
    def _count(self, routing: Routing, mask_GN: Tensor | None) -> None:
        """Adds the choices of real tokens to `expert_load`, and warns those who never update the bias."""
        if is_recomputation():
            return
        if transforms_active():
            raise RuntimeError(
                "torch.func cannot count the loads of a balancing bias in training: call model.eval(), or build the "
                "model with bias_update_rate=0"
            )
        index_GNK = routing.expert_index_GNK
        # load_state_dict(assign=True) and pruning replace parameters and buffers only.
        if self.expert_load.device != index_GNK.device or len(self.expert_load) != self.num_experts:
            self.expert_load = torch.zeros(self.num_experts, dtype=torch.long, device=index_GNK.device)
        ones_GNK = torch.ones_like(index_GNK) if mask_GN is None else mask_GN[..., None].long().expand_as(index_GNK)
        self.expert_load.scatter_add_(0, index_GNK.flatten(), ones_GNK.flatten())
        if not torch.compiler.is_compiling() and routing.gates_GNE.requires_grad:
            self.calls_without_update += 1
            if self.calls_without_update == self.CALLS_BEFORE_WARNING:
                warnings.warn(
                    f"the expert bias of this router was not updated in {self.CALLS_BEFORE_WARNING} training steps: "
                    "call vmoe.update_expert_bias(model) after each optimizer.step()",
                    stacklevel=4,
                )

    @torch.no_grad()
    def update_bias(self) -> None:
        """b_e += rate · sign(mean load - load_e), of all processes (arXiv 2408.15664, algorithm 1), unless frozen."""
        load_E = self.expert_load
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(load_E)
        if self.weight.requires_grad:
            self.expert_bias.add_((load_E.double().mean() - load_E).sign(), alpha=self.bias_update_rate)
        load_E.zero_()
        self.calls_without_update = 0


def update_expert_bias(model: nn.Module) -> None:
    """Moves the balancing biases (`bias_update_rate`) of a model's routers; once after each `optimizer.step()`."""
    for module in model.modules():
        if isinstance(module, TopKRouter) and module.bias_update_rate > 0:
            module.update_bias()


def is_recomputation() -> bool:
    """Activation checkpointing runs the layer again inside the backward pass: this call is not a new one."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
