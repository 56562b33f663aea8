"""Accuracy and calibration of a model that scores classes: a classifier here, an image-text model in `zero_shot`.

Shapes, by suffix: B batch, N samples, C classes.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from vmoe.distributed.process_group import gather_lists
from vmoe.evaluation.inference import evaluating
from vmoe.evaluation.metrics import (
    accuracies,
    accuracy_per_class,
    expected_calibration_error,
    members_divergence,
    ranks,
    right_classes,
    rounded_mean,
)
from vmoe.evaluation.synchronized import Rows, SynchronizedBatches
from vmoe.models.vision import log_mean_probability

logger = logging.getLogger("vmoe.evaluation")


class Predictions(NamedTuple):
    """Predictions for the samples of all processes, in the order of the data, on the CPU."""

    index_N: Tensor  # position in the data set
    label_N: Tensor  # the right class
    rank_N: Tensor  # rank of the (best) right class among the scores, see `ranks`
    predicted_N: Tensor  # the class with the highest score; of a tie a wrong one, since it is a miss
    confidence_N: Tensor  # its softmax probability
    nll_N: Tensor  # -log of the probability of the (best) right class
    num_classes: int
    num_skipped: int  # samples that could not be read
    diversity_N: Tensor | None = None  # of an ensemble, see `members_divergence`

    def results(self) -> dict[str, float | int]:
        """The metrics that `evaluate_classification` returns."""
        results = accuracies(self.rank_N, self.label_N, self.num_classes)
        if undefined := int(self.confidence_N.isnan().sum()):
            logger.warning("the scores of %d samples are NaN: they count as misses, and there is no ece", undefined)
        else:
            results["nll"] = rounded_mean(self.nll_N)
            results["ece"] = expected_calibration_error(self.confidence_N, self.rank_N == 0)
            if self.diversity_N is not None:
                results["diversity"] = rounded_mean(self.diversity_N)
        return {**results, "num_samples": len(self.rank_N), "num_skipped": self.num_skipped}

    def per_class(self, class_names: Sequence[str]) -> list[dict[str, Any]]:
        """[{"class", "top1" (None without samples), "num_samples"}] in the order of the labels."""
        per_class_C, counts_C = accuracy_per_class(self.rank_N == 0, self.label_N, self.num_classes)
        rows = zip(class_names, per_class_C.tolist(), counts_C.tolist(), strict=True)
        return [{"class": name, "top1": top1 if count else None, "num_samples": count} for name, top1, count in rows]


def evaluate_classification(
    model: nn.Module,
    loader: Iterable[dict[str, Tensor]],
    *,
    device: torch.device | str,
    precision: str = "float32",
    num_classes: int | None = None,
) -> dict[str, float | int]:
    """Accuracy of `model(images)` on labelled images.

    Args:
        model: images (B, 3, H, W) -> logits (B, C); must be on `device`.
        loader: batches with "image" (B, 3, H, W) float, or the patches of images of any sizes (`vmoe.data.naflex`), and
            "label" (B,) long; `vmoe.data.eval_loader` gives one. Where torch.distributed runs, each process gives its
            own samples, with their "index" (B,) in the data.
        device, precision: where the model runs, in "float32", "bf16" or "fp16" (autocast).
        num_classes: of the data set, checked against the model's; None: not checked.

    Returns:
        "top1", "top5" (shares in 0..1, ties are misses; no "top5" with five classes or fewer), "mean_per_class" (mean
        of the classes' accuracies), "nll" (mean negative log-likelihood in nats), "ece" (expected calibration error, 15
        bins), of an ensemble "diversity" (`members_divergence`), "num_samples", "num_skipped".

    Raises:
        ValueError: the model has another number of classes, a label is out of range, there are no samples, or
            (SharedError) one of several processes could not read its own.
    """
    with evaluating(model, device, precision):
        batches = SynchronizedBatches(loader, model)
        return predict(lambda images: checked_logits(model, images, num_classes), batches, device=device).results()


def checked_logits(model: nn.Module, images: Tensor, num_classes: int | None) -> Tensor:
    """`model(images)`, (B, C) float32, or those of an ensemble's members, (B, M, C); ValueError if C is not
    `num_classes`."""
    if (members := getattr(model, "ensemble_size", 1)) > 1:
        logits = model.member_logits(images).float().unflatten(0, (-1, members))
    else:
        logits = model(images).float()
    if num_classes is not None and logits.shape[-1] != num_classes:
        remedy = "evaluate on the classes that it was trained on, or fine-tune with a new head"
        raise ValueError(f"the model has {logits.shape[-1]} classes and the data set {num_classes}: {remedy}")
    return logits


def together(scores: Tensor) -> Tensor:
    """Scores (B, C) of one model, as they are, or of M members, (B, M, C): the log of their mean probability."""
    return log_mean_probability(scores) if scores.ndim == 3 else scores


def images_on(device: torch.device | str, batch: dict[str, Any]) -> Any:
    """The images of a loader's batch on a device: a tensor, or the dict of a `NaFlexTransform`."""
    return tree_map(lambda part: part.to(device), batch["image"])


