"""How images reach a model, in timm's words and in open_clip's."""

from collections.abc import Mapping
from typing import Any

from timm.data import IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD, resolve_model_data_config
from timm.utils import unwrap_model
from torch import nn

from vmoe.models.limoe import LIMoE
from vmoe.models.validation import PREPROCESSING

# open_clip's `resize_mode` and timm's `crop_mode`; both crop or pad to the whole size.
CROP_MODES = {"shortest": "center", "longest": "border", "squash": "squash"}


def in_chans(model: nn.Module) -> int:
    """Channels of a model's images."""
    return getattr(unwrap_model(model), "in_chans", 3)


def preprocess_config(model: nn.Module) -> dict:
    """How images reach the model: "input_size" (C, H, W), "mean", "std", "interpolation", "crop_pct", "crop_mode"; for
    other than 3 channels mean and std are averages over red, green and blue. What open_clip set on a model wins."""
    channels = in_chans(model)
    visual = getattr(model, "visual", model)
    config = {"mean": IMAGENET_INCEPTION_MEAN, "std": IMAGENET_INCEPTION_STD}
    config |= {"interpolation": "bicubic", "crop_pct": 1.0, "crop_mode": "center"}
    if not isinstance(model, LIMoE):
        config = dict(resolve_model_data_config(visual))
    if isinstance(given := getattr(visual, "preprocess_cfg", None), Mapping):
        config |= {key: given[key] for key in ("mean", "std", "interpolation") if key in given}
        config |= {"crop_pct": 1.0, "crop_mode": CROP_MODES[given.get("resize_mode", "shortest")]}
    config["input_size"] = (channels, *(_built_size(visual) or config["input_size"][1:]))
    for key in ("mean", "std"):
        values = tuple(config[key])
        config[key] = values if len(values) == channels else (sum(values) / len(values),) * channels
    return {key: config[key] for key in PREPROCESSING}


def set_preprocess(model: nn.Module, config: Mapping[str, Any]) -> None:
    """Gives a model the preprocessing of its file; the image size is the model's own if it is built for one."""
    config = {key: tuple(value) if isinstance(value, list) else value for key, value in config.items()}
    own, visual = preprocess_config(model), getattr(model, "visual", model)
    if _built_size(visual) or "input_size" not in config:
        config["input_size"] = own["input_size"]
    config["input_size"] = (own["input_size"][0], *config["input_size"][1:])
    if all(config.get(key, own[key]) == own[key] for key in PREPROCESSING):
        return
    if getattr(visual, "pretrained_cfg", None) and not hasattr(visual, "preprocess_cfg"):
        visual.pretrained_cfg = {**visual.pretrained_cfg, **config}
    else:
        visual.preprocess_cfg = {"mode": "RGB", "fill_color": 0, **open_clip_preprocess({**own, **config})}


def _built_size(visual: nn.Module) -> Any:
    """The image size that an image tower is built with, not its name's; None if it takes any, as convolutions do."""
    return getattr(getattr(visual, "patch_embed", None), "img_size", None) or getattr(visual, "image_size", None)


def open_clip_preprocess(config: Mapping[str, Any]) -> dict[str, Any]:
    """A preprocessing in open_clip's words, which have no `crop_pct`; a ValueError for one that open_clip cannot do."""
    modes = {timm_mode: mode for mode, timm_mode in CROP_MODES.items()}
    if config["crop_mode"] not in modes or config["interpolation"] not in ("bicubic", "bilinear", "random"):
        raise ValueError(
            f"open_clip cannot preprocess with crop_mode={config['crop_mode']!r} and "
            f"interpolation={config['interpolation']!r}: it has {', '.join(modes)} and bicubic, bilinear"
        )
    if config["input_size"][0] != 3:
        raise ValueError(f"open_clip reads images with 3 channels, and the model takes {config['input_size'][0]}")
    kept = {key: list(config[key]) for key in ("mean", "std")}
    return {**kept, "interpolation": config["interpolation"], "resize_mode": modes[config["crop_mode"]]}
