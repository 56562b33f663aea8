"""What the files of models share to be in timm's registry, also with the settings of a file of this package."""

import logging
import sys
from collections.abc import Callable, Iterable
from functools import partial

import timm
from timm.models import register_model, resolve_pretrained_cfg
from torch import nn

logger = logging.getLogger("vmoe.models")

ABOUT_WEIGHTS = ("pretrained_cfg", "pretrained_cfg_overlay", "pretrained_model_args", "cache_dir", "device", "dtype")


def register_names(module: str, names: Iterable[str], create: Callable[..., nn.Module]) -> None:
    """Registers `create(name, pretrained, **kwargs)` under each name, as a function of a module, where timm looks."""
    for name in names:
        build = partial(create, name)
        build.__name__, build.__module__ = name, module
        setattr(sys.modules[module], name, register_model(build))


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
