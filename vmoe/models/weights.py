"""Files of weights: found, read, and loaded into models.

A model's file is one safetensors file; `vmoe.models.factory` writes it, and its metadata says how to build the model.
"""

import json
import logging
import math
import re
from pathlib import Path

from safetensors import SafetensorError, safe_open
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from vmoe.models.two_tower import TwoTower

logger = logging.getLogger("vmoe.models")

METADATA_KEY = "vmoe"
WEIGHTS_NAME, AVERAGE_NAME = "model.safetensors", "ema.safetensors"


class WeightsError(ValueError):
    """A file of weights that cannot be read or does not fit the model."""


def find_weights(path: str | Path) -> Path:
    """The weights' file of a `.safetensors` path, of a checkpoint's folder, or of a run's folder (its last checkpoint).

    In a folder the moving average stands for the model, if the run kept one.

    Raises:
        WeightsError: if there is none.
    """
    path = Path(path)
    if path.is_file():
        return path
    if (path / WEIGHTS_NAME).is_file():
        average = path / AVERAGE_NAME
        return average if average.is_file() else path / WEIGHTS_NAME
    checkpoints = path if path.name == "checkpoints" else path / "checkpoints"
    # Not what a process that died while saving left behind ("step_000450.unfinished").
    steps = [folder for folder in checkpoints.glob("step_*") if re.fullmatch(r"step_\d+", folder.name)]
    if not steps:
        reason = "it does not exist" if not path.exists() else f"it holds no {WEIGHTS_NAME} and no checkpoints"
        raise WeightsError(f"no weights at {path}: {reason}; give a .safetensors file, a checkpoint or a run's folder")
    last = max(steps, key=lambda folder: int(folder.name.removeprefix("step_")))
    if not (last / WEIGHTS_NAME).is_file():
        raise WeightsError(f"{last} has lost its {WEIGHTS_NAME}; name another checkpoint of {checkpoints}")
    return find_weights(last)


def read_pretrained_metadata(file: str | Path) -> dict:
    """{"name", "kwargs", "preprocess", "extra"} of a file that `save_pretrained` wrote."""
    text = safetensors_metadata(file).get(METADATA_KEY)
    if text is None:
        raise WeightsError(f"{file} holds weights but no settings of a vmoe model: it was not written by this package")
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise WeightsError(f"the settings in {file} are damaged: {error}") from error


def safetensors_metadata(file: str | Path) -> dict[str, str]:
    """What a safetensors file says of itself."""
    with _open(file) as opened:
        return opened.metadata() or {}


def _open(file: str | Path):
    if not Path(file).is_file():
        raise WeightsError(f"no weights at {file}: it does not exist")
    try:
        return safe_open(str(file), framework="pt")
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{file} is not a readable safetensors file: {error}") from error


def load_weights(model: nn.Module, file: str | Path, new_head: bool = False) -> None:
    """Load a file's weights into a model; every tensor must fit.

    Args:
        model: changed in place, or not at all if there is an error.
        file: a safetensors file.
        new_head: for fine-tuning: a classifier of another size keeps the model's fresh one, and position embeddings of
            another picture size are interpolated.

    Raises:
        WeightsError: names the tensors that are missing, left over or of another shape.
    """
    with _open(file) as opened:
        weights = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  (not a dict)
        metadata = json.loads((opened.metadata() or {}).get(METADATA_KEY, "{}"))
    own = model.state_dict()
    if new_head:
        _new_head(model, own, weights, file)
        _resize_positions(model, own, weights, metadata.get("preprocess"))
    missing = sorted(own.keys() - weights.keys())
    unexpected = sorted(weights.keys() - own.keys())
    shapes = [
        f"{name} is {tuple(weights[name].shape)} in the file, {tuple(own[name].shape)} in the model"
        for name in own
        if name in weights and weights[name].shape != own[name].shape
    ]
    problems = []
    for kind, names in (("missing from the file", missing), ("not in the model", unexpected), ("other shape", shapes)):
        if names:
            more = f" and {len(names) - 8} more" if len(names) > 8 else ""
            problems.append(f"{kind}: {', '.join(names[:8])}{more}")
    if problems:
        raise WeightsError(f"{file} does not fit the model; " + "; ".join(problems))
    model.load_state_dict(weights)


def _new_head(model: nn.Module, own: dict[str, Tensor], weights: dict[str, Tensor], file: str | Path) -> None:
    """Replace a classifier of another shape in `weights` by the model's own."""
    classifiers = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    classifiers = (classifiers,) if isinstance(classifiers, str) else classifiers
    heads = [f"{classifier}.{part}" for classifier in classifiers for part in ("weight", "bias")]
    heads = [name for name in heads if name in own or name in weights]
    if all(name in own and name in weights and own[name].shape == weights[name].shape for name in heads):
        return
    logger.info("%s has a classifier of another size: the model's own starts anew", file)
    for name in heads:
        weights.pop(name, None)
        if name in own:
            weights[name] = own[name]


def _resize_positions(
    model: nn.Module, own: dict[str, Tensor], weights: dict[str, Tensor], preprocess: dict | None
) -> None:
    """Interpolate the position embeddings in `weights` to the model's grid of patches."""
    model = model.visual if isinstance(model, TwoTower) else model
    for name in ("pos_embed", "visual.pos_embed", "image_pos_embed"):
        if name not in own or name not in weights or own[name].shape[2:] != weights[name].shape[2:]:
            continue
        # Models with positions of another kind (a map of their own, none for a grid): left to the comparison of shapes.
        grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
        if grid is None or own[name].ndim != 3 or own[name].shape[1] < math.prod(grid):
            continue
        prefix = own[name].shape[1] - math.prod(grid)
        new_size, old_size = list(grid), None  # None: a square
        if preprocess is not None:
            patch = model.patch_embed.patch_size
            old_size = [side // step for side, step in zip(preprocess["input_size"][1:], patch, strict=True)]
            if math.prod(old_size) != weights[name].shape[1] - prefix:
                continue  # another patch size: left to the comparison of shapes
        if old_size != new_size:
            weights[name] = resample_abs_pos_embed(weights[name], new_size, old_size, num_prefix_tokens=prefix)
