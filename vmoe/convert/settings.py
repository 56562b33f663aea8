"""The reference's model config as arguments of `vmoe.create_model`.

Nothing is guessed: a key without a meaning here, or a value that cannot be expressed, is an error that names it.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from vmoe.convert.reference_config import ConfigError, Section, pair
from vmoe.moe.dispatch import expert_capacity

Shapes = Mapping[str, tuple[int, ...]]

# A registered name for each known size, so that a file says what it is; every setting is given beside it.
_NAMES = {
    (512, 8, 32): "vmoe_small_patch32_224",
    (768, 12, 32): "vmoe_base_patch32_224",
    (768, 12, 16): "vmoe_base_patch16_224",
    (1024, 24, 32): "vmoe_large_patch32_224",
    (1024, 24, 16): "vmoe_large_patch16_224",
    (1280, 32, 14): "vmoe_huge_patch14_224",
}
MAX_SIDE, MAX_DEPTH = 2**14, 1000  # pixels of a picture's side; blocks, each of which takes time to build
_ANY_SIZE = "vmoe_base_patch16_224"
_TWO_TOWER = "two_tower_base_patch16"
_ROUTERS = {
    "NoisyTopExpertsPerItemRouter": "vmoe.nn.routing",
    "NoisyTopItemsPerExpertRouter": "vmoe.nn.routing",
    "SoftRouter": "vmoe.projects.soft_moe.router",
}
_POOLS = {"token": "token", "0": "token", "gap": "avg", "map": "map"}
_TEXT_POOLS = ("last", "first", "gap", "gmp", "map")


def model_settings(
    config: Mapping[str, Any],
    shapes: Shapes,
    image_size: int | tuple[int, int] | None = None,
    context_length: int | None = None,
) -> tuple[str, dict[str, Any]]:
    """A name and keyword arguments for `vmoe.create_model`.

    Args:
        config, image_size, context_length: see `vmoe.convert.from_reference`.
        shapes: of the weights, by the reference's names.

    Raises:
        ConfigError: for a key or value that cannot be converted.
    """
    top = Section(config)
    if "image" in top.values and "text" in top.values:
        return _TWO_TOWER, _two_tower(top, shapes, image_size, context_length)
    if context_length is not None:
        raise ConfigError("context_length is for two-tower models, this config has no text tower")
    kwargs = _image(top, shapes, image_size)
    return kwargs.pop("name"), kwargs


def config_grid(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns of patches of the config's own image_size; None if it has none."""
    top = Section(config)
    image = top.section("image") if "image" in top.values else top
    size = top.values.get("image_size")
    size = image.values.get("image_size") if size is None else size
    if size is None:
        return None
    sizes, patches = pair("image_size", size), pair("patch_size", image.take("patch_size"))
    return sizes[0] // patches[0], sizes[1] // patches[1]


def _two_tower(top: Section, shapes: Shapes, image_size, context_length: int | None) -> dict[str, Any]:
    top.call("name", "TwoTower", {"TwoTower": "vmoe.projects.contrastive.models"})
    top.ignore("deterministic", "batch")
    if image_size is None:
        image_size = top.take("image_size", None)
    else:
        top.ignore("image_size")
    towers = {"img": {}, "txt": {}}
    for name, shape in shapes.items():
        tower, _, rest = name.partition("/")
        towers.get(tower, {})[rest] = shape
    image = _image(top.section("image"), towers["img"], image_size)
    text = _text(top.section("text"), towers["txt"], context_length)
    widths = [image["num_classes"] or image.get("representation_size") or image["embed_dim"]]
    widths.append(text["num_classes"] or text["width"])
    if widths[0] != widths[1]:
        raise ConfigError(f"the image tower gives {widths[0]} features, the text tower {widths[1]}: they must be equal")
    scale, bias = _positive(top, "scale_init", 1.0), top.number("bias_init", None, float, optional=True)
    top.finish()
    logits = {"init_logit_scale": math.log(scale)} | ({} if bias is None else {"init_logit_bias": bias})
    return {"image": image, "text": text, "embed_dim": widths[0], **logits}


