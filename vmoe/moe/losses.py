"""Auxiliary losses of routing: pure functions of the gates, and their weighted sum.

Each takes (G, N, E) tensors and an optional mask (G, N), True where a token counts. It is computed for each group; the
result is the mean over the groups that have a token: a scalar, zero if none has. With `over_batch` it is computed once
for the tokens of all groups, in training those of all processes. Variances are those of a population.

V-MoE: arXiv 2106.05974. Shazeer et al.: 1701.06538. GShard: 2006.16668. ST-MoE: 2202.08906. LIMoE: 2206.02770.

Shapes, by suffix: G groups, N tokens in a group, E experts.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from vmoe.moe.config import RoutingSettings
from vmoe.moe.groups import TokenGroups
from vmoe.moe.router import Routing
from vmoe.moe.top_k import top_k_experts


def importance_loss(gates_GNE: Tensor, mask_GN: Tensor | None = None, over_batch: bool = False) -> Tensor:
    """Squared coefficient of variation of the sums of the experts' gates (V-MoE, A.2; Shazeer, eq. 6)."""
    # Of the mean instead of the sum: the coefficient of variation is the same.
    return _by_group(_squared_variation, gates_GNE, mask_GN, over_batch)


def load_loss(
    logits_GNE: Tensor,
    noisy_logits_GNE: Tensor,
    noise_std: float | Tensor,
    num_selected_experts: int,
    mask_GN: Tensor | None = None,
    over_batch: bool = False,
) -> Tensor:
    """Squared coefficient of variation of the experts' expected load (V-MoE, A.2; Shazeer, eq. 8 to 11).

    The load is the probability that a token would choose the expert if the noise, of standard deviation `noise_std`
    (a (G, N, E) tensor where it is learned), were drawn again: the chance to get above the K-th largest noisy logit.
    With learned noise it is Shazeer's: the K-th largest of the *other* experts.
    """
    K = num_selected_experts
    learned = isinstance(noise_std, Tensor)
    if learned and logits_GNE.shape[-1] == K:  # every expert is chosen whatever the noise: the load is even
        return logits_GNE.sum() * 0
    # In the order of `top_k_experts`: with equal logits the gradient must go where the reference's goes, to the later.
    best_GNK = top_k_experts(noisy_logits_GNE.detach(), K + learned)
    sorted_GNK = noisy_logits_GNE.gather(-1, best_GNK)
    threshold_GNE = sorted_GNK[..., K - 1, None]
    if learned:
        is_chosen_GNE = torch.zeros_like(logits_GNE, dtype=torch.bool).scatter(-1, best_GNK[..., :K], True)
        threshold_GNE = torch.where(is_chosen_GNE, sorted_GNK[..., K, None], threshold_GNE)
    chosen_GNE = torch.special.ndtr((logits_GNE - threshold_GNE) / noise_std)
    return _by_group(_squared_variation, chosen_GNE, mask_GN, over_batch)


def load_importance_loss(
    logits_GNE: Tensor,
    noisy_logits_GNE: Tensor,
    noise_std: float,
    num_selected_experts: int,
    mask_GN: Tensor | None = None,
    over_batch: bool = False,
) -> Tensor:
    """Mean of importance and load loss as Tutel computes them (github.com/microsoft/tutel, arXiv 2206.03382).

    Variances are those of a sample, and what is compared with the K-th largest noisy logit is the gate, not the logit.
    """
    K, E = num_selected_experts, logits_GNE.shape[-1]
    best_GNK = top_k_experts(noisy_logits_GNE.detach(), K)
    threshold_GN1 = noisy_logits_GNE.gather(-1, best_GNK)[..., K - 1 :]
    gates_GNE = logits_GNE.softmax(-1)
    chosen_GNE = torch.special.ndtr((gates_GNE - threshold_GN1) / noise_std)

    def loss_of(mean_GE: Tensor) -> Tensor:
        sums_GE = mean_GE * logits_GNE.shape[1]
        return sum(x.var(-1) / (x.mean(-1).square() + 1e-10) for x in sums_GE.chunk(2, dim=-1)) / 2

    if E == 1:  # nothing to balance, and a sample of one has no variance
        return logits_GNE.sum() * 0
    return _by_group(loss_of, torch.cat([gates_GNE, chosen_GNE], dim=-1), mask_GN, over_batch)


