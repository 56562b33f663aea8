"""Two classifiers on frozen features: the linear probe, and the vote of the nearest neighbours.

Linear probe: multinomial logistic regression by L-BFGS, its penalty chosen on a part of the training data: CLIP (arXiv
2103.00020), appendix A.3. Neighbours: weighted vote by cosine similarity: DINO (arXiv 2104.14294), section 4.1 and
appendix, after Wu et al. (arXiv 1805.01978), section 3.4.

Shapes, by suffix: N rows, B rows of a block, D features, C classes, K neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from vmoe.data import ImageDataset
from vmoe.evaluation.config import EvaluationConfig
from vmoe.evaluation.features import Features, fit_and_test_features
from vmoe.evaluation.inference import float64_device
from vmoe.evaluation.loaded_model import Subject
from vmoe.evaluation.metrics import accuracy_per_class, class_ranks, right_classes, share_within, top_shares
from vmoe.evaluation.results_file import Outcome
from vmoe.utils.config import ConfigError

MAX_ITERATIONS = 1000
GRADIENT_TOLERANCE = 1e-6  # of the logarithm of the loss
STEPS_PER_DECADE = 8  # the finest penalties that are compared; the first ones are two decades apart
PROBE_BLOCK = 1 << 16  # rows of features whose scores are held at once
QUERY_BLOCK, ROW_BLOCK = 512, 1 << 14  # cosines that are held at once
COSINE_STEPS = 1 << 20  # cosines are rounded to this part, so that the last bits of a product decide nothing


def linear_probe(config: EvaluationConfig, subject: Subject, dataset: ImageDataset, console: Console) -> Outcome:
    """Task "linear_probe".

    Returns:
        results: "top1", "top5" (see `top_shares`; ties count as misses), "mean_per_class" (mean of the classes'
        accuracies), "l2" (the penalty), "num_samples", "num_skipped". details: "val" (accuracy on the held-back part of
        the training data for each penalty tried; null for a fixed one), "converged", "num_train_samples", "skipped".

    Raises:
        ConfigError, ValueError: see `fit_and_test_features` and `choose_penalty`.
    """
    settings = config.features
    train, test = fit_and_test_features(config, subject, config.train_data, dataset, console)
    device = float64_device(subject.device)
    features_ND, labels_N = train.features_ND.to(device), train.labels_N.to(device)
    penalty, tried = settings.l2, None
    if penalty is None:
        penalty, tried = choose_penalty(features_ND, labels_N, settings.l2_range, settings.val_share)
    probe = fit_linear_probe(features_ND, labels_N, penalty)
    if not probe.converged:
        console.print(
            f"the linear probe did not converge: with features.l2 {penalty:g} it ended after {probe.iterations} "
            "iterations short of the minimum",
            style="yellow",
        )
    blocks = (probe.scores(block_BD.to(device)) for block_BD in test.features_ND.split(PROBE_BLOCK))
    rank_N = _ranks(blocks, probe.classes_C, test, dataset)
    details = {
        "val": None if tried is None else [{"l2": value, "top1": tried[value]} for value in sorted(tried)],
        "converged": probe.converged,
    }
    per_class_C, counts_C = accuracy_per_class(rank_N == 0, test.labels_N, len(dataset.classes))
    results = {
        **top_shares(rank_N, len(dataset.classes)),
        "mean_per_class": float(per_class_C[counts_C > 0].mean()),
        "l2": penalty,
    }
    return _outcome(results, details, train, test)


def knn(config: EvaluationConfig, subject: Subject, dataset: ImageDataset, console: Console) -> Outcome:
    """Task "knn".

    Returns:
        results: for each k "k{k}_top1" and "k{k}_top5" (see `top_shares`; ties count as misses; a class without a vote
        is never a hit), "num_samples", "num_skipped". details: "num_train_samples", "skipped".

    Raises:
        ConfigError: k is more than there are training pictures; see also `fit_and_test_features`.
        ValueError: see there.
    """
    settings = config.features
    train, test = fit_and_test_features(config, subject, config.train_data, dataset, console)
    fitted = [tensor.to(subject.device) for tensor in (train.features_ND, train.labels_N)]
    classes_C, results = torch.arange(len(dataset.classes)), {}
    largest = max(settings.k)
    if largest > len(train.labels_N):
        raise ConfigError(f"features.k must be at most {len(train.labels_N)}, the training pictures, got {largest}")
    nearest = [
        nearest_neighbours(block_BD.to(subject.device), fitted[0], largest)
        for block_BD in test.features_ND.split(QUERY_BLOCK)
    ]
    for k in settings.k:
        blocks = (
            neighbour_votes(cosine_BK[:, :k], fitted[1][row_BK[:, :k]], len(dataset.classes), settings.temperature)
            for cosine_BK, row_BK in nearest
        )
        rank_N = _ranks(blocks, classes_C, test, dataset)
        results |= top_shares(rank_N, len(dataset.classes), prefix=f"k{k}_")
    return _outcome(results, {}, train, test)


def _ranks(blocks: Iterator[Tensor], classes_C: Tensor, test: Features, dataset: ImageDataset) -> Tensor:
    """Ranks (N,) of the right classes, from blocks of scores (B, C) of some classes."""
    ranks, start = [], 0
    for scores_BC in blocks:
        rows = slice(start, start + len(scores_BC))
        right_BC = right_classes(test.labels_N[rows], test.index_N[rows], len(dataset.classes), dataset.label_sets)
        ranks.append(class_ranks(scores_BC.cpu(), right_BC[:, classes_C.cpu()]))
        start = rows.stop
    return torch.cat(ranks)


def _outcome(results: dict[str, float | int], details: dict, train: Features, test: Features) -> Outcome:
    counts = {"num_samples": len(test.labels_N), "num_skipped": len(test.skipped_paths)}
    skipped = {"num_train_samples": len(train.labels_N), "skipped": train.skipped_paths + test.skipped_paths}
    return Outcome(results | counts, details | skipped)


# --- logistic regression ---


class LinearProbe(NamedTuple):
    """A fitted logistic regression.

    Attributes:
        weight_DC: (D, C) float64.
        bias_C: (C,) float64.
        classes_C: (C,) long, the labels that the columns stand for: those that were fitted on.
        iterations: of L-BFGS.
        converged: whether the gradient at its end is within the tolerance; see `fit_linear_probe`.
    """

    weight_DC: Tensor
    bias_C: Tensor
    classes_C: Tensor
    iterations: int
    converged: bool

    def scores(self, features_ND: Tensor) -> Tensor:
        """(N, C) float64 logits."""
        return torch.addmm(self.bias_C, features_ND.double(), self.weight_DC)


def fit_linear_probe(
    features_ND: Tensor, labels_N: Tensor, penalty: float, start: LinearProbe | None = None
) -> LinearProbe:
    """Minimises sum of cross entropies + penalty / 2 · |W|², without penalty on the bias, in float64.

    This is scikit-learn's LogisticRegression with C = 1 / penalty. Features may have any mean, scale and correlation:
    they are centred and whitened for the minimisation, which changes its path and not the minimum. The probe has
    converged when no entry of the gradient in those axes is above 1e-6 of the loss. L-BFGS also ends after
    MAX_ITERATIONS, or when its steps change nothing any more; then the minimum may not have been reached. That is to be
    expected of very small penalties on classes which a plane can part, where the minimum lies far out.

    Args:
        features_ND: (N, D) floating point, on any device with float64.
        labels_N: (N,) long, on the same device.
        penalty: > 0.
        start: a probe of the same classes to start from; None: zero.

    Raises:
        ValueError: the penalty is out of range, or there are fewer than two classes.
    """
    if not penalty > 0:
        raise ValueError(f"the penalty must be > 0, got {penalty}")
    classes_C, target_N = labels_N.unique(return_inverse=True)
    if len(classes_C) < 2:
        raise ValueError(f"a linear probe needs two classes or more, and the training data have {len(classes_C)}")
    N, D = features_ND.shape
    # In the principal axes, each divided by the root of its curvature, L-BFGS takes tens of steps instead of thousands.
    mean_D = features_ND.mean(0, dtype=torch.float64)
    x_ND = features_ND - mean_D
    variance_D, axes_DD = torch.linalg.eigh(x_ND.T @ x_ND / N)
    scale_D = (variance_D.clamp(min=0) + 4 * penalty / N).sqrt()
    x_ND = x_ND @ (axes_DD / scale_D)

    weight_DC, bias_C = x_ND.new_zeros(D, len(classes_C)), x_ND.new_zeros(len(classes_C))
    if start is not None:
        weight_DC = scale_D[:, None] * (axes_DD.T @ start.weight_DC)
        bias_C = start.bias_C + mean_D @ start.weight_DC
    optimizer = torch.optim.LBFGS(
        [weight_DC.requires_grad_(), bias_C.requires_grad_()],
        max_iter=MAX_ITERATIONS,
        max_eval=10 * MAX_ITERATIONS,
        tolerance_grad=GRADIENT_TOLERANCE,
        tolerance_change=1e-15,
        history_size=20,  # with 10 the line search can stall short of the tolerance
        line_search_fn="strong_wolfe",
    )

    def log_loss() -> Tensor:
        """Leaves the gradient in the parameters; a block at a time, to bound the memory.

        The logarithm has the same minimum. Where a small penalty lets the loss go to nearly zero, it makes all the
        tolerances relative to that, and does not end far from the minimum.
        """
        optimizer.zero_grad()
        parts = [penalty / (2 * N) * (weight_DC / scale_D[:, None]).square().sum()]
        parts[0].backward()
        for x_BD, target_B in zip(x_ND.split(PROBE_BLOCK), target_N.split(PROBE_BLOCK), strict=True):
            loss = F.cross_entropy(torch.addmm(bias_C, x_BD, weight_DC), target_B, reduction="sum") / N
            loss.backward()
            parts.append(loss)
        total = sum(part.detach() for part in parts)
        for parameter in (weight_DC, bias_C):
            parameter.grad /= total
        return total.log()

    with torch.enable_grad():
        optimizer.step(log_loss)
        log_loss()  # the line search may have left the gradient of another point
    converged = all(bool(one.grad.abs().max() <= GRADIENT_TOLERANCE) for one in (weight_DC, bias_C))
    iterations = optimizer.state[weight_DC]["n_iter"]
    weight_DC = axes_DD @ (weight_DC.detach() / scale_D[:, None])
    bias_C = bias_C.detach() - mean_D @ weight_DC
    return LinearProbe(weight_DC, bias_C, classes_C, iterations, converged)


def choose_penalty(
    features_ND: Tensor, labels_N: Tensor, penalties: Sequence[float], val_share: float
) -> tuple[float, dict[float, float]]:
    """The penalty with the best accuracy on a held-back part of the training data.

    CLIP's search (appendix A.3): penalties two decades apart, then around the best one of them the distance is halved
    until it is an eighth of a decade. They are counted from the least one, and the greatest is always among the first.
    Of equally good penalties the greatest is taken. The part held back is drawn from
    each class, the same in each call; every class keeps an example.

    Args:
        features_ND, labels_N: the training data.
        penalties: the least and the greatest one to try.
        val_share: share of each class that is held back, in 0..1.

    Returns:
        (the penalty, {penalty: accuracy} of all that were tried).

    Raises:
        ValueError: the classes have too few examples to hold any back.
    """
    held_N = _held_back(labels_N, val_share)
    if not held_N.any():
        raise ValueError(
            f"val_share {val_share} of the training data leaves nothing to choose a penalty on, as no class has "
            "enough examples: set features.l2 to a penalty"
        )
    fit = (features_ND[~held_N], labels_N[~held_N])
    val_ND, val_N = features_ND[held_N], labels_N[held_N]
    # Places in a grid of eighths of a decade: whole numbers, so that none is tried twice. Both ends are as given.
    low, high = penalties
    last = math.ceil(STEPS_PER_DECADE * (math.log10(high) - math.log10(low)) - 1e-6)
    accuracy: dict[int, float] = {}
    probe: LinearProbe | None = None

    def penalty_at(place: int) -> float:
        if place in (0, last):
            return high if place else low
        return 10 ** (math.log10(low) + place / STEPS_PER_DECADE)

    def try_penalty(place: int) -> None:
        nonlocal probe
        probe = fit_linear_probe(*fit, penalty_at(place), start=probe)
        right_BC = val_N[:, None] == probe.classes_C
        accuracy[place] = share_within(class_ranks(probe.scores(val_ND), right_BC), 1)

    def best() -> int:
        return max(accuracy, key=lambda place: (accuracy[place], place))

    step = 2 * STEPS_PER_DECADE
    for place in sorted({*range(0, last, step), last}, reverse=True):  # from the easiest fit to the hardest
        try_penalty(place)
    while step > 1:
        step //= 2
        centre = best()
        for place in (centre + step, centre - step):
            if 0 <= place <= last and place not in accuracy:
                try_penalty(place)
    return penalty_at(best()), {penalty_at(place): figure for place, figure in accuracy.items()}


def _held_back(labels_N: Tensor, share: float) -> Tensor:
    """(N,) bool: `share` of each class, drawn with a fixed seed, and never all of a class."""
    generator = torch.Generator().manual_seed(0)
    held_N = torch.zeros_like(labels_N, dtype=torch.bool)
    for label in labels_N.unique().tolist():
        rows = (labels_N == label).nonzero().flatten()
        count = min(round(share * len(rows)), len(rows) - 1)
        held_N[rows[torch.randperm(len(rows), generator=generator)[:count].to(rows.device)]] = True
    return held_N


# --- nearest neighbours ---


def nearest_neighbours(queries_BD: Tensor, rows_ND: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k rows with the greatest cosine to each query, the greatest first; the earlier row where two are equal.

    Only QUERY_BLOCK x ROW_BLOCK cosines are held at once if the queries come in blocks of that size.

    Args:
        queries_BD: (B, D) float32.
        rows_ND: (N, D) float32.
        k: number of neighbours, 1..N.

    Returns:
        (B, K) float64 cosines, rounded to 2^-20; (B, K) long, the rows.

    Raises:
        ValueError: k is more than there are rows.
    """
    N = len(rows_ND)
    if not 1 <= k <= N:
        raise ValueError(f"k must be in 1..{N}, the number of training pictures, got {k}")
    queries_BD = F.normalize(queries_BD, dim=1)
    # A key is cosine and row in one whole number: all are different, so the order is the same everywhere.
    key_BK = torch.empty(len(queries_BD), 0, dtype=torch.long, device=rows_ND.device)
    for start in range(0, N, ROW_BLOCK):
        block_BD = F.normalize(rows_ND[start : start + ROW_BLOCK], dim=1)
        cosine_BB = (queries_BD @ block_BD.T * COSINE_STEPS).round().long()
        backwards_B = N - 1 - torch.arange(start, start + len(block_BD), device=rows_ND.device)
        key_BK = torch.cat([key_BK, cosine_BB * N + backwards_B], dim=1)
        key_BK = key_BK.topk(min(k, key_BK.shape[1]), dim=1).values
    cosine_BK = key_BK.div(N, rounding_mode="floor")
    return cosine_BK.double() / COSINE_STEPS, N - 1 - (key_BK - cosine_BK * N)


def neighbour_votes(cosine_BK: Tensor, labels_BK: Tensor, num_classes: int, temperature: float) -> Tensor:
    """(B, C) float64: for each class the sum of exp(cosine / temperature) over the neighbours of this class.

    Args:
        cosine_BK: (B, K) cosines of the neighbours.
        labels_BK: (B, K) their classes.
        num_classes: C.
        temperature: > 0; 0.07 in DINO.
    """
    votes_BC = cosine_BK.new_zeros(len(cosine_BK), num_classes)
    # The largest weight is 1: a small temperature overflows nothing, and the order of the votes is the same.
    weights_BK = ((cosine_BK - cosine_BK[:, :1]) / temperature).exp()
    return votes_BC.scatter_add_(1, labels_BK, weights_BK)
