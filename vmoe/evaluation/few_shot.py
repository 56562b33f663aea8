"""Few-shot linear regression on frozen features, as the reference evaluates its models while they train.

A least-squares classifier with an L2 penalty, fitted in closed form to a few pictures per class. One eigendecomposition
serves all penalties. Protocol: Big Transfer (arXiv 1912.11370) and V-MoE (arXiv 2106.05974), section 3.

Shapes, by suffix: N rows, D features (plus one for the bias), C classes.
"""

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
        num_classes: C; None: the largest training label + 1.
        generator: chooses the examples; None: the first rows of each class.

    Returns:
        {(shots, penalty): accuracy in 0..1}.

    Raises:
        ValueError: if there is nothing to fit or to test, or a number is out of range.
    """
    if len(train_features_ND) == 0 or len(test_features_ND) == 0:
        raise ValueError("few-shot evaluation needs training and test features, got none")
    if min(shots, default=0) < 1 or min(l2_penalties, default=0) <= 0:
        raise ValueError(f"shots must be >= 1 and l2_penalties > 0, got {list(shots)} and {list(l2_penalties)}")
    num_classes = num_classes or int(train_labels_N.max()) + 1
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


def best_penalty(results: Sequence[dict[tuple[int, float], float]], shot: int) -> float:
    """The penalty that ranks best on average over several data sets, so that none is tuned on its own test rows.

    Args:
        results: what `few_shot_accuracy` gave for each data set.
        shot: examples per class.
    """
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
