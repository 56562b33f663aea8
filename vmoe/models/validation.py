"""What a file of weights says about its model, which may come from a stranger: checked before a model is built from it.

The settings are arguments of a constructor. They must not name other files or addresses, nor ask for a model that is
much larger than the weights beside them.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from vmoe.moe.quantize import STORED

# Arguments of timm.create_model that load or fetch something.
LOADING = frozenset({"pretrained", "pretrained_cfg", "checkpoint_path", "cache_dir", "pretrained_model_args"})
PREPROCESSING = frozenset({"input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode"})
MAX_SIDE, MAX_DEPTH = 2**13, 1000  # pixels of a picture's side; blocks
# A classifier of other classes, and positions for other pictures, may be larger than those of the file.
SPARE_NUMBERS, SPARE_TENSORS = 2**26, 1000


def check_metadata(metadata: Any) -> None:
    """Refuses settings that no file of this package holds.

    Args:
        metadata: as `vmoe.models.factory.save_pretrained` writes it.

    Raises:
        ValueError: names the setting; without the file's name.
    """
    if not isinstance(metadata, dict):
        raise ValueError(f"they must be a dictionary, not {type(metadata).__name__}")
    for key, kind in (("name", str), ("kwargs", dict), ("preprocess", dict), ("extra", dict)):
        if not isinstance(metadata.get(key), kind):
            raise ValueError(f"{key} is missing or no {kind.__name__}")
    if not isinstance(metadata.get("upcycle", {}), dict):
        raise ValueError("upcycle is no dict")
    if "experts" in metadata and metadata["experts"] not in tuple(STORED):
        raise ValueError(f"experts is none of {', '.join(STORED)}")
    _check_settings(metadata["kwargs"], "kwargs")
    _check_settings(metadata.get("upcycle", {}), "upcycle")
    _check_name(metadata["name"], "name")
    _check_preprocessing(metadata["preprocess"], "preprocess")


def without_loading(spec: dict[str, Any]) -> dict[str, Any]:
    """A model's specification without what `check_metadata` refuses: where its first weights came from."""

    def cleaned(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {
            key: {name: fact for name, fact in inner.items() if name in PREPROCESSING}
            if key == "pretrained_cfg_overlay" and isinstance(inner, dict)
            else cleaned(inner)
            for key, inner in value.items()
            if key not in LOADING
        }

    return cleaned(spec)


def _check_settings(value: Any, where: str) -> None:
    if isinstance(value, dict):
        for key, inner in value.items():
            if key in LOADING:
                raise ValueError(f"{where}.{key} would load something else; a file's settings must not")
            if key == "name":
                _check_name(inner, f"{where}.name")
            elif key == "pretrained_cfg_overlay":
                _check_preprocessing(inner, f"{where}.{key}")
            elif key == "depth":
                depths = inner if isinstance(inner, list) else [inner]  # one for each stage
                if not all(type(depth) is int and 0 <= depth <= MAX_DEPTH for depth in depths):
                    raise ValueError(f"{where}.{key} must be a whole number of blocks, at most {MAX_DEPTH}")
            elif key in ("img_size", "image_size"):
                _check_sides(inner, f"{where}.{key}")
            else:
                _check_settings(inner, f"{where}.{key}")
    elif isinstance(value, list):
        for inner in value:
            _check_settings(inner, where)
    # Infinity is a setting that users have: a capacity without a limit.
    elif isinstance(value, (int, float)) and not (abs(value) < 2**31 or value == math.inf):
        raise ValueError(f"{where} is not a sensible number")


def _check_name(name: Any, where: str) -> None:
    if not isinstance(name, str) or ":" in name:  # such as "hf-hub:NAME" and "local-dir:PATH", which load
        raise ValueError(f"{where} is no name of a model")


def _check_sides(value: Any, where: str) -> None:
    sides = value if isinstance(value, list) else [value]
    if not sides or not all(type(side) is int and 1 <= side <= MAX_SIDE for side in sides if side is not None):
        raise ValueError(f"{where} must be whole numbers of pixels, 1 to {MAX_SIDE}")


def _check_preprocessing(values: Any, where: str) -> None:
    if not isinstance(values, dict) or not values.keys() <= PREPROCESSING:
        raise ValueError(f"{where} must hold nothing but {', '.join(sorted(PREPROCESSING))}")
    for key, value in values.items():
        if key == "input_size":
            _check_sides(value, f"{where}.{key}")
            good = isinstance(value, list) and len(value) == 3
        elif key in ("mean", "std"):
            good = isinstance(value, list) and all(_is_number(each) for each in value)
        elif key == "crop_pct":
            good = value is None or (_is_number(value) and 0.01 <= value <= 10)
        else:
            good = isinstance(value, str)
        if not good:
            raise ValueError(f"{where}.{key} is not what it should be")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


@contextmanager
def bounded_model(source: object, numbers: int, tensors: int) -> Iterator[None]:
    """Models built inside that are much larger than their file end in a ValueError before they fill the memory.

    Args:
        source: the file, for the message.
        numbers: in its tensors.
        tensors: how many there are.
    """
    thread = threading.get_ident()
    most_numbers, most_tensors = 4 * numbers + SPARE_NUMBERS, 4 * tensors + SPARE_TENSORS
    built_numbers = built_tensors = 0

    def count(_module: nn.Module, _name: str, tensor: Tensor | None) -> None:
        nonlocal built_numbers, built_tensors
        if tensor is None or threading.get_ident() != thread:
            return
        built_numbers, built_tensors = built_numbers + tensor.numel(), built_tensors + 1
        if built_numbers > most_numbers or built_tensors > most_tensors:
            raise ValueError(f"{source}: its settings describe a model much larger than its {numbers} numbers")

    hooks = [
        torch_module.register_module_parameter_registration_hook(count),
        torch_module.register_module_buffer_registration_hook(count),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
