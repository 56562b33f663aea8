"""V-MoE and Soft MoE by name, in timm's registry; importing this file registers them."""

import logging
from dataclasses import asdict, is_dataclass
from functools import partial

from timm.data import IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, is_model, model_entrypoint, register_model
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn

from vmoe.models.vision import VisionMoE, take_routing
from vmoe.moe.config import SETTING_NAMES, preset_settings

logger = logging.getLogger("vmoe.models")


def _cfg(**kwargs) -> dict:
    """timm's description of a model's input; pixels are scaled to -1..1, as in the reference."""
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": 0.875,
        "interpolation": "bilinear",
        "fixed_input_size": True,
        "mean": IMAGENET_INCEPTION_MEAN,
        "std": IMAGENET_INCEPTION_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "apache-2.0",
        "paper_ids": "arXiv:2106.05974",
        "paper_name": "Scaling Vision with Sparse Mixture of Experts",
        "origin_url": "https://github.com/google-research/vmoe",
        **kwargs,
    }


def _soft_cfg(**kwargs) -> dict:
    return _cfg(
        paper_ids="arXiv:2308.00951", paper_name="From Sparse to Soft Mixtures of Experts", **kwargs
    )  # fmt: skip


_TINY_INPUT = {"input_size": (3, 48, 48), "crop_pct": 1.0, "interpolation": "bicubic"}

default_cfgs = generate_default_cfgs(
    {
        "vmoe_tiny_patch8_48": _cfg(**_TINY_INPUT),
        "vmoe_small_patch32_224": _cfg(),
        "vmoe_base_patch32_224": _cfg(),
        "vmoe_base_patch16_224": _cfg(),
        "vmoe_large_patch32_224": _cfg(),
        "vmoe_large_patch16_224": _cfg(),
        "vmoe_huge_patch14_224": _cfg(),
        "vmoe_15b_patch14_224": _cfg(),
        "softmoe_tiny_patch8_48": _soft_cfg(**_TINY_INPUT),
        "softmoe_small_patch16_224": _soft_cfg(),
        "softmoe_small_patch14_224": _soft_cfg(),
        "softmoe_base_patch16_224": _soft_cfg(),
        "softmoe_large_patch16_224": _soft_cfg(),
        "softmoe_huge_patch14_224": _soft_cfg(),
    }
)


def _filter(state_dict: dict[str, Tensor], model: VisionMoE) -> dict[str, Tensor]:
    """timm's own filter (resized positions and patches), which throws representation layers away."""
    kept = {name: tensor for name, tensor in state_dict.items() if name.startswith("pre_logits.")}
    filtered = checkpoint_filter_fn(state_dict, model)
    return {**filtered, **kept} if isinstance(model.pre_logits, nn.Linear) else filtered


def _create(variant: str, pretrained: bool, args: dict, kwargs: dict) -> VisionMoE:
    """Build the model of a name.

    Args:
        variant: the name.
        pretrained: of timm.
        args: what the name stands for; a preset among the user's settings goes over its routing settings.
        kwargs: the user's settings.
    """
    args, kwargs = dict(args), dict(kwargs)
    name, kwargs = _with_settings_of_file(variant, pretrained, kwargs)
    if name != variant:
        return model_entrypoint(name)(pretrained, **kwargs)
    own_routing = {name: args.pop(name) for name in SETTING_NAMES & args.keys()}
    preset = preset_settings(kwargs)
    asked = {**preset, **kwargs}
    if "num_slots" not in kwargs and (asked.get("router", "soft") != "soft" or "capacity_factor" in asked):
        own_routing.pop("num_slots", None)  # the name's; the user asked for another router or for a capacity
    routing = take_routing(kwargs, own_routing)
    model_args = {
        "act_layer": "gelu_tanh",
        "norm_layer": partial(nn.LayerNorm, eps=1e-6),
        "weight_init": "jax",
        **args,
        **routing,
        **kwargs,
    }
    out_indices = model_args.pop("out_indices", 3)
    return build_model_with_cfg(
        VisionMoE,
        variant,
        pretrained,
        pretrained_filter_fn=_filter,
        feature_cfg={"out_indices": out_indices, "feature_cls": "getter"},
        **model_args,
    )