def gshard_loss(gates_GNE: Tensor, mask_GN: Tensor | None = None, over_batch: bool = False) -> Tensor:
    """mean_e(share of tokens whose first choice is e · mean gate of e) · E², with noise (GShard, algorithm 1)."""
    E = gates_GNE.shape[-1]
    # A comparison, not a one-hot: the same thing without a check of the indices, which would ask the device.
    first_GNE = (gates_GNE.argmax(dim=-1, keepdim=True) == torch.arange(E, device=gates_GNE.device)).to(gates_GNE.dtype)

    def loss_of(mean_GE: Tensor) -> Tensor:
        share_GE, gate_GE = mean_GE.chunk(2, dim=-1)
        return (share_GE * gate_GE).mean(-1) * E**2

    return _by_group(loss_of, torch.cat([first_GNE, gates_GNE], dim=-1), mask_GN, over_batch)


def z_loss(logits_GNE: Tensor, mask_GN: Tensor | None = None, over_batch: bool = False) -> Tensor:
    """Mean squared log-partition of the logits: keeps them small, so that they stay exact (ST-MoE, eq. 5)."""
    squared_GN1 = torch.logsumexp(logits_GNE, dim=-1, keepdim=True).square()
    return _by_group(lambda mean_G1: mean_G1[:, 0], squared_GN1, mask_GN, over_batch)


def local_entropy_loss(gates_GNE: Tensor, mask_GN: Tensor | None = None, over_batch: bool = False) -> Tensor:
    """Mean entropy of the tokens' gates, in nats: low when each token is sure of its expert (LIMoE, section 2.2)."""
    return _by_group(lambda mean_G1: mean_G1[:, 0], entropy_of(gates_GNE)[..., None], mask_GN, over_batch)


def global_entropy_loss(
    gates_GNE: Tensor, mask_GN: Tensor | None = None, min_experts: float | None = None, over_batch: bool = False
) -> Tensor:
    """Negative entropy -H of the mean gate, in nats: low when the modality uses many experts (LIMoE, section 2.2).

    With `min_experts`, the soft minimum S that the modality should use, it is max(0, log S - H).
    """

    def loss_of(mean_GE: Tensor) -> Tensor:
        loss_G = -entropy_of(mean_GE)
        if min_experts is None:
            return loss_G
        return torch.where(mean_GE.sum(-1) > 0, (math.log(min_experts) + loss_G).clamp(min=0), 0)  # no token, no loss

    return _by_group(loss_of, gates_GNE, mask_GN, over_batch)


@dataclass(frozen=True)
class AuxiliaryLosses:
    """All auxiliary losses of a layer, with their weights.

    Attributes:
        weights: {name of the loss: weight}; with several modalities by names such as "text/local_entropy_loss".
        min_experts: {modality: threshold of its global entropy loss, or None}.
        noise_std: of the gate's noise in training, for the `load_importance_loss`.
        over_batch: computed once for all tokens of a batch, not for each routing group.
    """

    weights: dict[str, float]
    min_experts: dict[str, float | None]
    noise_std: float
    over_batch: bool = False

    @classmethod
    def from_settings(cls, settings: RoutingSettings, modalities: tuple[str, ...]) -> "AuxiliaryLosses":
        """The losses that the settings ask for. ValueError: a setting names a modality that there is not."""
        plain = ("importance_loss", "load_loss", "load_importance_loss", "gshard_loss", "z_loss")
        weights = {name: getattr(settings, name) for name in plain}
        for loss in ("local_entropy_loss", "global_entropy_loss"):
            own = _per_modality(settings, loss, modalities, 0.0)
            weights |= {f"{prefix}{loss}": own[name] for name, prefix in _prefixes(modalities).items()}
        min_experts = _per_modality(settings, "global_entropy_min_experts", modalities, None)
        noise_std = settings.noise_std * settings.ensemble_size / settings.num_experts  # over the experts of a member
        return cls(weights, min_experts, noise_std, settings.auxiliary_loss_scope == "batch")

    def any_for(self, routing: Routing) -> bool:
        """One with a weight applies to this routing."""
        return any(weight > 0 and (name != "load_loss" or routing.has_load) for name, weight in self.weights.items())

    def compute(self, routing: Routing, groups: TokenGroups, weighted: bool = True) -> dict[str, Tensor]:
        """{name: loss} of those with a weight, and their sum "auxiliary_loss"; or of the others, without a gradient."""
        r, over_batch, every = routing, self.over_batch, (groups.mask_GN, self.over_batch)
        calls = {
            "importance_loss": (importance_loss, r.gates_GNE if r.importance_GNE is None else r.importance_GNE, *every),
            "gshard_loss": (gshard_loss, r.noisy_gates_GNE, *every),
            "z_loss": (z_loss, r.logits_GNE, *every),
        }
        K = r.expert_index_GNK.shape[-1] if r.per_token else 0
        if r.has_load:
            calls["load_loss"] = (load_loss, r.logits_GNE, r.noisy_logits_GNE, r.noise_std, K, *every)
        if self.weights["load_importance_loss"] > 0:
            both = (load_importance_loss, r.logits_GNE, r.noisy_logits_GNE, self.noise_std, K)
            calls["load_importance_loss"] = (*both, *every)
        prefixes = _prefixes(groups.modalities)
        for name, own_GN in groups.mask_by_modality.items():
            local, overall = (f"{prefixes[name]}{kind}_entropy_loss" for kind in ("local", "global"))
            calls[local] = (local_entropy_loss, r.gates_GNE, own_GN, over_batch)
            calls[overall] = (global_entropy_loss, r.gates_GNE, own_GN, self.min_experts[name], over_batch)
        with torch.set_grad_enabled(torch.is_grad_enabled() and weighted):
            found = {name: loss(*of) for name, (loss, *of) in calls.items() if (self.weights[name] > 0) == weighted}
            if weighted:
                terms = [self.weights[name] * loss for name, loss in found.items()]
                found["auxiliary_loss"] = torch.stack(terms).sum() if terms else r.gates_GNE.new_zeros(())
        return found


