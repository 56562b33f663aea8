"""Expert choice: each expert takes its best tokens (Zhou et al., arXiv 2202.09368; the reference's TopItemsPerExpert).

Each expert takes its best patches and, separately, its best text tokens. In a contrastive model a shared choice would
let an image's features depend on its own caption, which is what the model is asked to guess.

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
        weight_R: combine weight of each row; zero for a row without a token.
        filled_R: bool, the row has a token; None: every row has.
        taken_GNE: bool, the expert took the token.
        weights_GNE: the combine weights, zero where it did not.
    """

    token_R: Tensor
    weight_R: Tensor
    filled_R: Tensor | None
    taken_GNE: Tensor
    weights_GNE: Tensor

    def dispatch(self, x_GND: Tensor) -> Tensor:
        # A row without a token is a copy of another, without a gradient: the experts are as finite for it as for that.
        x_RD = x_GND.flatten(0, 1).index_select(0, self.token_R)
        return x_RD if self.filled_R is None else torch.where(self.filled_R[:, None], x_RD, x_RD.detach())

    def combine(self, y_RD: Tensor) -> Tensor:
        G, N, _ = self.taken_GNE.shape
        y_RD = y_RD * self.weight_R.to(y_RD.dtype)[:, None]
        if self.filled_R is not None:
            y_RD = torch.where(self.filled_R[:, None], y_RD, 0)
        return y_RD.new_zeros(G * N, y_RD.shape[1]).index_add(0, self.token_R, y_RD).unflatten(0, (G, N))

    def listed(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.list_all(self.weights_GNE, self.taken_GNE)


class ExpertChoiceRouter(Gate):
    """The router of expert choice: softmax over the experts, with the noise of `Gate` in training."""

    per_token = False

    def __init__(self, dim: int, config: RoutingSettings, device=None, dtype=None) -> None:
        super().__init__(dim, config, device, dtype)
        self.reset_parameters()

    def assign(
        self, logits: Tensor | tuple[Tensor, Tensor], groups: TokenGroups, capacity: Capacity, batch_priority: bool
    ) -> Assignment:
        """Each expert takes its best tokens; see `choose_tokens`."""
        with without_autocast(self.weight.device):
            routing, _ = self.gates(logits)
        G, N, _ = routing.logits_GNE.shape
        mask_GMN = groups.mask_GMN
        rows, max_rows = capacity.rows(N if G else 0, self.num_experts, 1, mask_GMN, self.ensemble_size)
        return choose_tokens(routing, rows, max_rows, mask_GMN, self.normalize_weights)


def choose_tokens(
    routing: Routing,
    capacity: int | Tensor,
    max_capacity: int,
    mask_GMN: Tensor | None = None,
    normalize_weights: bool = False,
) -> ExpertChoiceAssignment:
    """Each expert takes the tokens with its largest gates (the noisy ones); equal gates: the earlier token first.

    `capacity`: tokens per expert, group and modality: a number, or (G, M), at most `max_capacity`. `mask_GMN`: True
    for the real tokens of each modality; None: all tokens, one modality.
    """
    gates_GNE = routing.noisy_gates_GNE
    (G, N, E), device = gates_GNE.shape, gates_GNE.device
    C = min(max_capacity, N)
    score_GMNE = gates_GNE.detach()[:, None]
    if mask_GMN is not None:
        score_GMNE = score_GMNE.masked_fill(~mask_GMN[..., None], -1.0)
    # torch.topk leaves the order of equal values open, a stable sort does not.
    token_GMCE = score_GMNE.argsort(dim=2, descending=True, stable=True)[:, :, :C]
    filled_GMCE = score_GMNE.gather(2, token_GMCE) != -1.0
    if isinstance(capacity, Tensor):
        filled_GMCE = filled_GMCE & (torch.arange(C, device=device)[:, None] < capacity[:, :, None, None])
    taken_GNE = torch.zeros_like(score_GMNE, dtype=torch.bool).scatter(2, token_GMCE, filled_GMCE).any(1)
    weights_GNE = torch.where(taken_GNE, gates_GNE, 0)
    if normalize_weights:
        weights_GNE = normalized(weights_GNE)
    weight_GMCE = weights_GNE[:, None].expand_as(score_GMNE).gather(2, token_GMCE)

    first_G111 = torch.arange(0, G * N, N, device=device).view(G, 1, 1, 1)
    by_row = (first_G111 + token_GMCE, weight_GMCE, filled_GMCE)
    members = routing.ensemble_size
    token_R, weight_R, filled_R = (
        each_GMCE.unflatten(0, (members, -1)).permute(0, 4, 1, 2, 3).flatten() for each_GMCE in by_row
    )
    if mask_GMN is None:
        filled_R = None
    else:
        first_real = mask_GMN.any(1).flatten().int().argmax() if mask_GMN.numel() else 0
        weight_R, token_R = torch.where(filled_R, weight_R, 0), torch.where(filled_R, token_R, first_real)
    most = token_R.shape[0] // (members * E)
    return ExpertChoiceAssignment(routing, most, token_R, weight_R, filled_R, taken_GNE, weights_GNE)
