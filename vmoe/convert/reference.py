"""The reference's models as ours: from its config and weights, and back.

Reference: https://github.com/google-research/vmoe. Its casts of dispatched rows to bfloat16 are left out: they save
bandwidth on its hardware and are no part of the model.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vmoe.convert.arrays import CheckpointError, StoredArray, flatten, in_memory, select_params, to_numpy
from vmoe.convert.layout import Entry, reference_layout, stored_grid, zoom_positions
from vmoe.convert.reference_config import reference_config
from vmoe.convert.section import ConfigError
from vmoe.convert.settings import config_grid, model_settings
from vmoe.utils.printable import printable

Zoom = tuple[tuple[int, int], tuple[int, int]]
Rows = list[tuple[str, Entry, Zoom | None]]
_IMAGE_POSITIONS = tuple(f"{tower}Encoder/posembed_input/pos_embedding" for tower in ("", "img/"))
_FLOATS = ("float16", "bfloat16", "float32", "float64")


def from_reference(
    config: Mapping[str, Any],
    params: Mapping[str, Any],
    *,
    image_size: int | tuple[int, int] | None = None,
    context_length: int | None = None,
) -> nn.Module:
    """Build one of the reference's models and load its weights.

    Args:
        config: the reference's model config (`config.model` of its experiments): of VisionTransformerMoe, or of
            TwoTower with "image" and "text". Keys that are absent have the reference's defaults.
        params: {"Encoder/encoder_norm/scale": array, ...}, flat or nested, with or without "params/" in front.
        image_size: in pixels; else "image_size" of the config, else that of the position embeddings. If it is another
            than theirs they are zoomed, as the reference does when it fine-tunes. Theirs is the config's, if that gives
            as many patches as there are, else a square.
        context_length: tokens of a text tower without position embeddings.

    Returns:
        A `VisionMoE` or `TwoTower` in eval mode, which has the reference's capacity, groups and priority there too.
        Images come as (B, 3, H, W). `vmoe.models.factory.save_pretrained` can write it.

    Raises:
        ConfigError: for a key or value that cannot be converted.
        CheckpointError: if the weights do not fit the config; names the tensors.
    """
    from vmoe.models.factory import create_model

    if not isinstance(params, Mapping):
        raise CheckpointError(f"params must be a dictionary of arrays, got {type(params).__name__}")
    stored, _ = select_params({name: in_memory(array) for name, array in flatten(params)}, "params")
    name, kwargs, _, rows = plan(config, stored, "params", image_size, context_length)
    model = create_model(name, **kwargs)
    fill({name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}, rows, stored)
    return model.eval()


def to_reference(model: nn.Module, tensors: Mapping[str, Tensor] | None = None) -> dict[str, np.ndarray]:
    """A model's weights under the reference's names, in its layout.

    Args:
        model: a V-MoE, Soft MoE (or a dense model of their kind), or a two-tower model of them, of what the reference
            can express; `reference_config` raises for others.
        tensors: other tensors to rename, such as gradients, by their names in the model; by default its parameters.

    Returns:
        {"Encoder/encoder_norm/scale": array, ...}; copies.

    Raises:
        ValueError: for a model or weights that the reference does not have, such as a LIMoE; names them.
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
    """Check that weights fit a config, before any of their numbers is read.

    Args:
        config, image_size, context_length: see `from_reference`.
        stored: the weights by the reference's names.
        source: the checkpoint's name, for errors.
        more: further arguments of the model.

    Returns:
        The model's name and arguments, the model on the meta device, and the rows for `fill`: the reference's name, the
        entry of it, and the old and new grid of position embeddings to zoom, or None.
    """
    shapes = {name: array.shape for name, array in stored.items()}
    name, kwargs = model_settings(config, shapes, image_size, context_length)
    kwargs |= more
    model = _empty_model(name, kwargs)
    return name, kwargs, model, _fit(model, stored, source, config_grid(config))


def _empty_model(name: str, kwargs: Mapping[str, Any]) -> nn.Module:
    """The model on the meta device, which takes no memory however large its config says that it is."""
    from vmoe.models.factory import create_model

    try:
        with torch.device("meta"):
            return create_model(name, **kwargs)
    except (RuntimeError, OverflowError, MemoryError, ZeroDivisionError) as error:  # sizes beyond what PyTorch counts
        raise ConfigError(f"the model of the config cannot be built: {printable(error)[:200]}") from error


def _fit(
    model: nn.Module, stored: Mapping[str, StoredArray], source: object, config_grid: tuple[int, int] | None
) -> Rows:
    layout, rows, problems = reference_layout(model), [], []
    own = model.state_dict()
    for name, entry in layout.items():
        if name not in stored:
            problems.append(f"{name} is missing")
            continue
        array, zoom = stored[name], None
        shape = entry.view(np.broadcast_to(np.float32(0), tuple(own[entry.tensor].shape))).shape  # takes no memory
        if array.dtype not in _FLOATS:
            problems.append(f"{name} is of type {array.dtype}")
        elif name in _IMAGE_POSITIONS and len(array.shape) == 3 and array.shape[::2] == shape[::2]:
            try:
                zoom = _zoom(model, array.shape[1], shape[1], config_grid)
            except ValueError as error:
                problems.append(f"{name} cannot be resized: {error}")
        elif array.shape != shape:
            problems.append(f"{name} has shape {array.shape}, the model's is {shape}")
        rows.append((name, entry, zoom))
    problems += [f"{name} is not part of the model" for name in sorted(stored.keys() - layout.keys())]
    if problems:
        more = f" and {len(problems) - 6} more" if len(problems) > 6 else ""
        raise CheckpointError(f"{source} does not fit the config: " + "; ".join(problems[:6]) + more)
    return rows


def _zoom(model: nn.Module, old: int, new: int, config_grid: tuple[int, int] | None) -> Zoom | None:
    """The grids of so many old and new position embeddings; None if they stay as they are."""
    grid = tuple(getattr(model, "visual", model).patch_embed.grid_size)
    old_grid = stored_grid(old, new - math.prod(grid), config_grid, grid)
    return None if old_grid == grid else (old_grid, grid)


def fill(tensors: Mapping[str, np.ndarray], rows: Rows, stored: Mapping[str, StoredArray]) -> None:
    """Read the weights into our tensors by name, which are writable and may be maps of a file.

    Raises:
        CheckpointError: for a file that cannot be read.
    """
    for name, entry, zoom in rows:
        target = entry.view(tensors[entry.tensor])
        if zoom is None:
            stored[name].read_into(target)
        else:
            target[...] = zoom_positions(stored[name].read(), *zoom)
