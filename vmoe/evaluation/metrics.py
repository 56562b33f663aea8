"""Ranks and the figures made from them: top-k accuracy and retrieval recall; calibration.

A rank is the number of wrong answers that score at least as high as the right one: 0 is best. Ties count against the
model, so one that scores everything equally gets top-1 = 0 instead of a lucky 1. Scores closer than `TIE_TOLERANCE` of
the row's largest magnitude are tied, which keeps the last bits of a float32 product, and with them the batch size,
from deciding between equal inputs. A score that is not a number never is a hit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

TIE_TOLERANCE = 1e-6


def ranks(scores_BC: Tensor, best_B: Tensor, wrong_BC: Tensor) -> Tensor:
    """Rank of the right answer in each row.

    Args:
        scores_BC: scores of all answers, any unit, higher is better.
        best_B: score of the (best) right answer of each row.
        wrong_BC: bool, which answers are wrong for the row.

    Returns:
        Long (B,), 0 = best.
    """
    tolerance = TIE_TOLERANCE * scores_BC.abs().amax(dim=1, keepdim=True)
    clearly_below = scores_BC < best_B[:, None] - tolerance  # False for NaN, on either side
    return (~clearly_below & wrong_BC).sum(dim=1)


def class_ranks(scores_BC: Tensor, right_BC: Tensor) -> Tensor:
    """Rank (B,) of the best right class of each row among C class scores, 0 = best; ties count against it.

    Args:
        scores_BC: floating point scores.
        right_BC: bool, see `right_classes`.
    """
    return ranks(scores_BC, scores_BC.masked_fill(~right_BC, float("-inf")).amax(dim=1), ~right_BC)


def right_classes(
    label_B: Tensor, index_B: Tensor, num_classes: int, label_sets: Sequence[Sequence[int]] | None
) -> Tensor:
    """(B, C) bool, which classes are right for each sample.

    Args:
        label_B: long, the class of each sample.
        index_B: long, its place in the data set.
        num_classes: C.
        label_sets: for each sample of the data set all its right classes; None: the label alone.

    Raises:
        ValueError: a label is outside [0, C).
    """
    right_BC = torch.zeros(len(label_B), num_classes, dtype=torch.bool, device=label_B.device)
    if label_sets is None:
        check_labels(label_B, num_classes)
        return right_BC.scatter_(1, label_B[:, None], True)
    for row, index in enumerate(index_B.tolist()):
        labels = torch.tensor(label_sets[index], device=label_B.device)
        check_labels(labels, num_classes)
        right_BC[row, labels] = True
    return right_BC


def check_labels(labels_B: Tensor, num_classes: int) -> None:
    """Raises ValueError for a label outside [0, num_classes)."""
    if labels_B.numel() and (int(labels_B.min()) < 0 or int(labels_B.max()) >= num_classes):
        raise ValueError(
            f"labels must be in 0..{num_classes - 1} for {num_classes} classes, "
            f"got {int(labels_B.min())}..{int(labels_B.max())}"
        )


def share_within(ranks_B: Tensor, k: int) -> float:
    """Share (0..1) of rows whose rank is among the first k; 0 for no rows."""
    return float((ranks_B < k).double().mean()) if ranks_B.numel() else 0.0


def top_shares(ranks_N: Tensor, num_classes: int, prefix: str = "") -> dict[str, float]:
    """{"top1", "top5"}, the shares (0..1) of rows whose right class is the best, or among the best five.

    With five classes or fewer there is no "top5": every answer is among the best five.
    """
    return {f"{prefix}top{k}": share_within(ranks_N, k) for k in ((1, 5) if num_classes > 5 else (1,))}


def expected_calibration_error(confidences_N: Tensor, hits_N: Tensor, num_bins: int = 15) -> float:
    """How far the confidence in the best class is from the accuracy, on average (Guo et al., arXiv 1706.04599, eq. 3).

    Predictions are put into bins of equal width by their confidence; the distance between mean confidence and accuracy
    of each bin is weighted with the bin's share of the predictions.

    Args:
        confidences_N: (N,) probabilities of the predicted classes, in 0..1; N >= 1.
        hits_N: (N,) bool, the prediction is right.
        num_bins: 15 in the paper.

    Returns:
        A share in 0..1, rounded to 1e-6: beyond that the figure is rounding of the forward pass.
    """
    confidences_N = confidences_N.double()
    bins_N = (confidences_N * num_bins).ceil().long().clamp(1, num_bins) - 1  # each bin holds its upper end
    excess = confidences_N.new_zeros(num_bins).index_add_(0, bins_N, confidences_N - hits_N.double())
    return round(float(excess.abs().sum() / len(confidences_N)), 6)


def accuracy_per_class(hits_N: Tensor, labels_N: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Accuracy of each class and its number of samples.

    Args:
        hits_N: (N,) bool.
        labels_N: (N,) long in [0, num_classes).

    Returns:
        (C,) float64, NaN for a class without samples; (C,) long.
    """
    counts_C = labels_N.bincount(minlength=num_classes)
    return labels_N.bincount(hits_N.double(), num_classes) / counts_C, counts_C
