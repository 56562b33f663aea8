"""Calls of a model in evaluation: its mode, and batches in the forms that data loaders give them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; each module's own mode is restored, as frozen parts may be in eval."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def call(model: nn.Module, batch: Any) -> Any:
    """The model's outputs for a batch: a tensor, a tuple of its arguments, or a dict with "image" and "text". Labels, a
    vector beside the images, are left out."""
    if isinstance(batch, Mapping):
        batch = tuple(batch[key] for key in ("image", "text") if key in batch)
    if not isinstance(batch, (tuple, list)):
        batch = (batch,)
    has_labels = len(batch) == 2 and getattr(batch[1], "ndim", 0) == 1
    return model(*batch[:1] if has_labels else batch)