def _positive(section: Section, name: str, default: float) -> float:
    value = section.number(name, default, float)
    if value <= 0:
        raise section.wrong(name, value, "a number > 0")
    return value


def _image(config: Section, shapes: Shapes, image_size) -> dict[str, Any]:
    config.call("name", "VisionTransformerMoe", {"VisionTransformerMoe": "vmoe.nn.vit_moe"})
    # Initial values, and things that a forward pass in eval mode does not know.
    config.ignore("head_bias_init", "head_kernel_zero_init", "deterministic", "batch", "image_size")
    width = config.number("hidden_size", minimum=1)
    patch = pair(config.key("patch_size"), config.take("patch_size"))
    classifier = config.choice("classifier", "token", tuple(_POOLS))
    representation = config.number("representation_size", None, optional=True, minimum=1)
    classes = config.number("num_classes", optional=True, minimum=0)
    encoder = config.section("encoder")
    position = encoder.section("position_emb")
    learned = position.choice("name", "learned", ("learned", "none", "sincos2d"))
    temperature = _positive(position, "temperature", 10_000.0)
    position.ignore("h", "w")
    position.finish()
    tokens = _positions(shapes) if learned == "learned" else None
    if image_size is None:
        size, key = config.values.get("image_size"), config.key("image_size")
    else:
        size, key = image_size, "image_size"
    size = _image_size(key, size, tokens, patch, classifier == "token")
    depth, heads, mlp_dim, dropout = _encoder(encoder, width)
    settings = {
        "name": _NAMES.get((width, depth, patch[0]), _ANY_SIZE),
        "img_size": size or [max(1, 224 // side) * side for side in patch],
        "patch_size": list(patch),
        "num_classes": classes or 0,
        "embed_dim": width,
        "depth": depth,
        "num_heads": heads,
        "mlp_ratio": _ratio(mlp_dim, width),
        "class_token": classifier == "token",
        "global_pool": _POOLS[classifier],
        "fc_norm": False,
        "pos_embed": {"learned": "learn", "none": "none", "sincos2d": "sincos2d"}[learned],
        "pos_temperature": temperature,
        "qk_norm": encoder.flag("attention_qk_norm", False),
        "pos_drop_rate": dropout,
        "proj_drop_rate": dropout,
        "attn_drop_rate": encoder.rate("attention_dropout_rate", 0.0),
        **_experts(encoder, shapes, depth, mlp_dim, dropout),
    }
    if representation is not None:
        settings["representation_size"] = representation
    if size is None:  # such a model of the reference takes pictures of any size
        settings["dynamic_img_size"] = True
    encoder.finish()
    config.finish()
    return settings


def _positions(shapes: Shapes) -> int:
    """Position embeddings of a tower; 0 if there are none, which is an error of its own when the weights are fitted."""
    shape = shapes.get("Encoder/posembed_input/pos_embedding", ())
    return shape[1] if len(shape) == 3 else 0


def _image_size(
    key: str, size: Any, tokens: int | None, patch: tuple[int, int], has_class_token: bool
) -> list[int] | None:
    if size is not None:
        sides = pair(key, size)
        if max(sides) > MAX_SIDE:
            raise ConfigError(f"{key} = {size!r} cannot be converted: it must be <= {MAX_SIDE}")
        if any(side < step for side, step in zip(sides, patch, strict=True)):
            raise ConfigError(f"{key} = {size!r} cannot be converted: it must be at least one patch, {list(patch)}")
        return list(sides)
    if tokens is None:
        return None
    side = math.isqrt(max(0, tokens - has_class_token))
    if side == 0 or side * side != tokens - has_class_token:
        raise ConfigError(
            f"image_size is not in the config and cannot be told from {tokens} position embeddings, which are no "
            "square grid of patches; add image_size"
        )
    return [side * step for step in patch]


def _ratio(mlp_dim: int, width: int) -> float:
    """What a library that computes int(width · ratio) must be given."""
    ratio = mlp_dim / width
    return ratio if int(width * ratio) == mlp_dim else (mlp_dim + 0.5) / width


def _encoder(encoder: Section, width: int) -> tuple[int, int, int, float]:
    depth, heads = encoder.number("num_layers", minimum=1, below=MAX_DEPTH), encoder.number("num_heads", minimum=1)
    if width % heads:
        raise encoder.wrong("num_heads", heads, f"a divisor of hidden_size = {width}")
    dtype = encoder.take("dtype", None)
    if dtype not in (None, "float32", np.float32):
        raise encoder.wrong("dtype", dtype, "float32 or absent; use torch.autocast to compute in less")
    encoder.ignore("deterministic")
    return depth, heads, encoder.number("mlp_dim", minimum=1), encoder.rate("dropout_rate", 0.0)


def _text(config: Section, shapes: Shapes, context_length: int | None) -> dict[str, Any]:
    config.call("name", "TextTransformer", {"TextTransformer": "vmoe.projects.contrastive.models"})
    config.ignore("head_bias_init", "head_kernel_zero_init", "deterministic")
    width = config.number("hidden_size", minimum=1)
    encoder = config.section("encoder")
    position = encoder.section("position_emb")
    learned = position.choice("name", "learned", ("learned", "none")) == "learned"
    position.finish()
    if context_length is not None and (not isinstance(context_length, int) or context_length < 1):
        raise ConfigError(f"context_length must be a whole number >= 1, got {context_length!r}")
    if learned:
        length = _positions(shapes)
        if context_length not in (None, length):
            raise ConfigError(f"context_length is {context_length}, the text tower has {length} position embeddings")
        context_length = length
    if not context_length:
        raise ConfigError(
            "the length of texts cannot be told: the text tower has no position embeddings; give context_length"
        )
    depth, heads, mlp_dim, dropout = _encoder(encoder, width)
    for name in ("dropout_rate", "attention_dropout_rate"):
        rate = encoder.rate(name, 0.0)
        if rate:
            raise encoder.wrong(name, rate, "0: text towers have no dropout here, and it acts in training only")
    settings = {
        "vocab_size": config.number("vocab_size", minimum=1),
        "context_length": context_length,
        "width": width,
        "depth": depth,
        "num_heads": heads,
        "mlp_ratio": _ratio(mlp_dim, width),
        "num_classes": config.number("num_classes", optional=True, minimum=0) or 0,
        "pool": config.choice("pool_type", "last", _TEXT_POOLS),
        "eot_token_id": None,
        "pos_embed": "learn" if learned else "none",
        "qk_norm": encoder.flag("attention_qk_norm", False),
        **_experts(encoder, shapes, depth, mlp_dim, dropout),
    }
    encoder.finish()
    config.finish()
    return settings


def _experts(encoder: Section, shapes: Shapes, depth: int, mlp_dim: int, dropout: float) -> dict[str, Any]:
    moe = encoder.section("moe")
    layers = moe.take("layers", ())
    if not isinstance(layers, (list, tuple)) or not all(type(layer) is int for layer in layers):
        raise moe.wrong("layers", layers, "a list of block numbers")
    layers = [layer for layer in range(depth) if layer in layers]  # the reference overlooks others
    if not layers:
        return {"num_experts": 0}
    E = moe.number("num_experts", minimum=1)
    own_dim = moe.number("mlp_dim", mlp_dim, minimum=1)
    moe.ignore("split_rngs", "deterministic")
    size = moe.number("group_size", minimum=1)
    router = moe.section("router")
    kind = router.call("name", "NoisyTopExpertsPerItemRouter", _ROUTERS)
    convert = {
        "NoisyTopExpertsPerItemRouter": _top_k,
        "NoisyTopItemsPerExpertRouter": _expert_choice,
        "SoftRouter": _soft,
    }[kind]
    settings = {
        "moe_layers": layers,
        "num_experts": E,
        "group_size": size,
        "expert_drop": moe.rate("dropout_rate", dropout),
        **convert(router, E, size),
    }
    if own_dim != mlp_dim:
        settings["expert_width"] = own_dim
    router.ignore("dtype")
    router.finish()
    moe.finish()
    return settings


def _noise(router: Section, default: float) -> float:
    std, deterministic = router.number("noise_std", default, float, minimum=0), router.flag("deterministic", None)
    if deterministic is False and std > 0:
        raise router.wrong("deterministic", False, "absent or true: there is no noise outside training here")
    return 0.0 if deterministic else std


def _weight(router: Section, name: str, default: float) -> float:
    return max(0.0, router.number(name, default, float))  # the reference leaves losses of no positive weight out


def _top_k(router: Section, E: int, size: int) -> dict[str, Any]:
    K = router.number("num_selected_experts", 1, minimum=1)
    if K > E:
        raise router.wrong("num_selected_experts", K, f"1..num_experts, {E}")
    dispatcher = router.section("dispatcher")
    capacity = _capacity(dispatcher, E, size * K, ("einsum", "indices"))
    if "capacity_factor" in capacity:
        capacity["eval_capacity_factor"] = capacity["capacity_factor"]
    settings = {
        "router": "top_k",
        "num_selected_experts": K,
        "noise_std": _noise(router, 1.0),
        "batch_priority": dispatcher.flag("batch_priority"),
        **capacity,
        "importance_loss": _weight(router, "importance_loss_weight", 1.0),
        "load_loss": _weight(router, "load_loss_weight", 1.0),
        "gshard_loss": _weight(router, "gshard_loss_weight", 0.0),
    }
    dispatcher.finish()
    return settings


def _expert_choice(router: Section, E: int, size: int) -> dict[str, Any]:
    dispatcher = router.section("dispatcher")
    settings = {
        "router": "expert_choice",
        "noise_std": _noise(router, 1.0),
        **_capacity(dispatcher, E, size, ("einsum",)),
    }
    dispatcher.finish()
    return settings


def _capacity(dispatcher: Section, E: int, tokens: int, names: tuple[str, ...]) -> dict[str, Any]:
    dispatcher.choice("name", None, names)
    dispatcher.ignore("bfloat16", "partition_spec", "einsum_precision")
    factor = dispatcher.number("capacity_factor", None, float, optional=True)
    capacity = dispatcher.number("capacity", None, optional=True, minimum=1)
    rounding = dispatcher.choice("capacity_ceil_or_round", "ceil", ("ceil", "round"))
    multiple = max(1, dispatcher.number("capacity_multiple_of", 4, optional=True) or 1)
    if (factor is None) == (capacity is None):
        raise ConfigError(
            f"{dispatcher.key('')} must have either capacity_factor or capacity, got {factor!r} and {capacity!r}"
        )
    if capacity is not None:
        return {"capacity": capacity}
    _rows(dispatcher, factor, tokens, E, rounding)
    return {"capacity_factor": factor, "capacity_rounding": rounding, "capacity_multiple_of": multiple}


def _rows(section: Section, factor: float | None, tokens: int, E: int, rounding: str) -> int:
    """Rows of each expert and group that a capacity factor gives."""
    try:
        return expert_capacity(tokens, E, 1, 0.0 if factor is None else factor, rounding, 1)
    except (ValueError, OverflowError) as error:
        raise section.wrong("capacity_factor", factor, "large enough for one token per expert and group") from error


def _soft(router: Section, E: int, size: int) -> dict[str, Any]:
    router.ignore("precision", "partition_spec", "compute_similarity_metrics", "mu_init", "scale_init")
    slots = router.number("num_slots", None, optional=True, minimum=1)
    factor = router.number("capacity_factor", 1.0, float, optional=True)
    if slots is None:
        slots = _rows(router, factor, size, E, "round")
    return {"router": "soft", "noise_std": _noise(router, 0.0), "num_slots": slots}