def predict(
    score: Callable[[Tensor], Tensor],
    loader: Iterable[dict[str, Tensor]],
    *,
    device: torch.device | str,
    label_sets: Sequence[Sequence[int]] | None = None,
) -> Predictions:
    """Scores all images of a loader; call it inside `evaluating`.

    `score` maps images (B, 3, H, W) on `device` to (B, C) float32, whose softmax is the confidence, or to those of the
    members of an ensemble, (B, M, C). A batch without "label" is scored, and does not count.
    For `label_sets` see `right_classes`. ValueError: a label out of range, or no samples.
    """
    rows, num_classes, num_rows = Rows(), 0, 0
    for batch in loader:
        scores = score(images_on(device, batch))
        scores_BC = together(scores)
        num_classes = scores_BC.shape[1]
        if "label" not in batch:
            continue
        label_B = batch["label"].to(device)
        index_B = batch.get("index", torch.arange(num_rows, num_rows + len(label_B)))
        num_rows += len(label_B)
        right_BC = right_classes(label_B, index_B, num_classes, label_sets)
        rank_B, probabilities_BC = ranks(scores_BC, right_BC), scores_BC.softmax(dim=1)
        confidence_B = probabilities_BC.amax(dim=1)
        tied_BC = right_BC & (rank_B > 0)[:, None]  # a tie is a miss: it counts for the other class
        predicted_B = probabilities_BC.masked_fill(tied_BC, -1).argmax(dim=1)
        nll_B = -scores_BC.log_softmax(dim=1).masked_fill(~right_BC, -math.inf).amax(dim=1)
        found = {"label_N": label_B, "rank_N": rank_B, "predicted_N": predicted_B}
        found |= {"confidence_N": confidence_B, "nll_N": nll_B}
        rows.add(index_B, **found, **({"diversity_N": members_divergence(scores)} if scores.ndim == 3 else {}))
    index_N, columns = rows.gather()
    skipped = num_skipped(loader, len(index_N))
    return Predictions(index_N, **columns, num_classes=max(gather_lists([num_classes])), num_skipped=skipped)


def confidences(score: Callable[[Tensor], Tensor], loader: Iterable[dict[str, Tensor]], device) -> tuple[Tensor, int]:
    """(N,) the largest probability of each image of a loader, of all processes, on the CPU, and how many were skipped;
    `score` as of `predict`."""
    rows, count = Rows(), 0
    for batch in loader:
        confidence_B = together(score(images_on(device, batch))).softmax(dim=1).amax(dim=1)
        if "index" in batch or "label" in batch:  # a blank batch, without them, only keeps step with other processes
            rows.add(batch.get("index", torch.arange(count, count + len(confidence_B))), confidence_N=confidence_B)
            count += len(confidence_B)
    index_N, columns = rows.gather()
    skipped = num_skipped(loader, len(index_N))
    return columns["confidence_N"], skipped


def num_skipped(loader: Iterable, num_read: int) -> int:
    """Samples that all processes skipped; raises ValueError if they read none."""
    skipped = sum(gather_lists([int(getattr(loader, "num_skipped", 0))]))
    if not num_read:
        raise ValueError(f"nothing to evaluate: the data set gave no sample ({skipped} were skipped)")
    return skipped


def select_columns(logits: Tensor, class_columns: Sequence[Sequence[int]] | None) -> Tensor:
    """Scores (..., C) of the data's classes: for each the largest of the columns that stand for it; None: unchanged."""
    if class_columns is None:
        return logits
    last = max(map(max, class_columns))
    if last >= logits.shape[-1]:
        needed = f"the data is judged by outputs 0..{last} of an ImageNet-1k classifier"
        raise ValueError(f"{needed}, and the model has {logits.shape[-1]}: evaluate a model with 1,000 classes")
    most = max(map(len, class_columns))
    columns_CK = torch.tensor([[*columns, *[columns[0]] * most][:most] for columns in class_columns])
    return logits[..., columns_CK].amax(dim=-1)
