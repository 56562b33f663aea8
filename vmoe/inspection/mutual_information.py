"""Which classes and words tell most about the experts."""

from __future__ import annotations

import numpy as np


def contributions(table_EC: np.ndarray) -> np.ndarray:
    """How much each pair of expert and class adds to their mutual information, in nats.

    p(e, c) · log(p(e, c) / (p(e) p(c))): large where an expert gets much more of a class than its share, and the class
    is not rare. The sum over all pairs is the mutual information of expert and class.

    Args:
        table_EC: counts, (E, C).

    Returns:
        (E, C) float64; zero where there are no counts.
    """
    total = table_EC.sum()
    if total == 0:
        return np.zeros(table_EC.shape)
    p_EC = table_EC / total
    even_EC = p_EC.sum(1, keepdims=True) * p_EC.sum(0, keepdims=True)
    ratio_EC = np.divide(p_EC, even_EC, out=np.ones_like(p_EC), where=p_EC > 0)
    return p_EC * np.log(ratio_EC)


def most_telling(table_EC: np.ndarray, count: int) -> list[int]:
    """The `count` columns that add most to the mutual information, those of one expert side by side.

    Args:
        table_EC: counts, (E, C).
        count: most columns to return; those without counts are left out.
    """
    total_C = contributions(table_EC).sum(0)
    order = np.lexsort((-table_EC.sum(0), -total_C.round(12)))  # equal ones: the more frequent first
    chosen = [int(c) for c in order[:count] if table_EC[:, c].sum() > 0]
    shares_EC = table_EC / np.maximum(table_EC.sum(0), 1)
    return sorted(chosen, key=lambda c: (shares_EC[:, c].argmax(), -shares_EC[:, c].max()))


def telling_of_expert(
    table_EC: np.ndarray, names: list[str], expert: int, count: int
) -> list[tuple[str, float, float]]:
    """What an expert gets more of than its share.

    Args:
        table_EC: counts, (E, C).
        names: C names.
        expert: index.
        count: most entries to return.

    Returns:
        [(name, share of the name's tokens that go to this expert, share of the expert's tokens that have the name)],
        those that add most to the mutual information first.
    """
    own_C = contributions(table_EC)[expert]
    order = [c for c in np.argsort(-own_C, kind="stable")[:count].tolist() if own_C[c] > 0]
    of_name_C, of_expert = table_EC.sum(0), table_EC[expert].sum()
    return [
        (names[c], float(table_EC[expert, c] / of_name_C[c]), float(table_EC[expert, c] / of_expert)) for c in order
    ]
