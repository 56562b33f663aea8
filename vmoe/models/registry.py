"""V-MoE and Soft MoE by name, in timm's registry; importing this file registers them."""

import sys
from functools import partial

from timm.data import IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from timm.models import generate_default_cfgs, load_pretrained, register_model, resolve_pretrained_cfg
from timm.models._builder import pretrained_cfg_for_features
from timm.models._features import FeatureGetterNet
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from vmoe.models.timm_builder import ABOUT_WEIGHTS, register_models
from vmoe.models.vision import VisionMoE

_TINY = {"img_size": 48, "patch_size": 8, "embed_dim": 128, "depth": 6, "num_heads": 4}
_SMALL = {"embed_dim": 512, "depth": 8, "num_heads": 8, "moe_layers": "last2"}
_BASE = {"embed_dim": 768, "depth": 12, "num_heads": 12}
_LARGE = {"embed_dim": 1024, "depth": 24, "num_heads": 16}
_HUGE = {"embed_dim": 1280, "depth": 32, "num_heads": 16}
_15B = {"embed_dim": 1408, "depth": 48, "num_heads": 16, "mlp_ratio": 6400 / 1408}
# Soft MoE's ViTs pool the mean over the patches after the last norm. Their S is 12 blocks of width 384, V-MoE's is 8
# of width 512.
_SOFT = {"router": "soft", "num_slots": 1, "moe_layers": "second_half"}
_SOFT |= {"class_token": False, "global_pool": "avg", "fc_norm": False, "qk_norm": True}
_SOFT_SMALL = {**_SOFT, "embed_dim": 384, "depth": 12, "num_heads": 6}

# The arguments of `VisionMoE` that each name stands for.
MODELS: dict[str, dict] = {
    "vmoe_tiny_patch8_48": {**_TINY, "num_selected_experts": 1},  # for tests and first steps
    "vmoe_small_patch32_224": {**_SMALL, "patch_size": 32},
    "vmoe_base_patch32_224": {**_BASE, "patch_size": 32},
    "vmoe_base_patch16_224": {**_BASE, "patch_size": 16},
    "vmoe_large_patch32_224": {**_LARGE, "patch_size": 32},
    "vmoe_large_patch16_224": {**_LARGE, "patch_size": 16},
    "vmoe_huge_patch14_224": {**_HUGE, "patch_size": 14},
    "vmoe_15b_patch14_224": {**_15B, "patch_size": 14, "num_experts": 32},
    "softmoe_tiny_patch8_48": {**_SOFT, **_TINY, "num_experts": 32},  # for first steps
    "softmoe_small_patch16_224": {**_SOFT_SMALL, "patch_size": 16, "num_experts": 128},
    "softmoe_small_patch14_224": {**_SOFT_SMALL, "patch_size": 14, "num_experts": 256},
    "softmoe_base_patch16_224": {**_SOFT, **_BASE, "patch_size": 16, "num_experts": 128},
    "softmoe_large_patch16_224": {**_SOFT, **_LARGE, "patch_size": 16, "num_experts": 128},
    "softmoe_huge_patch14_224": {**_SOFT, **_HUGE, "patch_size": 14, "num_experts": 256},
}


# The reference's activation, epsilon and initialisation.
_STYLE = {"act_layer": "gelu_tanh", "norm_layer": partial(nn.LayerNorm, eps=1e-6), "weight_init": "jax"}

# Pixels are scaled to -1..1, as in the reference.
_CFG = {"mean": IMAGENET_INCEPTION_MEAN, "std": IMAGENET_INCEPTION_STD, "interpolation": "bilinear"}
_CFG |= {"fixed_input_size": True, "first_conv": "patch_embed.proj", "classifier": "head", "license": "apache-2.0"}
_TINY_CFG = {**_CFG, "input_size": (3, 48, 48), "crop_pct": 1.0, "interpolation": "bicubic"}
# `register_model` looks for this name.
default_cfgs = generate_default_cfgs({name: _TINY_CFG if "tiny" in name else _CFG for name in MODELS})


def _filter(state_dict: dict[str, Tensor], model: VisionTransformer) -> dict[str, Tensor]:
    """timm's filter, which resizes positions and patches, without its removal of representation layers."""
    kept = {name: tensor for name, tensor in state_dict.items() if name.startswith("pre_logits.")}
    filtered = checkpoint_filter_fn(state_dict, model)
    return {**filtered, **kept} if isinstance(getattr(model, "pre_logits", None), nn.Linear) else filtered


def upcycled_moe(pretrained: bool = False, spec: dict | None = None, **kwargs) -> nn.Module:
    """A model by its `vmoe.models.spec.model_spec`, such as an upcycled one: what `save_hub_folder` names.

    With `features_only` its features of `out_indices`, by default of the last three stages or blocks.
    """
    from vmoe.models.factory import build
    from vmoe.models.validation import check_metadata

    if spec is None:
        raise ValueError(
            "upcycled_moe is made from a folder, timm.create_model('local-dir:FOLDER'), or by vmoe.upcycle"
        )
    about = {key: kwargs.pop(key, None) for key in ABOUT_WEIGHTS}
    check_metadata({**spec, "preprocess": {}, "extra": {}})
    features = {"out_indices": kwargs.pop("out_indices", 3)} if kwargs.pop("features_only", False) else None
    model = build({**spec, "kwargs": {**spec["kwargs"], **kwargs}})
    overlay = about["pretrained_cfg_overlay"]
    config = resolve_pretrained_cfg("upcycled_moe", about["pretrained_cfg"], overlay).to_dict()
    model.pretrained_cfg = model.default_cfg = config
    if pretrained:
        of_timm = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)  # for another image size
        filter_fn = _filter if isinstance(model, VisionTransformer) else of_timm
        sizes = {"num_classes": model.num_classes, "in_chans": model.in_chans}
        load_pretrained(model, config, filter_fn=filter_fn, cache_dir=about["cache_dir"], **sizes)
    if features is None:
        return model
    getter = FeatureGetterNet(model, **features)
    getter.pretrained_cfg = getter.default_cfg = pretrained_cfg_for_features(config)
    return getter


default_cfgs |= generate_default_cfgs({"upcycled_moe": {}})
register_model(upcycled_moe)
_styled = {name: {**_STYLE, **own} for name, own in MODELS.items()}
_features = {"out_indices": 3, "feature_cls": "getter"}
register_models(__name__, VisionMoE, _styled, lambda _: _features, pretrained_filter_fn=_filter)
