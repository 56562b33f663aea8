"""Expert choice: each expert takes its best tokens (Zhou et al., arXiv 2202.09368; the reference's TopItemsPerExpert).

Every expert is full, some tokens go to several experts and some to none. Tokens of different modalities never compete:
each expert takes its best patches and, by themselves, its best words. In a contrastive model a shared choice would let
a picture's features depend on its own caption, which is what the model is asked to guess.

Shapes, by suffix: G groups, N tokens in a group, D width, E experts, M modalities, C capacity, R rows = E*G*M*C.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vmoe.moe.router import Gate, Routing, normalized, softmax_of_experts, without_autocast


class ExpertChoiceRouter(Gate):
    """The gate of expert choice: softmax over the experts, with the noise of `Gate` in training."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.reset_parameters()

    def forward(self, x_GND: Tensor) -> Routing:
        """The gates; which tokens the experts take is `choose_tokens`. In float32, under autocast too."""
        with without_autocast(x_GND.device):
            logits_GNE, noisy_logits_GNE, noise_std = self.logits(self.input(x_GND))
            noisy_gates_GNE = softmax_of_experts(noisy_logits_GNE)
            gates_GNE = noisy_gates_GNE
            if noisy_logits_GNE is not logits_GNE:
                gates_GNE = softmax_of_experts(logits_GNE)
        return Routing(logits_GNE, noisy_logits_GNE, gates_GNE, noisy_gates_GNE, noise_std, per_token=False)


@dataclass(frozen=True)
class ChosenTokens:
    """The tokens that the experts took; rows are sorted by expert, then group, modality and falling gate.

    Attributes:
        token_R: flat index into (G, N) of each row's token; -1 for a row that nobody fills.
        weight_R: combine weight of each row, differentiable; zero where nobody fills it.
        count_E: rows of each expert.
        taken_GNE: bool, the expert took the token.
        weights_GNE: the combine weights, zero where it did not.
        has_holes: False when every row surely has a token.
    """

    token_R: Tensor
    weight_R: Tensor
    count_E: Tensor
    taken_GNE: Tensor
    weights_GNE: Tensor
    has_holes: bool


def choose_tokens(
    gates_GNE: Tensor,
    capacity: int | Tensor,
    max_capacity: int,
    members_GMN: Tensor | None = None,
    normalize_weights: bool = False,
) -> ChosenTokens:
    """Each expert takes the `capacity` tokens with its largest gates; equal gates: the earlier token first.

    Args:
        gates_GNE: what the choice is made from; the combine weights are its entries.
        capacity: tokens per expert, group and modality: a number, or (G, M) where masks make it differ.
        max_capacity: the most that `capacity` can be.
        members_GMN: True for the real tokens of each modality; None: all tokens, one modality.
        normalize_weights: divide the weights of each token by their sum over the experts that took it.
    """
    G, N, E = gates_GNE.shape
    device = gates_GNE.device
    C = min(max_capacity, N)
    score_GMNE = gates_GNE.detach()[:, None]
    if members_GMN is not None:
        score_GMNE = score_GMNE.masked_fill(~members_GMN[..., None], -1.0)
    # torch.topk leaves the order of equal values open, a stable sort does not.
    token_GMCE = score_GMNE.argsort(dim=2, descending=True, stable=True)[:, :, :C]
    has_holes = members_GMN is not None
    group_G111 = torch.arange(G, device=device).view(G, 1, 1, 1)
    token_EGMC = (group_G111 * N + token_GMCE).permute(3, 0, 1, 2)
    expert_EGMC = torch.arange(E, device=device).view(E, 1, 1, 1).expand_as(token_EGMC)
    token_R, expert_R = token_EGMC.flatten(), expert_EGMC.flatten()
    if has_holes:
        filled_GMCE = score_GMNE.gather(2, token_GMCE) >= 0
        if isinstance(capacity, Tensor):
            place_C1 = torch.arange(C, device=device)[:, None]
            filled_GMCE = filled_GMCE & (place_C1 < capacity[:, :, None, None])
        filled_R = filled_GMCE.permute(3, 0, 1, 2).flatten()
    else:
        filled_R = torch.ones_like(token_R, dtype=torch.bool)

    taken = torch.zeros(G * N, E, dtype=torch.int32, device=device)
    taken.index_put_((token_R, expert_R), filled_R.int(), accumulate=True)  # a hole adds nothing
    taken_GNE = (taken > 0).view(G, N, E)
    count_E = torch.full((E,), token_R.numel() // E, dtype=torch.long, device=device)
    if has_holes and device.type == "cpu" and not torch.compiler.is_compiling():
        # Where it costs no synchronisation, nothing is computed for rows that nobody fills.
        count_E = filled_R.view(E, -1).sum(1)
        token_R, expert_R = token_R[filled_R], expert_R[filled_R]
        filled_R, has_holes = torch.ones_like(token_R, dtype=torch.bool), False

    weights_GNE = torch.where(taken_GNE, gates_GNE, 0)
    if normalize_weights:
        weights_GNE = normalized(weights_GNE)
    weight_R = weights_GNE.reshape(-1)[token_R * E + expert_R]
    if has_holes:
        weight_R = torch.where(filled_R, weight_R, 0)
        token_R = torch.where(filled_R, token_R, -1)
    return ChosenTokens(token_R, weight_R, count_E, taken_GNE, weights_GNE, has_holes)


def gather_tokens(x_GND: Tensor, chosen: ChosenTokens) -> Tensor:
    """Copy the tokens to the rows of the experts that took them: (R, D), zero for a row that nobody fills."""
    x_RD = x_GND.flatten(0, 1).index_select(0, chosen.token_R.clamp(min=0))
    return torch.where(chosen.token_R[:, None] >= 0, x_RD, 0) if chosen.has_holes else x_RD


def return_rows(y_RD: Tensor, chosen: ChosenTokens, num_groups: int, num_tokens: int) -> Tensor:
    """Weigh the experts' rows and add them up per token: (G, N, D), zero for a token that nobody took."""
    y_RD = y_RD * chosen.weight_R.to(y_RD.dtype)[:, None]
    y_SD = y_RD.new_zeros(num_groups * num_tokens, y_RD.shape[-1])
    y_SD = y_SD.index_add(0, chosen.token_R.clamp(min=0), y_RD)
    return y_SD.view(num_groups, num_tokens, y_RD.shape[1])
