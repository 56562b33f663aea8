"""The reference's config of one of our models, or an error that says what the reference cannot express."""

import math
from typing import Any

from timm.layers import LayerNorm, Mlp
from timm.layers.activations import GELUTanh
from torch import nn

from vmoe.convert.layout import reference_layout, require_vision
from vmoe.convert.settings import CLASSIFIERS, ENSEMBLE, ROUTERS
from vmoe.models.text import TextTransformer
from vmoe.moe import SparseMoE
from vmoe.moe.config import RoutingSettings

_ROUTERS = {ours: theirs for theirs, ours in ROUTERS.items()} | {"soft": "vmoe.projects.soft_moe.router.SoftRouter"}
_CLASSIFIERS = {ours: theirs for theirs, ours in CLASSIFIERS.items()}
# Settings that the reference does not have; their defaults mean "off".
_FOREIGN = ("learned_noise", "input_jitter", "gate", "normalize_weights", "random_threshold", "expert_mlp")
_FOREIGN += ("num_shared_experts", "bias_update_rate", "z_loss", "local_entropy_loss", "global_entropy_loss")
_FOREIGN += ("load_importance_loss", "per_image")


def reference_config(model: nn.Module, group_size: int | None = None) -> dict[str, Any]:
    """The reference's config of a model, which `from_reference` turns into the same model again; it goes into JSON.

    It describes the model as it is in `eval()`: the capacity is the evaluation's (without a limit, one that all tokens
    fit in). Settings of the training alone that the reference lacks, such as stochastic depth, are left out. There is
    an "image_size", which the converter reads and the reference does not. A ValueError names what the reference cannot
    express.

    Args:
        model: a V-MoE, Soft MoE (or a dense model of their kind), or a two-tower model of them.
        group_size: tokens routed together in the reference, for a model with group_size=None and limited capacity.
    """
    try:
        config = _config(model, group_size)
        layout = reference_layout(model)
    except AttributeError as error:  # models of other programs lack parts that are looked at here
        raise ValueError(f"the reference has no model like this one ({type(model).__name__}): {error}") from error
    ours, theirs = set(model.state_dict()), {entry.tensor for entry in layout.values()}
    foreign = [f"{name}, which the reference does not have" for name in sorted(ours - theirs)]
    lacking = [f"no {name}, which it needs" for name in sorted(theirs - ours)]
    _need(ours == theirs, "the model has " + "; ".join(foreign + lacking))
    return config


