"""The reference's models as ours: from its config and weights, and back.

Reference: https://github.com/google-research/vmoe. Its casts of dispatched rows to bfloat16 are left out: they save
bandwidth on its hardware and are no part of the model.
"""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor, nn

from vmoe.convert.arrays import StoredArray, select_params, state_arrays, to_numpy
from vmoe.convert.fit import Fill, Rows, filled, filler, fit, floats, without_memory
from vmoe.convert.layout import Entry, reference_layout, zoom_positions
from vmoe.convert.reference_settings import reference_config
from vmoe.convert.settings import model_settings, stored_grid
from vmoe.models.factory import create_model

_IMAGE_POSITIONS = tuple(f"{tower}Encoder/posembed_input/pos_embedding" for tower in ("", "img/"))


def from_reference(
    config: Mapping[str, Any],
    params: Mapping[str, Any],
    *,
    image_size: int | tuple[int, int] | None = None,
    context_length: int | None = None,
) -> nn.Module:
    """One of the reference's models: a `VisionMoE` or `TwoTower` in eval mode, for images (B, 3, H, W).

    It has the reference's capacity, groups and priority in eval mode too. ConfigError: a key or value cannot be
    converted. CheckpointError: the weights do not fit the config.

    Args:
        config: the reference's model config (`config.model` of its experiments): of VisionTransformerMoe, or of
            TwoTower with "image" and "text". Keys that are absent have the reference's defaults.
        params: {"Encoder/encoder_norm/scale": array, ...}, flat or nested, with or without "params/" in front.
        image_size: in pixels; else "image_size" of the config, else that of the position embeddings, which are zoomed
            if they are for another, as the reference does when it fine-tunes.
        context_length: tokens of a text tower without position embeddings.
    """
    stored, _ = select_params(state_arrays(params, "params"), "params")
    name, kwargs, _, rows = plan(config, stored, "params", image_size, context_length)
    return filled(create_model(name, **kwargs), rows)


def to_reference(model: nn.Module, tensors: Mapping[str, Tensor] | None = None) -> dict[str, np.ndarray]:
    """A model's weights under the reference's names, in its layout: {"Encoder/encoder_norm/scale": array, ...}; copies.

    `tensors` are others to rename, such as gradients, by their names in the model. A ValueError names what the
    reference does not have.
    """
    reference_config(model, group_size=1)  # raises for what the reference does not have
    tensors = model.state_dict() if tensors is None else tensors
    return {
        name: np.array(entry.view(to_numpy(tensors[entry.tensor])), order="C")
        for name, entry in reference_layout(model).items()
        if entry.tensor in tensors
    }


# --- fitting weights into tensors ------------------------------------------------------------------------------------


def plan(
    config: Mapping[str, Any],
    stored: Mapping[str, StoredArray],
    source: object,
    image_size: int | tuple[int, int] | None = None,
    context_length: int | None = None,
    **more: Any,
) -> tuple[str, dict[str, Any], nn.Module, Rows]:
    """Checks that the weights of a checkpoint, `source` in errors, fit a config, before any number is read.

    Returns the model's name and arguments, with `more`; the model on the meta device; and for each tensor its entry and
    a function that reads the weights into its view.
    """
    shapes = {name: array.shape for name, array in stored.items()}
    name, kwargs = model_settings(config, shapes, image_size, context_length)
    kwargs |= more
    model = without_memory(lambda: create_model(name, **kwargs), "the config")
    read = partial(_filler, model, config, stored)
    return name, kwargs, model, fit(model, reference_layout(model).items(), stored, read, source, "the config")


def _filler(
    model: nn.Module,
    config: Mapping[str, Any],
    stored: Mapping[str, StoredArray],
    name: str,
    entry: Entry,
    shape: tuple[int, ...],
) -> Fill:
    """As `filler`, but it zooms position embeddings."""
    array = floats(stored, name)
    if name in _IMAGE_POSITIONS and len(array.shape) == 3 and array.shape[::2] == shape[::2]:
        grid = tuple(getattr(model, "visual", model).patch_embed.grid_size)
        try:
            old = stored_grid(config, array.shape[1], shape[1] - math.prod(grid), grid)
        except ValueError as error:
            raise ValueError(f"cannot be resized: {error}") from None
        if old != grid:
            return lambda target: np.copyto(target, zoom_positions(array.read(), old, grid))
    elif array.shape == (*shape[:1], 1, *shape[1:]) and name.endswith("Router/dense/kernel"):  # an ensemble of one
        return lambda target: array.read_into(target[:, None])
    return filler(stored, name, entry, shape)
