"""What every router is and returns, and the gate of those that have one.

Shapes, by suffix: G groups, N tokens in a group, D width, E experts, K choices, R rows handed to the experts.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmoe.moe.autograd import apply
from vmoe.moe.config import RoutingSettings
from vmoe.moe.dispatch import Capacity
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


def without_autocast(device: torch.device) -> AbstractContextManager:
    """The block computes in the types that it names; the meta device, which only counts, knows no autocast."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


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
