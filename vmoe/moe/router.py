"""The learned part of routing: a linear gate, its noise, and the choice of K experts for each token.

Shapes, by suffix: G groups, N tokens in a group, D width, E experts, K choices.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Routing:
    """What the router decided, before anyone is dropped.

    Attributes:
        logits_GNE: the gate's own output, without noise.
        noisy_logits_GNE: what the choice was made from; the same tensor where there is no noise.
        gates_GNE: softmax of `logits_GNE`.
        noisy_gates_GNE: softmax of `noisy_logits_GNE`; the combine weights are its entries.
        noise_std: standard deviation of the noise that was added to the logits; 0 for none.
        expert_index_GNK: the K experts with the largest noisy gates, best first; equal gates: lower index first.
        combine_weights_GNK: their noisy gates, not renormalised.
    """

    logits_GNE: Tensor
    noisy_logits_GNE: Tensor
    gates_GNE: Tensor
    noisy_gates_GNE: Tensor
    noise_std: float
    expert_index_GNK: Tensor
    combine_weights_GNK: Tensor


def top_k_experts(gates_GNE: Tensor, num_selected_experts: int) -> Tensor:
    """Indices (..., K) of the K largest gates, best first; equal gates: the lower index first."""
    if num_selected_experts == 1:
        return gates_GNE.argmax(dim=-1, keepdim=True)  # the first of equal maxima
    # torch.topk leaves the order of equal values open, a stable sort does not.
    return gates_GNE.argsort(dim=-1, descending=True, stable=True)[..., :num_selected_experts]


class TopKRouter(nn.Module):
    """V-MoE's noisy top-K router (arXiv 2106.05974, section 2.2): softmax over all experts first, then the choice.

    Args:
        dim: D.
        num_experts: E.
        num_selected_experts: K, 1 <= K <= E.
        noise_std: in training, normal noise of standard deviation `noise_std / E` is added to the logits.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        num_selected_experts: int = 1,
        noise_std: float = 1.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.num_selected_experts = num_selected_experts
        self.noise_std = noise_std
        self.weight = nn.Parameter(torch.empty(num_experts, dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Truncated normal of variance 1/D, the initialisation of the reference's gate (LeCun normal)."""
        std = self.weight.shape[1] ** -0.5 / 0.87962566103423978  # truncation at two deviations shrinks the variance
        nn.init.trunc_normal_(self.weight, std=std, a=-2 * std, b=2 * std)

    def forward(self, x_GND: Tensor) -> Routing:
        """Route the tokens. Computed in float32 (float64 for float64 input), under autocast too."""
        dtype = torch.promote_types(x_GND.dtype, torch.float32)
        with torch.autocast(x_GND.device.type, enabled=False):
            logits_GNE = F.linear(x_GND.to(dtype), self.weight.to(dtype))
            gates_GNE = logits_GNE.softmax(dim=-1)
            noisy_logits_GNE, noisy_gates_GNE, noise_std = logits_GNE, gates_GNE, 0.0
            if self.training and self.noise_std > 0:
                noise_std = self.noise_std / self.num_experts
                noisy_logits_GNE = logits_GNE + noise_std * torch.randn_like(logits_GNE)
                noisy_gates_GNE = noisy_logits_GNE.softmax(dim=-1)
            expert_index_GNK = top_k_experts(noisy_gates_GNE.detach(), self.num_selected_experts)
            combine_weights_GNK = noisy_gates_GNE.gather(-1, expert_index_GNK)
        return Routing(
            logits_GNE,
            noisy_logits_GNE,
            gates_GNE,
            noisy_gates_GNE,
            noise_std,
            expert_index_GNK,
            combine_weights_GNK,
        )
