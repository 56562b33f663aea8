"""The mutual information of two groupings, such as experts and classes.

Shapes, by suffix: E experts, C classes (or text tokens), N images; A and B two groupings.
"""

from typing import Any

import numpy as np

SHUFFLES = 20  # of the labels, for the noise level of a mutual information


def normalized_mutual_information(table_AB: np.ndarray) -> float:
    """I(A; B) / ((H(A) + H(B)) / 2) of a contingency table of two groupings (NMI_sum of Vinh et al., JMLR 11, 2010).

    1 if they are equal except for the names of the groups (also if both put all into one group), 0 if independent.
    """
    p_AB = table_AB / table_AB.sum()
    entropies = sum(-(p * np.log(p, out=np.zeros_like(p), where=p > 0)).sum() for p in (p_AB.sum(1), p_AB.sum(0)))
    return 1.0 if entropies == 0 else float(np.clip(2 * contributions(table_AB).sum() / entropies, 0, 1))


def contributions(table_EC: np.ndarray) -> np.ndarray:
    """(E, C) p(e, c) · log(p(e, c) / (p(e) p(c))): what each pair adds to the mutual information, in nats.

    It is large where an expert gets much more of a class than its share, and the class is not rare.
    """
    p_EC = table_EC / max(1, table_EC.sum())
    even_EC = p_EC.sum(1, keepdims=True) * p_EC.sum(0, keepdims=True)
    ratio_EC = np.divide(p_EC, even_EC, out=np.ones_like(p_EC), where=p_EC > 0)
    return p_EC * np.log(ratio_EC)


def class_information(count_NE: np.ndarray, label_N: np.ndarray, num_classes: int) -> dict[str, float | int]:
    """Mutual information of experts and classes in nats, and its noise level.

    `count_NE` are each image's assignments. The noise level is the mean, and the standard deviation, of the same with
    the labels shuffled among the images: an image's patches are alike, so they are no independent samples.
    """
    found, generator = [], np.random.default_rng(0)
    for shuffled in range(SHUFFLES + 1):
        table_CE = np.zeros((num_classes, count_NE.shape[1]))
        np.add.at(table_CE, generator.permutation(label_N) if shuffled else label_N, count_NE)
        found.append(float(contributions(table_CE.T).sum()))
    noise = {"shuffled_mean": float(np.mean(found[1:])), "shuffled_std": float(np.std(found[1:], ddof=1))}
    return {"nats": found[0], **noise, "shuffles": SHUFFLES}


def most_informative(table_EC: np.ndarray, names: list[str], expert: int, count: int) -> list[dict[str, Any]]:
    """At most `count` names that an expert gets more of than its share, those that add most information first.

    "share_of_name" is the part of the name's tokens that the expert gets, "share_of_expert" that of its tokens.
    """
    own_C = contributions(table_EC)[expert]
    order = [c for c in np.argsort(-own_C, kind="stable")[:count].tolist() if own_C[c] > 0]
    name_share_C = table_EC[expert] / np.maximum(table_EC.sum(0), 1)
    expert_share_C = table_EC[expert] / max(1, table_EC[expert].sum())
    shares = {"share_of_name": name_share_C, "share_of_expert": expert_share_C}
    return [{"name": names[c], **{key: float(share_C[c]) for key, share_C in shares.items()}} for c in order]
