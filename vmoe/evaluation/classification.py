"""Top-1 and top-5 accuracy of a classifier."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from vmoe.evaluation.inference import evaluating
from vmoe.evaluation.metrics import label_ranks, share_within


def evaluate_classification(
    model: nn.Module,
    loader: Iterable[dict[str, Tensor]],
    *,
    device: torch.device | str,
    precision: str = "float32",
    num_classes: int | None = None,
) -> dict[str, float | int]:
    """Accuracy of `model(images)` on labelled pictures.

    Args:
        model: images (B, 3, H, W) -> logits (B, C); must be on `device`.
        loader: batches with "image" (B, 3, H, W) float and "label" (B,) long; `vmoe.data.eval_loader` gives one.
        device: where the model runs.
        precision: "float32", "bf16" or "fp16" (autocast).
        num_classes: number of classes of the data set, checked against the model's; None: not checked.

    Returns:
        "top1", "top5" (shares in 0..1, ties count as misses), "num_samples", "num_skipped".

    Raises:
        ValueError: the model has another number of classes, a label is out of range, or there are no samples.
    """
    found: list[Tensor] = []
    with evaluating(model, device, precision):
        for batch in loader:
            logits_BC = model(batch["image"].to(device)).float()
            if num_classes is not None and logits_BC.shape[1] != num_classes:
                raise ValueError(
                    f"the model has {logits_BC.shape[1]} classes and the data set {num_classes}: "
                    "evaluate on the classes that it was trained on, or fine-tune with a new head"
                )
            found.append(label_ranks(logits_BC, batch["label"].to(device)).cpu())
    return accuracies(found, loader)


def accuracies(ranks: list[Tensor], loader: Iterable) -> dict[str, float | int]:
    """The result of an evaluation with labels, from the ranks (B,) of its batches.

    Raises:
        ValueError: there are no samples.
    """
    ranks_N = torch.cat(ranks) if ranks else torch.empty(0)
    num_skipped = int(getattr(loader, "num_skipped", 0))
    if not len(ranks_N):
        raise ValueError(f"nothing to evaluate: the data set gave no sample ({num_skipped} were skipped)")
    return {
        "top1": share_within(ranks_N, 1),
        "top5": share_within(ranks_N, 5),
        "num_samples": len(ranks_N),
        "num_skipped": num_skipped,
    }