def _with_settings_of_file(variant: str, pretrained: bool, kwargs: dict) -> tuple[str, dict]:
    """The name and settings in a file of this package that timm is told to load, so that the file is all it needs.

    Args:
        variant: the name that the user gave.
        pretrained: of timm.
        kwargs: the user's settings, which win; "file" of its `pretrained_cfg_overlay` or `pretrained_cfg` is the file.
    """
    from vmoe.models.serialization import METADATA_KEY, read_pretrained_metadata, safetensors_metadata

    config, overlay = kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay") or {}
    config = asdict(config) if is_dataclass(config) else config if isinstance(config, dict) else {}
    file = overlay.get("file", config.get("file"))
    if not pretrained or not str(file).endswith(".safetensors") or METADATA_KEY not in safetensors_metadata(file):
        return variant, kwargs
    metadata = read_pretrained_metadata(file)
    name, own = metadata["name"], dict(metadata["kwargs"])
    if not is_model(name) or metadata.keys() & {"upcycle", "experts"}:
        raise ValueError(f"{file} holds a {name} that timm cannot make; use vmoe.create_model(pretrained=FILE)")
    if name != variant:
        logger.warning("%s holds a %s: that is made, not %s", file, name, variant)
    # What timm compares with the user's settings to know whether the classifier must start anew.
    about = {**metadata["preprocess"], **own.pop("pretrained_cfg_overlay", {}), "file": str(file)}
    about = {key: tuple(value) if isinstance(value, list) else value for key, value in about.items()}
    if "num_classes" in own:
        about["num_classes"] = own["num_classes"]
    return name, {**own, **kwargs, "pretrained_cfg_overlay": {**about, **overlay}}


_TINY = {"img_size": 48, "patch_size": 8, "embed_dim": 128, "depth": 6, "num_heads": 4}
_BASE = {"embed_dim": 768, "depth": 12, "num_heads": 12}
_LARGE = {"embed_dim": 1024, "depth": 24, "num_heads": 16}
_HUGE = {"embed_dim": 1280, "depth": 32, "num_heads": 16}


@register_model
def vmoe_tiny_patch8_48(pretrained: bool = False, **kwargs) -> VisionMoE:
    """V-MoE of 6 blocks of width 128 for 48 px pictures in patches of 8 px: for tests and first steps."""
    return _create("vmoe_tiny_patch8_48", pretrained, {**_TINY, "num_selected_experts": 1}, kwargs)


@register_model
def vmoe_small_patch32_224(pretrained: bool = False, **kwargs) -> VisionMoE:
    """V-MoE S/32: 8 blocks of width 512 (the reference's S, not timm's), experts in the last two odd blocks."""
    args = {"patch_size": 32, "embed_dim": 512, "depth": 8, "num_heads": 8, "moe_layers": "last2"}
    return _create("vmoe_small_patch32_224", pretrained, args, kwargs)


@register_model
def vmoe_base_patch32_224(pretrained: bool = False, **kwargs) -> VisionMoE:
    """V-MoE B/32: 12 blocks of width 768, experts in every second."""
    return _create("vmoe_base_patch32_224", pretrained, {"patch_size": 32, **_BASE}, kwargs)


@register_model
def vmoe_base_patch16_224(pretrained: bool = False, **kwargs) -> VisionMoE:
    """V-MoE B/16: 12 blocks of width 768, experts in every second."""
    return _create("vmoe_base_patch16_224", pretrained, {"patch_size": 16, **_BASE}, kwargs)


@register_model
def vmoe_large_patch32_224(pretrained: bool = False, **kwargs) -> VisionMoE:
    """V-MoE L/32: 24 blocks of width 1024, experts in every second."""
    return _create("vmoe_large_patch32_224", pretrained, {"patch_size": 32, **_LARGE}, kwargs)


