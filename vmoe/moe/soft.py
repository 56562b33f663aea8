"""Soft MoE: each slot of an expert sees a weighted average of all tokens, each token gets one of all slots.

Puigcerver et al., arXiv 2308.00951. Nothing is dropped. Tokens of different modalities are averaged separately.

Shapes, by suffix: G groups, N tokens in a group, D width, E experts, P slots per expert, S = E*P slots, M modalities.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vmoe.moe.config import RoutingSettings
from vmoe.moe.dispatch import Capacity
from vmoe.moe.groups import TokenGroups
from vmoe.moe.router import Assignment, Router, Routing, lecun_normal_, without_autocast


def unit_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(sum x² + eps) along the last axis, the reference's normalisation."""
    return x * (x.square().sum(-1, keepdim=True) + eps).rsqrt()


@dataclass(frozen=True)
class SoftAssignment(Assignment):
    """Weights between tokens and slots.

    Attributes:
        routing: for losses and records; its gates are the combine weights summed over an expert's slots.
        dispatch_GMNS: share of each token in each slot's input: sums to 1 over the tokens of its modality.
        combine_GNS: share of each slot's output in each token's: sums to 1 over the slots.
        mask_GMN: True for the real tokens of each modality; None: all tokens, one modality.
    """

    dispatch_GMNS: Tensor
    combine_GNS: Tensor
    mask_GMN: Tensor | None

    def dispatch(self, x_GND: Tensor) -> Tensor:
        (G, M, _, S), E, D = self.dispatch_GMNS.shape, self.routing.gates_GNE.shape[2], x_GND.shape[2]
        # A batched matrix multiplication of (G, S, N) and (G, N, D), once per modality.
        z_GMSD = self.dispatch_GMNS.to(x_GND.dtype).transpose(2, 3) @ x_GND[:, None]
        if self.mask_GMN is not None:  # slots of a modality without tokens: the experts are as finite for a mean
            used_GM11 = self.mask_GMN.any(-1)[..., None, None]
            z_GMSD = torch.where(used_GM11, z_GMSD, x_GND.mean(1)[:, None, None].detach())
        return z_GMSD.view(G, M, E, S // E, D).permute(2, 0, 1, 3, 4).flatten(0, 3)

    def combine(self, y_RD: Tensor) -> Tensor:
        (G, M, _, S), E, D = self.dispatch_GMNS.shape, self.routing.gates_GNE.shape[2], y_RD.shape[1]
        y_GMSD = y_RD.view(E, G, M, S // E, D).permute(1, 2, 0, 3, 4).flatten(2, 3)
        y_GMND = self.combine_GNS.to(y_RD.dtype)[:, None] @ y_GMSD
        if self.mask_GMN is None:
            return y_GMND.squeeze(1)
        return torch.where(self.mask_GMN[..., None], y_GMND, 0).sum(1)

    def listed(self) -> tuple[Tensor, Tensor, Tensor]:
        gates_GNE = self.routing.noisy_gates_GNE
        kept_GNE = torch.ones_like(gates_GNE, dtype=torch.bool)
        if self.mask_GMN is not None:
            kept_GNE = kept_GNE & self.mask_GMN.any(1)[..., None]
        return self.list_all(gates_GNE, kept_GNE)


class SoftRouter(Router):
    """Cosine similarity of tokens and learned `slots`, (E, P, D), times a learned `scale`; in training with noise."""

    per_token = False
    soft = True

    def __init__(self, dim: int, config: RoutingSettings, device=None, dtype=None) -> None:
        super().__init__()
        self.noise_std = config.noise_std
        self.slots = nn.Parameter(torch.empty(config.num_experts, config.num_slots, dim, device=device, dtype=dtype))
        self.scale = nn.Parameter(torch.empty((), device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """LeCun normal slots (fan-in D·E, as the reference's initialiser counts it), scale one."""
        lecun_normal_(self.slots, fan_in=self.slots.shape[0] * self.slots.shape[2])
        nn.init.ones_(self.scale)

    def forward(self, x_GND: Tensor) -> Tensor:
        """(G, N, D) -> (G, N, S) logits without noise."""
        dtype = torch.promote_types(x_GND.dtype, torch.float32)
        with without_autocast(x_GND.device):
            slots_SD = unit_norm(self.slots.to(dtype)).flatten(0, 1) * self.scale.to(dtype)
            return unit_norm(x_GND.to(dtype)) @ slots_SD.T

    def assign(self, logits_GNS: Tensor, groups: TokenGroups, capacity: Capacity, batch_priority: bool) -> Assignment:
        """Weights of all tokens and slots."""
        mask_GMN = groups.mask_GMN
        E, P, _ = self.slots.shape
        with without_autocast(logits_GNS.device):
            clean_GNE = noisy_GNE = logits_GNS.unflatten(-1, (E, P)).logsumexp(-1)
            noise_std = self.noise_std if self.training and self.noise_std > 0 else None
            if noise_std is not None:
                logits_GNS = logits_GNS + noise_std * torch.randn_like(logits_GNS)
                noisy_GNE = logits_GNS.unflatten(-1, (E, P)).logsumexp(-1)
            combine_GNS = logits_GNS.softmax(-1)
            if mask_GMN is None:
                dispatch_GMNS = logits_GNS[:, None].softmax(2)
            else:
                # A finite minimum, and zero afterwards: a modality without a token must not give NaN.
                outside = ~mask_GMN[..., None]
                dispatch_GMNS = logits_GNS[:, None].masked_fill(outside, torch.finfo(logits_GNS.dtype).min).softmax(2)
                dispatch_GMNS = dispatch_GMNS.masked_fill(outside, 0)
            noisy_gates_GNE = noisy_GNE.softmax(-1)
            gates_GNE = noisy_gates_GNE if noise_std is None else clean_GNE.softmax(-1)
        routing = Routing(clean_GNE, noisy_GNE, gates_GNE, noisy_gates_GNE, noise_std, soft=True)
        return SoftAssignment(routing, P * math.prod(dispatch_GMNS.shape[:2]), dispatch_GMNS, combine_GNS, mask_GMN)
