"""The reference's model config as arguments of `vmoe.create_model`; a key or value without a meaning is an error."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from vmoe.convert.section import COUNT, FLAG, NOT_NEGATIVE, NUMBER, PAIR, POSITIVE, RATE, SIZE, ConfigError, Section
from vmoe.moe.dispatch import expert_capacity

MAX_SIDE, MAX_DEPTH = 2**14, 1000  # pixels of an image's side; blocks, each of which takes time to build
# A registered name for each known (width, depth, patch), so that a file says what it is; every setting is given too.
_NAMES = {
    (512, 8, 32): "vmoe_small_patch32_224",
    (768, 12, 32): "vmoe_base_patch32_224",
    (1024, 24, 32): "vmoe_large_patch32_224",
    (1024, 24, 16): "vmoe_large_patch16_224",
    (1280, 32, 14): "vmoe_huge_patch14_224",
}
# The reference's words and ours, read the other way by `reference_config`. A classifier is (global_pool, class_token).
CLASSIFIERS = {"token": ("token", True), "0": ("token", False), "gap": ("avg", False), "map": ("map", False)}
ENSEMBLE = "VisionTransformerMoeEnsemble"
TOP_K, EXPERT_CHOICE, SOFT = "NoisyTopExpertsPerItemRouter", "NoisyTopItemsPerExpertRouter", "SoftRouter"
ROUTERS = {TOP_K: "top_k", EXPERT_CHOICE: "expert_choice", SOFT: "soft"}
_ROUTING, _SOFT, _TWO_TOWER = "vmoe.nn.routing", "vmoe.projects.soft_moe.router", "vmoe.projects.contrastive.models"

Shapes = Mapping[str, tuple[int, ...]]


def model_settings(
    config: Mapping[str, Any],
    shapes: Shapes,
    image_size: int | tuple[int, int] | None = None,
    context_length: int | None = None,
) -> tuple[str, dict[str, Any]]:
    """A name and keyword arguments for `vmoe.create_model`; `shapes` are of the weights, by the reference's names.

    See `vmoe.convert.from_reference`. A ConfigError for a key or value that cannot be converted.
    """
    top = Section(config)
    if image_size is not None:
        top.values["image_size"] = image_size
    if "image" in top.values and "text" in top.values:
        return "two_tower_base_patch16", _two_tower(top, shapes, context_length)
    if context_length is not None:
        raise ConfigError("context_length is for two-tower models, this config has no text tower")
    kwargs = _image(top, shapes)
    return kwargs.pop("name"), kwargs


def stored_grid(config: Mapping[str, Any], tokens: int, prefix: int, new: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns that position embeddings were made for: those of the config's image_size if they fit, else a
    square, else the model's own (`new`). `tokens` counts `prefix` class tokens too.
    """
    top = Section(config)
    image = top.section("image") if "image" in top.values else top
    size = top.get("image_size", PAIR, None) or image.get("image_size", PAIR, None) or (0, 0)
    patch, side = image.get("patch_size", PAIR), math.isqrt(max(0, tokens - prefix))
    for grid in ((size[0] // patch[0], size[1] // patch[1]), (side, side), new):
        if math.prod(grid) == tokens - prefix > 0:
            return grid
    kind = "with" if prefix else "without"
    raise ValueError(f"{tokens} position embeddings are no square grid {kind} a class token, as the model is")


# --- towers ----------------------------------------------------------------------------------------------------------


def _two_tower(top: Section, shapes: Shapes, context_length: int | None) -> dict[str, Any]:
    top.class_name("TwoTower", {"TwoTower": _TWO_TOWER})
    image_section = top.section("image")
    if (size := top.take("image_size", None)) is not None:
        image_section.values["image_size"] = size
    image = _image(image_section, shapes, "img/")
    text = _text(top.section("text"), _stored_positions(shapes, "txt/"), context_length)
    width = image["num_classes"] or image.get("representation_size") or image["embed_dim"]
    text_width = text["num_classes"] or text["width"]
    if width != text_width:
        raise ConfigError(f"the image tower gives {width} features, the text tower {text_width}: they must be equal")
    scale, bias = top.get("scale_init", POSITIVE, 1.0), top.get("bias_init", NUMBER, None)
    top.finish("batch")
    settings = {"image": image, "text": text, "embed_dim": width, "init_logit_scale": math.log(scale)}
    return settings if bias is None else {**settings, "init_logit_bias": bias}


def _image(config: Section, shapes: Shapes, tower: str = "") -> dict[str, Any]:
    classes = {"VisionTransformerMoe": "vmoe.nn.vit_moe", ENSEMBLE: "vmoe.nn.vit_moe_ensemble"}
    kind = config.class_name("VisionTransformerMoe", classes)
    patch, representation = config.get("patch_size", PAIR), config.get("representation_size", SIZE, None)
    pool, class_token = config.choice("classifier", "token", CLASSIFIERS)
    width, encoder, settings = _tower(config, {"learned": "learn", "none": "none", "sincos2d": "sincos2d"})
    dropout, moe = encoder.get("dropout_rate", RATE, 0.0), encoder.section("moe")
    if kind == ENSEMBLE or "ensemble_size" in moe.values:
        moe.get("ensemble_size", SIZE)
        if settings["qk_norm"] and pool == "map":
            raise encoder.wrong("attention_qk_norm", True, "false: an ensemble norms queries in its pooling alone")
        # The reference's encoder of ensembles overlooks both settings.
        settings |= {"pos_embed": "learn", "qk_norm": False}
    learned = settings["pos_embed"] == "learn"
    size = _image_size(config, patch, _stored_positions(shapes, tower) - class_token if learned else None)
    settings |= {
        "name": _NAMES.get((width, settings["depth"], patch[0]), "vmoe_base_patch16_224"),
        "img_size": size or [max(1, 224 // side) * side for side in patch],
        "patch_size": list(patch),
        "embed_dim": width,
        "class_token": class_token,
        "global_pool": pool,
        "fc_norm": False,
        "pos_temperature": encoder.section("position_emb").get("temperature", POSITIVE, 10_000.0),
        "pos_drop_rate": dropout,
        "proj_drop_rate": dropout,
        "attn_drop_rate": encoder.get("attention_dropout_rate", RATE, 0.0),
    }
    if representation is not None:
        settings["representation_size"] = representation
    if size is None:  # such a model of the reference takes images of any size
        settings["dynamic_img_size"] = True
    config.finish("head_bias_init", "head_kernel_zero_init", "batch")
    return settings


def _stored_positions(shapes: Shapes, tower: str) -> int:
    """Position embeddings of a tower; 0 if there are none."""
    shape = shapes.get(f"{tower}Encoder/posembed_input/pos_embedding", ())
    return shape[1] if len(shape) == 3 else 0


def _image_size(config: Section, patch: tuple[int, int], stored: int | None) -> list[int] | None:
    """The config's, else that of a square of the `stored` learned positions of patches; None if there are none."""
    size = config.get("image_size", PAIR, None)
    if size is None and stored is not None:
        side = math.isqrt(max(0, stored))
        if side == 0 or side**2 != stored:
            raise ConfigError(
                f"image_size is not in the config and cannot be inferred from position embeddings of {stored} patches, "
                "which are no square grid; add image_size"
            )
        return [side * step for step in patch]
    if size is not None and (max(size) > MAX_SIDE or any(side < step for side, step in zip(size, patch))):
        raise config.wrong("image_size", config.values["image_size"], f"<= {MAX_SIDE}, and at least one patch, {patch}")
    return size and list(size)


def _text(config: Section, stored: int, context_length: int | None) -> dict[str, Any]:
    config.class_name("TextTransformer", {"TextTransformer": _TWO_TOWER})
    width, encoder, settings = _tower(config, {"learned": "learn", "none": "none"})
    if settings["pos_embed"] == "learn":
        if context_length not in (None, stored):
            raise ConfigError(f"context_length is {context_length}, the text tower has {stored} position embeddings")
        context_length = stored
    if type(context_length) is not int or context_length < 1:
        raise ConfigError(
            f"context_length must be a whole number >= 1, got {context_length!r}: the text tower has no position "
            "embeddings that tell the length of texts"
        )
    for name in ("dropout_rate", "attention_dropout_rate"):
        if rate := encoder.get(name, RATE, 0.0):
            raise encoder.wrong(name, rate, "0: text towers have no dropout here, and it acts in training only")
    settings |= {
        "vocab_size": config.get("vocab_size", SIZE),
        "context_length": context_length,
        "width": width,
        "pool": config.choice("pool_type", "last", ["last", "first", "gap", "gmp", "map"]),
        "eot_token_id": None,
    }
    config.finish("head_bias_init", "head_kernel_zero_init")
    return settings


# --- blocks and experts ----------------------------------------------------------------------------------------------


def _tower(config: Section, positions: Mapping[str, str]) -> tuple[int, Section, dict[str, Any]]:
    """(width, the section of the encoder, settings that both towers have)."""
    width, encoder = config.get("hidden_size", SIZE), config.section("encoder")
    position = encoder.section("position_emb")
    depth, heads = encoder.get("num_layers", SIZE), encoder.get("num_heads", SIZE)
    if depth >= MAX_DEPTH:
        raise encoder.wrong("num_layers", depth, f"a whole number < {MAX_DEPTH}")
    if width % heads:
        raise encoder.wrong("num_heads", heads, f"a divisor of hidden_size = {width}")
    dtype = encoder.take("dtype", None)
    if dtype not in (None, "float32", np.float32):
        raise encoder.wrong("dtype", dtype, "float32 or absent; use torch.autocast to compute in less")
    mlp_dim, dropout = encoder.get("mlp_dim", SIZE), encoder.get("dropout_rate", RATE, 0.0)
    ratio = mlp_dim / width
    settings = {
        "num_classes": config.get("num_classes", COUNT, optional=True) or 0,
        "pos_embed": position.choice("name", "learned", positions),
        "depth": depth,
        "num_heads": heads,
        "mlp_ratio": ratio if int(width * ratio) == mlp_dim else (mlp_dim + 0.5) / width,  # int(width · ratio) is taken
        "qk_norm": encoder.get("attention_qk_norm", FLAG, False),
        **_experts(encoder.section("moe"), depth, mlp_dim, dropout),
    }
    position.finish("h", "w", "temperature")
    encoder.finish("attention_dropout_rate")
    return width, encoder, settings


def _experts(moe: Section, depth: int, mlp_dim: int, dropout: float) -> dict[str, Any]:
    layers = moe.take("layers", ())
    if not isinstance(layers, (list, tuple)) or not all(type(layer) is int for layer in layers):
        raise moe.wrong("layers", layers, "a list of block numbers")
    layers = [layer for layer in range(depth) if layer in layers]  # the reference overlooks others
    if not layers:  # and all other keys
        return {"num_experts": 0}
    E, size = moe.get("num_experts", SIZE), moe.get("group_size", SIZE)
    members = moe.get("ensemble_size", SIZE, 1)
    for name, number in (("num_experts", E), ("group_size", size)):
        if number % members:
            raise moe.wrong("ensemble_size", members, f"a divisor of {name} = {number}")
    expert_width = moe.get("mlp_dim", SIZE, mlp_dim)
    settings = {
        "moe_layers": layers,
        "num_experts": E,
        "group_size": size,
        "expert_drop": moe.get("dropout_rate", RATE, dropout),
        **_router(moe.section("router"), E, size, members),
    }
    if members > 1:
        settings["ensemble_size"] = members
    moe.finish("split_rngs")
    return settings if expert_width == mlp_dim else {**settings, "expert_width": expert_width}


def _router(router: Section, E: int, size: int, members: int) -> dict[str, Any]:
    classes = {TOP_K: _ROUTING, EXPERT_CHOICE: _ROUTING, SOFT: _SOFT}
    kind = ROUTERS[router.class_name(TOP_K, classes if members == 1 else {TOP_K: _ROUTING})]
    std = router.get("noise_std", NOT_NEGATIVE, 0.0 if kind == "soft" else 1.0)
    deterministic = router.get("deterministic", FLAG, None)
    if deterministic is False and std > 0:
        raise router.wrong("deterministic", False, "absent or true: there is no noise outside training here")
    settings = {"router": kind, "noise_std": 0.0 if deterministic else std}
    if kind == "soft":
        slots, factor = router.get("num_slots", SIZE, None), router.get("capacity_factor", NUMBER, 1.0, optional=True)
        settings["num_slots"] = _rows(router, factor or 0.0, size, E, "round") if slots is None else slots
        router.finish("dtype", "precision", "partition_spec", "compute_similarity_metrics", "mu_init", "scale_init")
        return settings
    dispatcher = router.section("dispatcher")
    if kind == "expert_choice":
        settings |= _capacity(dispatcher, E, size, ("einsum",))
    else:
        K = router.get("num_selected_experts", SIZE, 1)
        if E // members < K:
            of_member = " / ensemble_size" if members > 1 else ""
            raise router.wrong("num_selected_experts", K, f"1..num_experts{of_member}, {E // members}")
        settings |= {"num_selected_experts": K, "batch_priority": dispatcher.get("batch_priority", FLAG)}
        settings |= _capacity(dispatcher, E, size * K, ("einsum", "indices"))
        if "capacity_factor" in settings:
            settings["eval_capacity_factor"] = settings["capacity_factor"]
        for name, default in (("importance", 1.0), ("load", 1.0), ("gshard", 0.0)):
            weight = router.get(f"{name}_loss_weight", NUMBER, default)
            settings[f"{name}_loss"] = max(0.0, weight)  # the reference leaves losses of no positive weight out
    router.finish("dtype")
    return settings


def _capacity(dispatcher: Section, E: int, tokens: int, names: tuple[str, ...]) -> dict[str, Any]:
    dispatcher.choice("name", "", names)
    factor, capacity = dispatcher.get("capacity_factor", NUMBER, None), dispatcher.get("capacity", SIZE, None)
    rounding = dispatcher.choice("capacity_ceil_or_round", "ceil", ["ceil", "round"])
    multiple = max(1, dispatcher.get("capacity_multiple_of", COUNT, 4, optional=True) or 1)
    if (factor is None) == (capacity is None):
        raise ConfigError(
            f"{dispatcher.path} must have either capacity_factor or capacity, got {factor!r} and {capacity!r}"
        )
    dispatcher.finish("bfloat16", "partition_spec", "einsum_precision")
    if capacity is not None:
        return {"capacity": capacity}
    _rows(dispatcher, factor, tokens, E, rounding)
    return {"capacity_factor": factor, "capacity_rounding": rounding, "capacity_multiple_of": multiple}


def _rows(section: Section, factor: float, tokens: int, E: int, rounding: str) -> int:
    """Rows of each expert and group that a capacity factor gives."""
    try:
        return expert_capacity(tokens, E, 1, factor, rounding, 1)
    except (ValueError, OverflowError) as error:
        raise section.wrong("capacity_factor", factor, "large enough for one token per expert and group") from error
