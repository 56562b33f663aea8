"""Calls of a model in evaluation: its mode, and batches in the forms that data loaders give them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


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
    """The model's outputs for a batch: images, patches as a NaFlex dict, a dict with "image" and "text", or a tuple.

    Beside images only token ids (B, L) of a model with a text tower are arguments; labels, paths and all else are left
    out, of patches (B, P, pixels) only vectors and what is no tensor. ValueError: a dict with none of these keys.
    """
    first, *rest = batch if isinstance(batch, (tuple, list)) else (batch,)
    if isinstance(first, Mapping) and "patches" not in first:
        if not (known := [first[key] for key in ("image", "text") if key in first]):
            raise ValueError(f"a batch must have 'image', 'text' or 'patches', got the keys {list(first)}")
        first, *rest = known
    if getattr(first, "ndim", 4) == 3:  # patches, and their coordinates and mask
        return model(first, *(each for each in rest if getattr(each, "ndim", 0) > 1))
    has_text = hasattr(getattr(model, "module", model), "encode_text") and _is_text(*rest[:1])
    return model(first, *rest[: int(has_text)])


def _is_text(tokens: Any = None) -> bool:
    whole = isinstance(tokens, Tensor) and not (tokens.is_floating_point() or tokens.dtype == torch.bool)
    return whole and tokens.ndim == 2
