"""Few-shot linear regression on frozen features: least squares with an L2 penalty on a few images per class.

The protocol is the reference's: Big Transfer (arXiv 1912.11370) and V-MoE (arXiv 2106.05974), section 3.

Shapes, by suffix: N rows, D features (plus one for the bias), C classes.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from vmoe.data import ImageDataset
from vmoe.evaluation.config import EvaluationConfig
from vmoe.evaluation.features import feature_outcome, fit_and_test_features
from vmoe.evaluation.inference import float64_device
from vmoe.evaluation.loaded_model import LoadedModel
from vmoe.evaluation.results_file import Outcome
from vmoe.models.factory import is_contrastive
from vmoe.utils.config import ConfigError

BIAS_FEATURE = 100.0  # a constant feature as large as this makes the bias almost free of the penalty

Curve = dict[tuple[int, float], float]  # {(shots, penalty): accuracy}


def few_shot(config: EvaluationConfig, loaded: LoadedModel, dataset: ImageDataset, console: Console) -> Outcome:
    """Task "few_shot": the examples are drawn again for every seed, and share one penalty (`best_penalty`).

    Embeddings of an image-text model are normalised first, as the reference's two-tower model gives them. ConfigError:
    several right labels per image. For other errors see `fit_and_test_features`.
    """
    settings, num_classes = config.features, len(dataset.classes)
    if dataset.label_sets is not None:
        raise ConfigError("data: task 'few_shot' needs one right label per image; here are several")
    train, test = fit_and_test_features(config, loaded, dataset, console)
    counts = dict(zip(dataset.classes, train.labels_N.bincount(minlength=num_classes).tolist(), strict=True))
    short = {name: count for name, count in counts.items() if count < max(settings.shots)}
    if short:
        few = f"{len(short)} of {num_classes} classes have fewer than {max(settings.shots)} examples"
        console.print(f"train_data: {few}, and give all that they have", style="yellow")
    penalties = settings.l2_penalties if settings.l2 is None else [settings.l2]
    rows = []
    for part in (train, test):
        features_ND, labels_N = (tensor.to(float64_device(loaded.device)) for tensor in part[:2])
        if is_contrastive(loaded.model):
            features_ND = features_ND / (torch.linalg.vector_norm(features_ND, dim=1, keepdim=True) + 1e-8)
        rows += [features_ND, labels_N]
    curves = {
        seed: few_shot_accuracy(*rows, settings.shots, penalties, num_classes, torch.Generator().manual_seed(seed))
        for seed in settings.seeds
    }
    results: dict[str, float] = {}
    for shot in settings.shots:
        penalty = best_penalty(list(curves.values()), shot)
        values = [curve[shot, penalty] for curve in curves.values()]
        results[f"{shot}shot"] = statistics.fmean(values)
        if len(values) > 1:
            results[f"{shot}shot_std"] = statistics.stdev(values)
        results[f"{shot}shot_l2"] = penalty
    accuracy = [
        {"seed": seed, "shots": shot, "l2": penalty, "accuracy": value}
        for seed, curve in curves.items()
        for (shot, penalty), value in curve.items()
    ]
    return feature_outcome(results, {"accuracy": accuracy, "short_classes": short}, train, test)


def few_shot_accuracy(
    train_features_ND: Tensor,
    train_labels_N: Tensor,
    test_features_ND: Tensor,
    test_labels_N: Tensor,
    shots: Sequence[int],
    l2_penalties: Sequence[float],
    num_classes: int,
    generator: torch.Generator | None = None,
) -> Curve:
    """Accuracy on the test rows for each number of examples per class and each penalty.

    The examples are training rows, drawn by the generator; None: the first of each class. A class with fewer gives all
    that it has. A penalty is the weight of the squared norm of the coefficients, > 0. Labels are 0..num_classes - 1.
    """
    rows_of_class = [torch.nonzero(train_labels_N == label).flatten() for label in range(num_classes)]
    if generator is not None:
        rows_of_class = [rows[torch.randperm(len(rows), generator=generator)] for rows in rows_of_class]
    accuracy = {}
    for shot in shots:
        rows_N = torch.cat([rows[:shot] for rows in rows_of_class])
        regression = _Regression(train_features_ND[rows_N], train_labels_N[rows_N], num_classes)
        scaled_ND = regression.scaled(test_features_ND)
        for penalty in l2_penalties:
            predicted_N = regression.predict(scaled_ND, penalty)
            accuracy[shot, penalty] = (predicted_N == test_labels_N).double().mean().item()
    return accuracy


def best_penalty(results: Sequence[Curve], shot: int) -> float:
    """The penalty that ranks best on average over several draws or data sets, as in the reference."""
    penalties = [penalty for shots, penalty in results[0] if shots == shot]
    accuracy_SP = torch.tensor([[accuracy[shot, penalty] for penalty in penalties] for accuracy in results])
    rank_SP = accuracy_SP.argsort(dim=1, stable=True).argsort(dim=1, stable=True)
    return penalties[int(rank_SP.double().mean(0).argmax())]


class _Regression:
    """min |X W - Y|² + l2 |W|², with features scaled to mean 0 and deviation 1, and targets -1 and 1."""

    def __init__(self, x_ND: Tensor, labels_N: Tensor, num_classes: int) -> None:
        x_ND = x_ND.double()  # the constant feature squares the condition: float32 changes predictions
        self.mean_D, self.std_D = x_ND.mean(0), x_ND.std(0, correction=0) + 1e-5
        x_ND = self.scaled(x_ND)
        y_NC = 2.0 * F.one_hot(labels_N, num_classes).to(x_ND) - 1.0
        # W = Xᵀ(XXᵀ + l2)⁻¹Y = (XᵀX + l2)⁻¹XᵀY: the smaller of the two matrices is decomposed.
        if x_ND.shape[0] >= x_ND.shape[1]:
            self.eigenvalues, vectors = torch.linalg.eigh(x_ND.T @ x_ND)
            self.left, self.right = vectors, vectors.T @ (x_ND.T @ y_NC)
        else:
            self.eigenvalues, vectors = torch.linalg.eigh(x_ND @ x_ND.T)
            self.left, self.right = x_ND.T @ vectors, vectors.T @ y_NC

    def scaled(self, x_ND: Tensor) -> Tensor:
        """(N, D + 1): features as the regression reads them, with the constant one."""
        return F.pad((x_ND.double() - self.mean_D) / self.std_D, (0, 1), value=BIAS_FEATURE)

    def predict(self, scaled_ND: Tensor, penalty: float) -> Tensor:
        """(N,) classes."""
        weight_DC = (self.left / (self.eigenvalues + penalty)) @ self.right
        return (scaled_ND @ weight_DC).argmax(1)