def _need(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(f"the reference cannot express this model: {what}")


def _config(model: nn.Module, group_size: int | None) -> dict[str, Any]:
    if not (hasattr(model, "visual") and hasattr(model, "text")):
        return _image(model, group_size)
    if not isinstance(model.text, TextTransformer):
        raise ValueError(f"the reference has no text tower like this one ({type(model.text).__name__})")
    return {
        "image": _image(model.visual, group_size, "visual."),
        "text": _text(model.text, group_size),
        "scale_init": math.exp(model.logit_scale.item()),
        "bias_init": None if model.logit_bias is None else model.logit_bias.item(),
    }


def _image(model: nn.Module, group_size: int | None, prefix: str = "") -> dict[str, Any]:
    require_vision(model)
    patches, has_class = model.patch_embed, model.cls_token is not None
    pool = model.global_pool, has_class
    _need(pool in _CLASSIFIERS, f"global_pool={model.global_pool!r} with class_token={has_class}")
    _need(not (model.no_embed_class and has_class), "no_embed_class=True")
    _need(isinstance(model.norm, nn.LayerNorm), "no norm before the pooling")
    _need(getattr(model, "rope", None) is None, "pos_embed='rope'")
    _need(patches.proj.in_channels == 3, f"in_chans={patches.proj.in_channels}")
    representation = getattr(model, "pre_logits", None)
    if is_ensemble := getattr(model, "ensemble_size", 1) > 1:
        plain = model.pos_embed is not None and isinstance(model.blocks[0].attn.q_norm, nn.Identity)
        _need(plain, "an ensemble without learned positions or with qk_norm")
    config = {
        "name": ENSEMBLE if is_ensemble else "VisionTransformerMoe",
        "num_classes": model.num_classes or None,
        "patch_size": list(patches.patch_size),
        "hidden_size": model.embed_dim,
        "classifier": _CLASSIFIERS[pool],
        "representation_size": representation.out_features if isinstance(representation, nn.Linear) else None,
        "encoder": {
            **_encoder(model, patches.num_patches + model.num_prefix_tokens, group_size, prefix),
            "dropout_rate": _rate(model.pos_drop),
        },
    }
    if not (model.dynamic_img_size and model.pos_embed is None):
        config["image_size"] = list(patches.img_size)
    return config


def _text(model: TextTransformer, group_size: int | None) -> dict[str, Any]:
    _need(model.eot_token_id is None, "its text tower hides padding (eot_token_id); the reference reads every position")
    return {
        "name": "TextTransformer",
        "vocab_size": model.vocab_size,
        "num_classes": model.num_classes or None,
        "hidden_size": model.num_features,
        "pool_type": model.pool,
        "encoder": _encoder(model, model.context_length, group_size, "text."),
    }


def _encoder(model: nn.Module, tokens: int, group_size: int | None, prefix: str) -> dict[str, Any]:
    attention = model.blocks[0].attn
    sparse = {index: block.mlp for index, block in enumerate(model.blocks) if isinstance(block.mlp, SparseMoE)}
    moe = {"layers": list(sparse), **(_moe(list(sparse.values()), tokens, group_size) if sparse else {})}
    for index, block in enumerate(model.blocks):
        _check_block(block, f"{prefix}blocks.{index}")
    widths = {block.mlp.fc1.out_features for block in model.blocks if not isinstance(block.mlp, SparseMoE)}
    expert_widths = {mlp.experts.fc1.weight.shape[-2] for mlp in sparse.values()}
    if (pool := getattr(model, "attn_pool", None)) is not None:
        widths.add(pool.mlp.fc1.out_features)
        _need(pool.num_heads == attention.num_heads, "its attention pooling has another number of heads")
    widths = widths or expert_widths
    for kind, found in (("MLPs", widths), ("experts", expert_widths)):
        _need(len(found) < 2, f"{kind} of several widths, {sorted(found)}")
    if expert_widths - widths:
        moe["mlp_dim"] = max(expert_widths)
    position = {"name": "none" if model.pos_embed is None else "learned"}
    if model.pos_embed is None and (temperature := getattr(model, "sincos2d_temperature", None)) is not None:
        position = {"name": "sincos2d", "temperature": temperature}
    return {
        "position_emb": position,
        "num_layers": len(model.blocks),
        "mlp_dim": max(widths),
        "num_heads": attention.num_heads,
        "attention_dropout_rate": _rate(attention.attn_drop),
        "attention_qk_norm": not isinstance(attention.q_norm, nn.Identity),
        "moe": moe,
    }


def _rate(dropout: nn.Module) -> float:
    return dropout.p if isinstance(dropout, nn.Dropout) else 0.0


def _check_block(block: nn.Module, name: str) -> None:
    _need(type(block.mlp) in (Mlp, SparseMoE), f"{name}.mlp is a {type(block.mlp).__name__}")
    act = block.mlp.experts.act if isinstance(block.mlp, SparseMoE) else block.mlp.act
    tanh = isinstance(act, GELUTanh) or (isinstance(act, nn.GELU) and act.approximate == "tanh")
    _need(tanh, f"the activation of {name}.mlp is {act}, not GELU with tanh")
    for norm in (block.norm1, block.norm2):
        _need(isinstance(norm, (nn.LayerNorm, LayerNorm)) and norm.eps == 1e-6, f"the norms of {name}: {norm}")


def _moe(layers: list[SparseMoE], tokens: int, group_size: int | None) -> dict[str, Any]:
    s: RoutingSettings = layers[0].settings
    _need(all(layer.settings == s for layer in layers), "sparse layers with different settings")
    for name in _FOREIGN:
        _need(getattr(s, name) == getattr(RoutingSettings, name), f"{name}={getattr(s, name)!r}")
    size = s.group_size or (group_size if s.router == "top_k" else tokens)
    router = {"name": _ROUTERS[s.router], "noise_std": s.noise_std}
    if s.router == "soft":
        router["num_slots"] = layers[0].router.slots.shape[1]
    else:
        router["dispatcher"] = {"name": "einsum", "bfloat16": False, **_capacity(s, size)}
    if s.router == "top_k":
        router["num_selected_experts"] = s.num_selected_experts
        router["dispatcher"]["batch_priority"] = s.batch_priority
        router |= {f"{name}_loss_weight": getattr(s, f"{name}_loss") for name in ("importance", "load", "gshard")}
    sizes = {"num_experts": s.num_experts, "group_size": size or tokens * s.ensemble_size}
    if s.ensemble_size > 1:
        _need(s.router == "top_k", f"an ensemble with router={s.router!r}")
        sizes["ensemble_size"] = s.ensemble_size
    return {**sizes, "dropout_rate": layers[0].experts.drop.p, "router": router}


def _capacity(s: RoutingSettings, size: int | None) -> dict[str, Any]:
    factor = s.eval_capacity_factor or (s.capacity_factor if s.router == "expert_choice" else None)
    if size is None and (factor is not None or s.capacity is not None):
        raise ValueError(
            "group_size is None, all tokens of a call, and the capacity is limited: the reference needs a number; give "
            "group_size (tokens per image times images per batch)"
        )
    if s.capacity is not None:
        return {"capacity": s.capacity}
    _need(s.capacity_rounding != "tutel", "capacity_rounding='tutel'")
    return {  # without a limit, K choices of at most all tokens for each expert
        "capacity_factor": s.num_experts / s.num_selected_experts if factor is None else factor,
        "capacity_ceil_or_round": s.capacity_rounding,
        "capacity_multiple_of": s.capacity_multiple_of,
    }
