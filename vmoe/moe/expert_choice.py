"""Expert choice: each expert takes its best tokens (Zhou et al., arXiv 2202.09368; the reference's TopItemsPerExpert).

Tokens of different modalities never compete: each expert takes its best patches and, separately, its best text tokens.
In a contrastive model a shared choice would let an image's features depend on its own caption, which is what the model
is asked to guess.

Shapes, by suffix: G groups, N tokens in a group, D width, E experts, M modalities, C capacity, R rows = E*G*M*C.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vmoe.moe.config import RoutingSettings
from vmoe.moe.dispatch import Capacity
from vmoe.moe.groups import TokenGroups
from vmoe.moe.router import Assignment, Gate, Routing, normalized, without_autocast


@dataclass(frozen=True)
class ExpertChoiceAssignment(Assignment):
    """The tokens that the experts took; rows are sorted by expert, then group, modality and descending gate.

    Attributes:
        token_R: flat index into (G, N) of each row's token; for a row without one, that of the first real token.
        weight_R: combine weight of each row, differentiable; zero for a row without a token.
        filled_R: bool, the row has a token; None: every row has.
        taken_GNE: bool, the expert took the token.
        weights_GNE: the combine weights, zero where it did not.
        real_GN: bool, the token is real; None: all are.
    """

    routing: Routing
    token_R: Tensor
    weight_R: Tensor
    filled_R: Tensor | None
    taken_GNE: Tensor
    weights_GNE: Tensor
    real_GN: Tensor | None

    @property
    def max_count(self) -> int:
        return self.token_R.numel() // self.taken_GNE.shape[2]

    @property
    def count_E(self) -> Tensor:
        return torch.full((self.taken_GNE.shape[2],), self.max_count, dtype=torch.long, device=self.token_R.device)

    def dispatch(self, x_GND: Tensor) -> Tensor:
        # A row without a token is a copy of another, without a gradient: the experts are as finite for it as for that.
        x_RD = x_GND.flatten(0, 1).index_select(0, self.token_R)
        return x_RD if self.filled_R is None else torch.where(self.filled_R[:, None], x_RD, x_RD.detach())

    def combine(self, y_RD: Tensor) -> Tensor:
        G, N, _ = self.taken_GNE.shape
        y_RD = y_RD * self.weight_R.to(y_RD.dtype)[:, None]
        if self.filled_R is not None:
            y_RD = torch.where(self.filled_R[:, None], y_RD, 0)
        y_SD = y_RD.new_zeros(G * N, y_RD.shape[1]).index_add(0, self.token_R, y_RD)
        return y_SD.view(G, N, y_RD.shape[1])

    def listed(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.list_all(self.weights_GNE, self.taken_GNE)

    def statistics(self) -> dict[str, Tensor]:
        number_GN = self.taken_GNE.sum(-1)
        real_S = number_GN.flatten() if self.real_GN is None else number_GN[self.real_GN]
        if real_S.numel() == 0:
            return {}
        return {"experts_per_token_min": real_S.min(), "experts_per_token_max": real_S.max()}


class ExpertChoiceRouter(Gate):
    """The router of expert choice: softmax over the experts, with the noise of `Gate` in training."""

    def __init__(self, dim: int, config: RoutingSettings, device=None, dtype=None) -> None:
        super().__init__(dim, config, device, dtype)
        self.reset_parameters()

    def forward(self, tokens: TokenGroups, capacity: Capacity, batch_priority: bool = False) -> ExpertChoiceAssignment:
        """Each expert takes its best tokens; see `choose_tokens`."""
        G, N, _ = tokens.x_GND.shape
        members_GMN = tokens.members_GMN
        rows, max_rows = capacity.rows(N if G else 0, self.num_experts, 1, members_GMN)
        with without_autocast(tokens.x_GND.device):
            routing, _ = self.gates(tokens.x_GND)
        return choose_tokens(routing, rows, max_rows, members_GMN, self.normalize_weights)


def choose_tokens(
    routing: Routing,
    capacity: int | Tensor,
    max_capacity: int,
    members_GMN: Tensor | None = None,
    normalize_weights: bool = False,
) -> ExpertChoiceAssignment:
    """Each expert takes the `capacity` tokens with its largest gates; equal gates: the earlier token first.

    Args:
        routing: the choice is made from its noisy gates; the combine weights are their entries.
        capacity: tokens per expert, group and modality: a number, or (G, M), at most `max_capacity`.
        members_GMN: True for the real tokens of each modality; None: all tokens, one modality.
        normalize_weights: the weights of a token sum to one.
    """
    gates_GNE = routing.noisy_gates_GNE
    G, N, E = gates_GNE.shape
    device = gates_GNE.device
    C = min(max_capacity, N)
    score_GMNE = gates_GNE.detach()[:, None]
    if members_GMN is not None:
        score_GMNE = score_GMNE.masked_fill(~members_GMN[..., None], -1.0)
    # torch.topk leaves the order of equal values open, a stable sort does not.
    token_GMCE = score_GMNE.argsort(dim=2, descending=True, stable=True)[:, :, :C]
    group_G111 = torch.arange(G, device=device).view(G, 1, 1, 1)
    token_EGMC = (group_G111 * N + token_GMCE).permute(3, 0, 1, 2)
    expert_EGMC = torch.arange(E, device=device).view(E, 1, 1, 1).expand_as(token_EGMC)
    token_R, expert_R, filled_R = token_EGMC.flatten(), expert_EGMC.flatten(), None
    if members_GMN is not None:
        filled_GMCE = score_GMNE.gather(2, token_GMCE) >= 0
        if isinstance(capacity, Tensor):
            filled_GMCE = filled_GMCE & (torch.arange(C, device=device)[:, None] < capacity[:, :, None, None])
        filled_R = filled_GMCE.permute(3, 0, 1, 2).flatten()

    taken = torch.zeros(G * N, E, dtype=torch.int32, device=device)
    ones_R = torch.ones_like(token_R, dtype=torch.int32) if filled_R is None else filled_R.int()
    taken_GNE = (taken.index_put((token_R, expert_R), ones_R, accumulate=True) > 0).view(G, N, E)
    weights_GNE = torch.where(taken_GNE, gates_GNE, 0)
    if normalize_weights:
        weights_GNE = normalized(weights_GNE)
    weight_R = weights_GNE.reshape(-1)[token_R * E + expert_R]
    if filled_R is not None:
        first_real = members_GMN.any(1).flatten().int().argmax() if members_GMN.numel() else 0
        weight_R, token_R = torch.where(filled_R, weight_R, 0), torch.where(filled_R, token_R, first_real)
    real_GN = None if members_GMN is None else members_GMN.any(1)
    return ExpertChoiceAssignment(routing, token_R, weight_R, filled_R, taken_GNE, weights_GNE, real_GN)
