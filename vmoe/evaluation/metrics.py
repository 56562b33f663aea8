"""Ranks and the metrics made from them: top-k accuracy and retrieval recall; calibration.

A rank is the number of wrong answers that score at least as high as the right one: 0 is best, and ties are misses.
Scores closer than `TIE_TOLERANCE` of the row's largest magnitude are tied: rounding, and with it the batch size, does
not decide between equal inputs. A score that is NaN is never a hit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

TIE_TOLERANCE = 1e-6


def ranks(scores_BC: Tensor, right_BC: Tensor) -> Tensor:
    """Rank (B,) of the best right answer of each row of scores, 0 = best; `right_BC` says which answers are right."""
    best_B = scores_BC.masked_fill(~right_BC, float("-inf")).amax(dim=1)
    tolerance = TIE_TOLERANCE * scores_BC.abs().amax(dim=1, keepdim=True)
    clearly_below = scores_BC < best_B[:, None] - tolerance  # False for NaN, on either side
    return (~clearly_below & ~right_BC).sum(dim=1)


def right_classes(
    label_B: Tensor, index_B: Tensor, num_classes: int, label_sets: Sequence[Sequence[int]] | None
) -> Tensor:
    """(B, C) bool, which classes are right: each sample's label, or all that `label_sets` has at its index in the data.

    Raises ValueError for a label outside [0, C).
    """
    sets = [[label] for label in label_B.tolist()]
    if label_sets is not None:
        sets = [label_sets[index] for index in index_B.tolist()]
    labels = [label for row in sets for label in row]
    if labels and (min(labels) < 0 or max(labels) >= num_classes):
        found = f"{min(labels)}..{max(labels)}"
        raise ValueError(f"labels must be in 0..{num_classes - 1} for {num_classes} classes, got {found}")
    rows = torch.tensor([row for row, own in enumerate(sets) for _ in own], dtype=torch.long)
    right_BC = torch.zeros(len(sets), num_classes, dtype=torch.bool)
    right_BC[rows, torch.tensor(labels, dtype=torch.long)] = True
    return right_BC.to(label_B.device)


def share_within(ranks_B: Tensor, k: int) -> float:
    """Share (0..1) of rows whose rank is among the first k; 0 for no rows."""
    return float((ranks_B < k).double().mean()) if ranks_B.numel() else 0.0


def top_shares(ranks_N: Tensor, num_classes: int, prefix: str = "") -> dict[str, float]:
    """{"top1", "top5"}: shares of rows whose right class is the best, or among the best five of more than five."""
    return {f"{prefix}top{k}": share_within(ranks_N, k) for k in ((1, 5) if num_classes > 5 else (1,))}


def accuracy_names(num_classes: int) -> list[str]:
    """The names of `accuracies`, of the negative log-likelihood and of the calibration error."""
    return [*top_shares(torch.empty(0), num_classes), "mean_per_class", "nll", "ece"]


def expected_calibration_error(confidences_N: Tensor, hits_N: Tensor, num_bins: int = 15) -> float:
    """Mean distance of the confidence in the best class from the accuracy (Guo et al., arXiv 1706.04599, eq. 3).

    The bins have equal width. Rounded to 1e-6: what is beyond that is rounding of the forward pass.
    """
    confidences_N = confidences_N.double()
    bins_N = (confidences_N * num_bins).ceil().long().clamp(1, num_bins) - 1  # each bin holds its upper end
    excess = confidences_N.new_zeros(num_bins).index_add_(0, bins_N, confidences_N - hits_N.double())
    return round(float(excess.abs().sum() / len(confidences_N)), 6)


def accuracy_per_class(hits_N: Tensor, labels_N: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Accuracy (C,) of each class, NaN without samples, and its number of samples (C,)."""
    counts_C = labels_N.bincount(minlength=num_classes)
    return labels_N.bincount(hits_N.double(), num_classes) / counts_C, counts_C


def accuracies(ranks_N: Tensor, labels_N: Tensor, num_classes: int) -> dict[str, float]:
    """`top_shares`, and "mean_per_class": the mean of the accuracies of the classes that have samples."""
    per_class_C, counts_C = accuracy_per_class(ranks_N == 0, labels_N, num_classes)
    return {**top_shares(ranks_N, num_classes), "mean_per_class": float(per_class_C[counts_C > 0].mean())}


def rounded_mean(values_N: Tensor) -> float:
    """The mean, rounded to 1e-4: what is beyond that is rounding of the forward pass."""
    return round(float(values_N.double().mean()), 4)


def separation(inside_N: Tensor, outside_N: Tensor) -> dict[str, float]:
    """How well confidences tell images of the data from others (arXiv 1610.02136): "auroc", the probability that an
    image of the data has the higher one (a tie counts half), and "fpr95", the share of the others that are at least as
    confident as the 95% most confident images of the data."""
    sorted_N = outside_N.double().sort().values
    below_N, up_to_N = (torch.searchsorted(sorted_N, inside_N.double(), right=right) for right in (False, True))
    least = inside_N.sort(descending=True).values[math.ceil(0.95 * len(inside_N)) - 1]
    auroc = ((below_N + up_to_N).double() / 2).mean() / len(outside_N)
    return {"auroc": round(auroc.item(), 6), "fpr95": round((outside_N >= least).double().mean().item(), 6)}


def members_divergence(logits_BMC: Tensor) -> Tensor:
    """(B,) mean KL divergence in nats between the predictions of two members of an ensemble, over all ordered pairs: 0
    where all agree (the diversity of arXiv 2110.03360)."""
    M, logs_BMC = logits_BMC.shape[1], logits_BMC.log_softmax(-1)
    own_B = (logs_BMC.exp() * logs_BMC).sum((1, 2))
    every_B = (logs_BMC.exp().sum(1) * logs_BMC.sum(1)).sum(1)  # of a member with itself too, which cancels
    return (M * own_B - every_B) / (M * (M - 1))