@register_model
def vmoe_large_patch16_224(pretrained: bool = False, **kwargs) -> VisionMoE:
    """V-MoE L/16: 24 blocks of width 1024, experts in every second."""
    return _create("vmoe_large_patch16_224", pretrained, {"patch_size": 16, **_LARGE}, kwargs)


@register_model
def vmoe_huge_patch14_224(pretrained: bool = False, **kwargs) -> VisionMoE:
    """V-MoE H/14: 32 blocks of width 1280, experts in every second."""
    return _create("vmoe_huge_patch14_224", pretrained, {"patch_size": 14, **_HUGE}, kwargs)


@register_model
def vmoe_15b_patch14_224(pretrained: bool = False, **kwargs) -> VisionMoE:
    """V-MoE-15B: 48 blocks of width 1408 with MLPs of width 6400, 32 experts in every second block."""
    args = {"patch_size": 14, "embed_dim": 1408, "depth": 48, "num_heads": 16, "mlp_ratio": 6400 / 1408}
    return _create("vmoe_15b_patch14_224", pretrained, {**args, "num_experts": 32}, kwargs)


# Soft MoE's ViTs: no class token, the mean over the patches after the last norm, QK norm, experts in the upper half,
# one slot each. Their S is 12 blocks of width 384, unlike V-MoE's.
_SOFT = {
    "router": "soft",
    "num_slots": 1,
    "moe_layers": "second_half",
    "class_token": False,
    "global_pool": "avg",
    "fc_norm": False,
    "qk_norm": True,
}
_SOFT_SMALL = {"embed_dim": 384, "depth": 12, "num_heads": 6}


@register_model
def softmoe_tiny_patch8_48(pretrained: bool = False, **kwargs) -> VisionMoE:
    """Soft MoE of 6 blocks of width 128 for 48 px pictures in patches of 8 px, 32 experts: for first steps."""
    return _create("softmoe_tiny_patch8_48", pretrained, {**_SOFT, **_TINY, "num_experts": 32}, kwargs)


@register_model
def softmoe_small_patch16_224(pretrained: bool = False, **kwargs) -> VisionMoE:
    """Soft MoE S/16, 128 experts: 12 blocks of width 384."""
    args = {**_SOFT, **_SOFT_SMALL, "patch_size": 16, "num_experts": 128}
    return _create("softmoe_small_patch16_224", pretrained, args, kwargs)


@register_model
def softmoe_small_patch14_224(pretrained: bool = False, **kwargs) -> VisionMoE:
    """Soft MoE S/14, 256 experts: 12 blocks of width 384."""
    args = {**_SOFT, **_SOFT_SMALL, "patch_size": 14, "num_experts": 256}
    return _create("softmoe_small_patch14_224", pretrained, args, kwargs)


@register_model
def softmoe_base_patch16_224(pretrained: bool = False, **kwargs) -> VisionMoE:
    """Soft MoE B/16, 128 experts: 12 blocks of width 768."""
    args = {**_SOFT, **_BASE, "patch_size": 16, "num_experts": 128}
    return _create("softmoe_base_patch16_224", pretrained, args, kwargs)


@register_model
def softmoe_large_patch16_224(pretrained: bool = False, **kwargs) -> VisionMoE:
    """Soft MoE L/16, 128 experts: 24 blocks of width 1024."""
    args = {**_SOFT, **_LARGE, "patch_size": 16, "num_experts": 128}
    return _create("softmoe_large_patch16_224", pretrained, args, kwargs)


@register_model
def softmoe_huge_patch14_224(pretrained: bool = False, **kwargs) -> VisionMoE:
    """Soft MoE H/14, 256 experts: 32 blocks of width 1280."""
    args = {**_SOFT, **_HUGE, "patch_size": 14, "num_experts": 256}
    return _create("softmoe_huge_patch14_224", pretrained, args, kwargs)
