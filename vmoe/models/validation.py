"""Checks of the settings in a file of weights, which anybody may have written.

They must not name other files or addresses, nor ask for a model that is much larger than the weights beside them.
"""

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
# The same of open_clip's models.
LOADING |= {"hf_model_name", "hf_model_pretrained", "hf_tokenizer_name", "timm_model_pretrained"}
PREPROCESSING = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
# The largest value of a setting: blocks, and pixels of an image's side.
LIMITS = {"depth": 1000, "img_size": 2**13, "image_size": 2**13, "input_size": 2**13}
# A classifier of other classes, and positions for other images, may be larger than those of the file.
SPARE_NUMBERS, SPARE_TENSORS = 2**26, 1000


def check_metadata(metadata: Any) -> None:
    """Raises ValueError, which names the setting, unless `metadata` is as `save_pretrained` writes it."""
    if not isinstance(metadata, dict):
        raise ValueError(f"they must be a dictionary, not {type(metadata).__name__}")
    steps = metadata.get("upcycle", [])
    metadata = {**metadata, "upcycle": steps if isinstance(steps, list) else [steps]}
    for key, kind in (("name", str), ("kwargs", dict), ("preprocess", dict), ("extra", dict)):
        if not isinstance(metadata.get(key), kind):
            raise ValueError(f"{key} is missing or no {kind.__name__}")
    if "experts" in metadata and metadata["experts"] not in tuple(STORED):
        raise ValueError(f"experts is none of {', '.join(STORED)}")
    if not all(isinstance(step, dict) for step in metadata["upcycle"]) or len(metadata["upcycle"]) > 2:
        raise ValueError("upcycle is no dict, nor a list of one for each tower")
    for key in ("name", "kwargs", "upcycle"):
        _check_setting(key, metadata[key], key)
    _check_preprocessing(metadata["preprocess"], "preprocess")


def without_loading(settings: dict[str, Any]) -> dict[str, Any]:
    """A model's settings without what `check_metadata` refuses: where its first weights came from."""
    kept = {key: value for key, value in settings.items() if key not in LOADING}
    for key, value in kept.items():
        if key == "pretrained_cfg_overlay" and isinstance(value, dict):
            kept[key] = {name: fact for name, fact in value.items() if name in PREPROCESSING}
        elif isinstance(value, dict):
            kept[key] = without_loading(value)
    return kept


def _check_setting(key: str, value: Any, where: str) -> None:
    if key in LOADING:
        raise ValueError(f"{where} would load something else; a file's settings must not")
    if key in ("name", "timm_model_name") and (
        not isinstance(value, str) or ":" in value
    ):  # "hf-hub:NAME" and "local-dir:PATH" load
        raise ValueError(f"{where} is no name of a model")
    if key == "pretrained_cfg_overlay":
        _check_preprocessing(value, where)
    elif isinstance(value, dict):
        for name, inner in value.items():
            _check_setting(name, inner, f"{where}.{name}")
    elif isinstance(value, list) and (value or key not in LIMITS):
        for inner in value:
            _check_setting(key, inner, where)
    elif key in LIMITS:
        if type(value) is not int or not 1 <= value <= LIMITS[key]:
            raise ValueError(f"{where} must be a positive whole number, at most {LIMITS[key]}")
    # Infinity is a setting that users have: no capacity limit.
    elif isinstance(value, (int, float)) and not (abs(value) < 2**31 or value == math.inf):
        raise ValueError(f"{where} is not a sensible number")


def _check_preprocessing(values: Any, where: str) -> None:
    if not isinstance(values, dict) or not values.keys() <= set(PREPROCESSING):
        raise ValueError(f"{where} must hold nothing but {', '.join(sorted(PREPROCESSING))}")
    for key, value in values.items():
        _check_setting(key, value, f"{where}.{key}")
        if key in ("interpolation", "crop_mode"):
            good = isinstance(value, str)
        elif key == "crop_pct":
            good = value is None or (isinstance(value, (int, float)) and 0.01 <= value <= 10)
        else:
            good = isinstance(value, list) and (len(value) == 3 if key == "input_size" else len(value) > 0)
            good = good and all(isinstance(each, (int, float)) and math.isfinite(each) for each in value)
        if not good:
            raise ValueError(f"{where}.{key} is not what it should be")


@contextmanager
def bounded_model(source: object, numbers: int, tensors: int) -> Iterator[None]:
    """A ValueError for a model built in it that is much larger than `source`, with its numbers in so many tensors."""
    thread = threading.get_ident()
    left_numbers, left_tensors = 4 * numbers + SPARE_NUMBERS, 4 * tensors + SPARE_TENSORS

    def count(_module: nn.Module, _name: str, tensor: Tensor | None) -> None:
        nonlocal left_numbers, left_tensors
        if tensor is None or threading.get_ident() != thread:
            return
        left_numbers, left_tensors = left_numbers - tensor.numel(), left_tensors - 1
        if left_numbers < 0 or left_tensors < 0:
            raise ValueError(f"{source}: its settings describe a model much larger than its {numbers} numbers")

    with (
        torch_module.register_module_parameter_registration_hook(count),
        torch_module.register_module_buffer_registration_hook(count),
    ):
        yield
