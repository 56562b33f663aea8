"""Few-shot linear regression on frozen features, as the reference evaluates its models while they train.

A least-squares classifier with an L2 penalty, fitted in closed form to a few pictures per class. One eigendecomposition
serves all penalties. Protocol: Big Transfer (arXiv 1912.11370) and V-MoE (arXiv 2106.05974), section 3.

Shapes, by suffix: N rows, D features (plus one for the bias), C classes.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# As large a constant feature makes the bias almost free of the penalty.
BIAS_FEATURE = 100.0
SHOTS = (1, 5, 10, 25)
L2_PENALTIES = tuple(2.0**power for power in range(-10, 20))


def few_shot_accuracy(
    train_features_ND: Tensor,
    train_labels_N: Tensor,
    test_features_ND: Tensor,
    test_labels_N: Tensor,
    shots: Sequence[int] = SHOTS,
    l2_penalties: Sequence[float] = L2_PENALTIES,
    num_classes: int | None = None,
    generator: torch.Generator | None = None,
) -> dict[tuple[int, float], float]:
    """Accuracy on the test rows for each number of examples per class and each penalty.

    Args:
        train_features_ND: features to take the examples from.
        train_labels_N: their classes, 0..C-1.
        test_features_ND, test_labels_N: what is classified.
        shots: examples per class; a class with fewer gives all that it has.
        l2_penalties: weights of the squared norm of the regression's coefficients, > 0.
        num_classes: C, >= 1; None: the largest training label + 1.
        generator: chooses the examples; None: the first rows of each class.

    Returns:
        {(shots, penalty): accuracy in 0..1}.

    Raises:
        ValueError: if there is nothing to fit or to test, sizes do not belong together, features are not finite, labels
            are no classes, or a number is out of range.
    """
    if len(train_features_ND) == 0 or len(test_features_ND) == 0:
        raise ValueError("few-shot evaluation needs training and test features, got none")
    usable = all(0 < penalty < math.inf for penalty in l2_penalties) and len(l2_penalties) > 0
    if min(shots, default=0) < 1 or not usable:
        raise ValueError(f"shots must be >= 1 and l2_penalties > 0, got {list(shots)} and {list(l2_penalties)}")
    if num_classes is not None and num_classes < 1:
        raise ValueError(f"num_classes must be >= 1, or None for the largest training label + 1, got {num_classes}")
    _check_labels("train", train_features_ND, train_labels_N, num_classes)
    if num_classes is None:
        num_classes = int(train_labels_N.max()) + 1
    _check_labels("test", test_features_ND, test_labels_N, num_classes)
    if train_features_ND.shape[1] != test_features_ND.shape[1]:
        widths = f"{train_features_ND.shape[1]} and {test_features_ND.shape[1]}"
        raise ValueError(f"training and test rows must have equally many features, got {widths}")
    rows_of_class = [torch.nonzero(train_labels_N == label).flatten() for label in range(num_classes)]
    if generator is not None:
        rows_of_class = [rows[torch.randperm(len(rows), generator=generator)] for rows in rows_of_class]
    accuracy = {}
    for shot in shots:
        rows_N = torch.cat([rows[:shot] for rows in rows_of_class])
        regression = _Regression(train_features_ND[rows_N], train_labels_N[rows_N], num_classes)
        for penalty in l2_penalties:
            predicted_N = regression.predict(test_features_ND, penalty)
            accuracy[shot, penalty] = (predicted_N == test_labels_N).double().mean().item()
    return accuracy


def _check_labels(split: str, features_ND: Tensor, labels_N: Tensor, num_classes: int | None) -> None:
    """Raises ValueError unless there is one class for each row of finite features."""
    if features_ND.ndim != 2 or labels_N.shape != features_ND.shape[:1]:
        shapes = f"{tuple(features_ND.shape)} and {tuple(labels_N.shape)}"
        raise ValueError(f"{split} features and labels must have shapes (N, D) and (N,), got {shapes}")
    if not features_ND.isfinite().all():
        rows = int((~features_ND.isfinite()).any(1).sum())
        raise ValueError(f"{split} features must be finite, {rows} of {len(features_ND)} rows hold NaN or infinity")
    low, high = labels_N.min().item(), labels_N.max().item()
    if labels_N.is_floating_point() or low < 0 or (num_classes is not None and high >= num_classes):
        classes = "0..C-1" if num_classes is None else f"0..{num_classes - 1}"
        raise ValueError(
            f"{split} labels must be whole numbers in {classes}, got {labels_N.dtype} from {low} to {high}"
        )


def best_penalty(results: Sequence[dict[tuple[int, float], float]], shot: int) -> float:
    """The penalty that ranks best on average over several data sets, so that none is tuned on its own test rows.

    Args:
        results: what `few_shot_accuracy` gave for each data set.
        shot: examples per class.

    Raises:
        ValueError: if there are no results for this shot, or not those of the same settings for each data set.
    """
    if not results or not any(shots == shot for shots, _ in results[0]):
        raise ValueError(f"results must be of one or more data sets with {shot} examples per class, there are none")
    if any(accuracy.keys() != results[0].keys() for accuracy in results):
        raise ValueError("results must have the same shots and penalties for each data set")
    penalties = [penalty for shots, penalty in results[0] if shots == shot]
    ranks = torch.stack(
        [
            torch.tensor([accuracy[shot, penalty] for penalty in penalties]).argsort(stable=True).argsort(stable=True)
            for accuracy in results
        ]
    )
    return penalties[int(ranks.double().mean(0).argmax())]


class _Regression:
    """min |X W - Y|² + l2 |W|², with features scaled to mean 0 and deviation 1, and targets -1 and 1."""

    def __init__(self, x_ND: Tensor, labels_N: Tensor, num_classes: int) -> None:
        x_ND = x_ND.double()  # the constant feature squares the condition: float32 changes predictions
        self.mean_D, self.std_D = x_ND.mean(0), x_ND.std(0, correction=0) + 1e-5
        x_ND = self._scaled(x_ND)
        y_NC = 2.0 * F.one_hot(labels_N.long(), num_classes).to(x_ND) - 1.0
        # W = Xᵀ(XXᵀ + l2)⁻¹Y = (XᵀX + l2)⁻¹XᵀY: the smaller of the two matrices is decomposed.
        if x_ND.shape[0] >= x_ND.shape[1]:
            self.eigenvalues, vectors = torch.linalg.eigh(x_ND.T @ x_ND)
            self.left, self.right = vectors, vectors.T @ (x_ND.T @ y_NC)
        else:
            self.eigenvalues, vectors = torch.linalg.eigh(x_ND @ x_ND.T)
            self.left, self.right = x_ND.T @ vectors, vectors.T @ y_NC

    def _scaled(self, x_ND: Tensor) -> Tensor:
        return F.pad((x_ND.double() - self.mean_D) / self.std_D, (0, 1), value=BIAS_FEATURE)

    def predict(self, x_ND: Tensor, penalty: float) -> Tensor:
        """(N,) classes."""
        weight_DC = (self.left / (self.eigenvalues + penalty)) @ self.right
        return (self._scaled(x_ND) @ weight_DC).argmax(1)
