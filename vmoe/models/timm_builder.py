"""What the files of models share to be in timm's registry, also with the settings of a file of this package."""

import logging
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import timm
from timm.models import build_model_with_cfg, register_model, resolve_pretrained_cfg
from torch import nn

from vmoe.moe.config import preset_settings

logger = logging.getLogger("vmoe.models")

ABOUT_WEIGHTS = ("pretrained_cfg", "pretrained_cfg_overlay", "pretrained_model_args", "cache_dir", "device", "dtype")


def register_models(
    module: str,
    model_class: type[nn.Module],
    models: Mapping[str, dict],
    feature_cfg: Callable[[dict], dict],
    **options: Any,
) -> None:
    """Registers a class under names, each with the arguments that it stands for, as functions of a module, where timm
    looks. `feature_cfg` is that of `features_only`, from a model's arguments; `options` are of timm's builder."""
    for name, own in models.items():
        build = partial(_create, name, own, model_class, feature_cfg, options)
        build.__name__, build.__module__ = name, module
        setattr(sys.modules[module], name, register_model(build))


def _create(
    name: str,
    own: dict,
    model_class: type[nn.Module],
    feature_cfg: Callable[[dict], dict],
    options: dict,
    pretrained: bool = False,
    **kwargs,
) -> nn.Module:
    """The model of a name; the user's settings go over its preset, and that over what the name stands for."""
    stored_name, kwargs = with_settings_of_file(name, pretrained, kwargs)
    if stored_name != name:
        return timm.model_entrypoint(stored_name)(pretrained, **kwargs)
    preset = preset_settings(kwargs)
    asked = {**preset, **kwargs}
    own = {key: value for key, value in own.items() if key not in preset}
    if asked.get("router", "soft") != "soft" or "capacity_factor" in asked:
        own.pop("num_slots", None)
    model_args = {**own, **kwargs}
    features = feature_cfg(model_args)
    features = features | {"out_indices": model_args.pop("out_indices", features["out_indices"])}
    model = build_model_with_cfg(model_class, name, pretrained, feature_cfg=features, **options, **model_args)
    model._model_args = {key: value for key, value in kwargs.items() if key not in ABOUT_WEIGHTS}  # as timm's factory
    return model


def with_settings_of_file(name: str, pretrained: bool, kwargs: dict) -> tuple[str, dict]:
    """The name and settings in a file of this package to which `pretrained_cfg` or its overlay points."""
    from vmoe.models.serialization import METADATA_KEY, read_pretrained_metadata, safetensors_metadata  # slow to import

    overlay = kwargs.get("pretrained_cfg_overlay") or {}
    file = resolve_pretrained_cfg(name, kwargs.get("pretrained_cfg"), overlay).file
    if not pretrained or not str(file).endswith(".safetensors") or METADATA_KEY not in safetensors_metadata(file):
        return name, kwargs
    metadata = read_pretrained_metadata(file)
    stored_name, own = metadata["name"], dict(metadata["kwargs"])
    if not timm.is_model(stored_name) or metadata.keys() & {"upcycle", "experts"}:
        raise ValueError(f"{file} holds a {stored_name} that timm cannot make; use vmoe.create_model(pretrained=FILE)")
    if stored_name != name:
        logger.warning("%s holds a %s: that is made, not %s", file, stored_name, name)
    # What timm compares with the user's settings to know whether the classifier must start from scratch.
    about = {**metadata["preprocess"], **own.pop("pretrained_cfg_overlay", {}), "file": str(file)}
    about = {key: tuple(value) if isinstance(value, list) else value for key, value in about.items()}
    if "num_classes" in own:
        about["num_classes"] = own["num_classes"]
    return stored_name, {**own, **kwargs, "pretrained_cfg_overlay": {**about, **overlay}}
