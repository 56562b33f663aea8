"""Ranks and the figures made from them: top-k accuracy and retrieval recall.

A rank is the number of wrong answers that score at least as high as the right one: 0 is best. Ties count against the
model, so one that scores everything equally gets top-1 = 0 instead of a lucky 1. Scores closer than `TIE_TOLERANCE` of
the row's largest magnitude are tied, which keeps the last bits of a float32 product, and with them the batch size,
from deciding between equal inputs. A score that is not a number never is a hit.
"""

from __future__ import annotations

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


def label_ranks(scores_BC: Tensor, labels_B: Tensor) -> Tensor:
    """Rank (B,) of the labelled class among C class scores, 0 = best; ties count against it.

    Args:
        scores_BC: floating point scores.
        labels_B: long, class indices in [0, C).

    Raises:
        ValueError: a label is outside [0, C).
    """
    num_classes = scores_BC.shape[1]
    if labels_B.numel() and (int(labels_B.min()) < 0 or int(labels_B.max()) >= num_classes):
        raise ValueError(
            f"labels must be in 0..{num_classes - 1} for {num_classes} classes, "
            f"got {int(labels_B.min())}..{int(labels_B.max())}"
        )
    best_B = scores_BC.gather(1, labels_B[:, None]).squeeze(1)
    wrong_BC = scores_BC.new_ones(scores_BC.shape).bool()
    wrong_BC.scatter_(1, labels_B[:, None], False)
    return ranks(scores_BC, best_B, wrong_BC)


def share_within(ranks_B: Tensor, k: int) -> float:
    """Share (0..1) of rows whose rank is among the first k; 0 for no rows."""
    return float((ranks_B < k).double().mean()) if ranks_B.numel() else 0.0
