"""Two classifiers on frozen features: the linear probe, and the vote of the nearest neighbours.

Linear probe: logistic regression by L-BFGS, its penalty chosen on a part of the training data: CLIP (arXiv 2103.00020),
appendix A.3. Neighbours: vote weighted by cosine similarity: DINO (arXiv 2104.14294), after arXiv 1805.01978.

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
from vmoe.evaluation.features import Features, feature_outcome, fit_and_test_features
from vmoe.evaluation.inference import float64_device
from vmoe.evaluation.loaded_model import LoadedModel
from vmoe.evaluation.metrics import accuracies, ranks, right_classes, share_within, top_shares
from vmoe.evaluation.results_file import Outcome
from vmoe.utils.config import ConfigError

MAX_ITERATIONS = 1000
GRADIENT_TOLERANCE = 1e-6  # of the logarithm of the loss
STEPS_PER_DECADE = 8  # the finest penalties that are compared; the first ones are two decades apart
PROBE_BLOCK = 1 << 16  # rows of features whose scores are held at once
QUERY_BLOCK = 64  # rows of cosines that are held at once
COSINE_STEPS = 1 << 20  # cosines are rounded to this part, so that the last bits decide nothing


def linear_probe(config: EvaluationConfig, loaded: LoadedModel, dataset: ImageDataset, console: Console) -> Outcome:
    """Task "linear_probe"; the details hold the accuracy of each penalty tried on the held-out part ("val")."""
    settings = config.features
    train, test = fit_and_test_features(config, loaded, dataset, console)
    device = float64_device(loaded.device)
    features_ND, labels_N = train.features_ND.to(device), train.labels_N.to(device)
    penalty, tried = settings.l2, None
    if penalty is None:
        penalty, tried = choose_penalty(features_ND, labels_N, settings.l2_range, settings.val_share)
    probe = fit_linear_probe(features_ND, labels_N, penalty)
    if not probe.converged:
        console.print(f"the linear probe did not converge with features.l2 {penalty:g}", style="yellow")
    blocks = (probe.scores(block_BD.to(device)) for block_BD in test.features_ND.split(PROBE_BLOCK))
    rank_N = _ranks(blocks, probe.classes_C, test, dataset)
    results = {**accuracies(rank_N, test.labels_N, len(dataset.classes)), "l2": penalty}
    val = None if tried is None else [{"l2": value, "top1": tried[value]} for value in sorted(tried)]
    return feature_outcome(results, {"val": val, "converged": probe.converged}, train, test)


def knn(config: EvaluationConfig, loaded: LoadedModel, dataset: ImageDataset, console: Console) -> Outcome:
    """Task "knn": "k{k}_top1" and "k{k}_top5" for each k. A class without a vote is never a hit."""
    settings, num_classes = config.features, len(dataset.classes)
    train, test = fit_and_test_features(config, loaded, dataset, console)
    rows_ND, labels_N = train.features_ND.to(loaded.device), train.labels_N.to(loaded.device)
    queries = test.features_ND.split(QUERY_BLOCK)
    nearest = [nearest_neighbours(block_BD.to(loaded.device), rows_ND, max(settings.k)) for block_BD in queries]
    results = {}
    for k in settings.k:
        blocks = (
            neighbour_votes(cosine_BK[:, :k], labels_N[row_BK[:, :k]], num_classes, settings.temperature)
            for cosine_BK, row_BK in nearest
        )
        rank_N = _ranks(blocks, torch.arange(num_classes), test, dataset)
        results |= top_shares(rank_N, num_classes, prefix=f"k{k}_")
    return feature_outcome(results, {}, train, test)


def _ranks(blocks: Iterator[Tensor], classes_C: Tensor, test: Features, dataset: ImageDataset) -> Tensor:
    """Ranks (N,) of the right classes, from blocks of scores (B, C) of the classes `classes_C`."""
    found, done = [], 0
    for scores_BC in blocks:
        label_B, index_B = (tensor[done : done + len(scores_BC)] for tensor in (test.labels_N, test.index_N))
        right_BC = right_classes(label_B, index_B, len(dataset.classes), dataset.label_sets)
        found.append(ranks(scores_BC.cpu(), right_BC[:, classes_C.cpu()]))
        done += len(scores_BC)
    return torch.cat(found)


# --- logistic regression ---


class LinearProbe(NamedTuple):
    """A fitted logistic regression, in float64."""

    weight_DC: Tensor
    bias_C: Tensor
    classes_C: Tensor  # long, the labels of the columns: those that were fitted on
    converged: bool  # the gradient at the end is within the tolerance; see `fit_linear_probe`

    def scores(self, features_ND: Tensor) -> Tensor:
        """(N, C) float64 logits."""
        return torch.addmm(self.bias_C, features_ND.double(), self.weight_DC)


def fit_linear_probe(
    features_ND: Tensor, labels_N: Tensor, penalty: float, start: LinearProbe | None = None
) -> LinearProbe:
    """Minimises sum of cross entropies + penalty / 2 · |W|², without penalty on the bias, in float64.

    This is scikit-learn's LogisticRegression with C = 1 / penalty. It starts from the probe `start` of the same
    classes, or zero, and has converged when no entry of the gradient, of whitened features, is above 1e-6 of the loss.
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
    converged = _minimise(x_ND, target_N, penalty, scale_D, weight_DC, bias_C)
    weight_DC = axes_DD @ (weight_DC.detach() / scale_D[:, None])
    return LinearProbe(weight_DC, bias_C.detach() - mean_D @ weight_DC, classes_C, converged)