def _prefixes(modalities: tuple[str, ...]) -> dict[str, str]:
    """{modality: what is before the names of its losses}, nothing where there is a single one."""
    return {name: f"{name}/" if len(modalities) > 1 else "" for name in modalities}


def _per_modality(settings: RoutingSettings, name: str, modalities: tuple[str, ...], default: float | None) -> dict:
    """{modality: value} of a setting with one value for all, or with a mapping that may leave some out."""
    value = getattr(settings, name)
    if not isinstance(value, Mapping):
        return dict.fromkeys(modalities, value)
    unknown = set(value) - set(modalities)
    if unknown:
        raise ValueError(f"{name} names {sorted(unknown)}, but the modalities are {list(modalities)}")
    return {modality: value.get(modality, default) for modality in modalities}


def entropy_of(p: Tensor) -> Tensor:
    """Entropy along the last axis in nats; 0·log 0 = 0, with a finite gradient there."""
    return -(p * p.clamp(min=torch.finfo(p.dtype).tiny).log()).sum(-1)


def _squared_variation(x_GE: Tensor) -> Tensor:
    """(G,) variance over mean squared of each row, zero for a row of zeros."""
    mean_G1 = x_GE.mean(-1, keepdim=True)
    variance_G = (x_GE - mean_G1).square().mean(-1)
    return variance_G / mean_G1[:, 0].square().clamp(min=torch.finfo(x_GE.dtype).tiny)


def _by_group(loss_of: Callable[[Tensor], Tensor], x_GNE: Tensor, mask_GN: Tensor | None, over_batch: bool) -> Tensor:
    """`loss_of` the (G, E) means over each group's tokens; its mean over the groups that have a token that counts."""
    if over_batch:
        return loss_of(_batch_mean(x_GNE, mask_GN)).sum()
    if mask_GN is None:
        loss_G = loss_of(x_GNE.mean(1))
        return loss_G.sum() / max(1, loss_G.numel())  # an empty batch has no group
    # `where`, not a multiplication: padding may hold anything, even NaN.
    mean_GE = torch.where(mask_GN[..., None], x_GNE, 0).sum(1) / mask_GN.sum(1, keepdim=True).clamp(min=1)
    used_G = mask_GN.any(1)
    return torch.where(used_G, loss_of(mean_GE), 0).sum() / used_G.sum().clamp(min=1)


def _batch_mean(x_GNE: Tensor, mask_GN: Tensor | None) -> Tensor:
    """(1, E) mean over the tokens of all groups; in training steps, which have a gradient, those of all processes."""
    if mask_GN is not None:
        x_GNE = torch.where(mask_GN[..., None], x_GNE, 0)
    sum_E = x_GNE.sum((0, 1))
    count = sum_E.new_full((1,), x_GNE.shape[0] * x_GNE.shape[1]) if mask_GN is None else mask_GN.sum().to(sum_E)[None]
    if dist.is_available() and dist.is_initialized() and torch.is_grad_enabled() and sum_E.requires_grad:
        sum_E, count = _SumOverProcesses.apply(torch.cat([sum_E, count])).split([len(sum_E), 1])
    return (sum_E / count.clamp(min=1))[None]


class _SumOverProcesses(torch.autograd.Function):
    """All processes make the same loss of the sum, and training averages their gradients: so those are added up too."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _SumOverProcesses.apply(grad)