@torch.enable_grad()
def _minimise(
    x_ND: Tensor, target_N: Tensor, penalty: float, scale_D: Tensor, weight_DC: Tensor, bias_C: Tensor
) -> bool:
    """L-BFGS, which changes weight and bias in place; returns whether it converged."""
    N = len(x_ND)
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
        # The logarithm makes all tolerances relative to the loss, which a small penalty lets go to nearly zero.
        optimizer.zero_grad()
        total = penalty / (2 * N) * (weight_DC / scale_D[:, None]).square().sum()
        total.backward()
        for x_BD, target_B in zip(x_ND.split(PROBE_BLOCK), target_N.split(PROBE_BLOCK), strict=True):
            loss = F.cross_entropy(torch.addmm(bias_C, x_BD, weight_DC), target_B, reduction="sum") / N
            loss.backward()
            total = total.detach() + loss.detach()
        for parameter in (weight_DC, bias_C):
            parameter.grad /= total
        return total.log()

    optimizer.step(log_loss)
    log_loss()  # the line search may have left the gradient of another point
    return all(bool(one.grad.abs().max() <= GRADIENT_TOLERANCE) for one in (weight_DC, bias_C))


def choose_penalty(
    features_ND: Tensor, labels_N: Tensor, penalties: Sequence[float], val_share: float
) -> tuple[float, dict[float, float]]:
    """The penalty with the best accuracy on a held-out part of the training data, and {penalty: accuracy} of all tried.

    CLIP's search (appendix A.3) between the ends `penalties`: values two decades apart, then around the best of them
    the distance is halved until it is an eighth of a decade. Of equally good penalties the greatest is taken.
    """
    held_N = _held_out(labels_N, val_share)
    if not held_N.any():
        problem = f"val_share {val_share} of the training data leaves nothing to choose a penalty on"
        raise ValueError(f"{problem}, as no class has enough examples: set features.l2 to a penalty")
    low, high = penalties
    last = math.ceil(STEPS_PER_DECADE * (math.log10(high) - math.log10(low)) - 1e-6)
    inner = (10 ** (math.log10(low) + position / STEPS_PER_DECADE) for position in range(1, last))
    grid = [low, *inner, high][: last + 1]
    accuracy: dict[int, float] = {}  # by the position in the grid
    probe, step = None, 2 * STEPS_PER_DECADE
    positions = sorted({*range(0, last, step), last}, reverse=True)  # from the easiest fit to the hardest
    while step:
        for position in positions:
            if 0 <= position <= last and position not in accuracy:
                probe = fit_linear_probe(features_ND[~held_N], labels_N[~held_N], grid[position], start=probe)
                right_BC = labels_N[held_N][:, None] == probe.classes_C
                accuracy[position] = share_within(ranks(probe.scores(features_ND[held_N]), right_BC), 1)
        best = max(accuracy, key=lambda position: (accuracy[position], position))
        step //= 2
        positions = [best + step, best - step]
    return grid[best], {grid[position]: value for position, value in accuracy.items()}


def _held_out(labels_N: Tensor, share: float) -> Tensor:
    """(N,) bool: `share` of each class, drawn with a fixed seed, and never all of a class."""
    generator, held_N = torch.Generator().manual_seed(0), torch.zeros_like(labels_N, dtype=torch.bool)
    for label in labels_N.unique().tolist():
        rows = (labels_N == label).nonzero().flatten()
        count = min(round(share * len(rows)), len(rows) - 1)
        held_N[rows[torch.randperm(len(rows), generator=generator)[:count].to(rows.device)]] = True
    return held_N


# --- nearest neighbours ---


def nearest_neighbours(queries_BD: Tensor, rows_ND: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Cosines (B, K) float64, rounded to 2^-20, and rows (B, K) of the k nearest, the earlier of equal ones first."""
    N = len(rows_ND)
    if not 1 <= k <= N:
        raise ConfigError(f"features.k must be in 1..{N}, the number of training images, got {k}")
    cosine_BN = F.normalize(queries_BD, dim=1) @ F.normalize(rows_ND, dim=1).T
    # A key is cosine and row in one integer: all are different, so the order is the same everywhere.
    backwards_N = N - 1 - torch.arange(N, device=rows_ND.device)
    key_BK = ((cosine_BN * COSINE_STEPS).round().long() * N + backwards_N).topk(k, dim=1).values
    cosine_BK = key_BK.div(N, rounding_mode="floor")
    return cosine_BK.double() / COSINE_STEPS, N - 1 - (key_BK - cosine_BK * N)


def neighbour_votes(cosine_BK: Tensor, labels_BK: Tensor, num_classes: int, temperature: float) -> Tensor:
    """(B, C) float64: for each class the sum of exp(cosine / temperature) over the neighbours of this class."""
    votes_BC = cosine_BK.new_zeros(len(cosine_BK), num_classes)
    # The largest weight is 1: a small temperature overflows nothing, and the order of the votes is the same.
    weights_BK = ((cosine_BK - cosine_BK[:, :1]) / temperature).exp()
    return votes_BC.scatter_add_(1, labels_BK, weights_BK)
