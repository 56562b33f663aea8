"""The reference's config of one of our models, or an error that says what the reference cannot express."""

import math
from typing import Any

from timm.layers import LayerNorm, Mlp
from timm.layers.activations import GELUTanh
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from vmoe.convert.layout import reference_places
from vmoe.models.text import TextTransformer
from vmoe.moe import SparseMoE
from vmoe.moe.config import RoutingSettings

_ROUTERS = {
    "top_k": "NoisyTopExpertsPerItemRouter",
    "expert_choice": "NoisyTopItemsPerExpertRouter",
    "soft": "vmoe.projects.soft_moe.router.SoftRouter",
}
# Settings that the reference does not have, with the value that means "off".
_FOREIGN = {
    "learned_noise": False,
    "input_jitter": 0.0,
    "gate": "softmax",
    "normalize_weights": False,
    "random_threshold": None,
    "expert_mlp": "mlp",
    "num_shared_experts": 0,
    "bias_update_rate": 0.0,
    "z_loss": 0.0,
    "local_entropy_loss": 0.0,
    "global_entropy_loss": 0.0,
}


def reference_config(model: nn.Module, group_size: int | None = None) -> dict[str, Any]:
    """The reference's config of a model, which `from_reference` turns into the same model again.

    It describes the model as it is in `eval()`: the capacity is the evaluation's (the reference has one for both, and
    none without a limit, which is written as room for every token). Settings that act in training only and are not the
    reference's, such as stochastic depth, are left out.

    Args:
        model: a V-MoE, Soft MoE (or their dense twin), or a two-tower model of them.
        group_size: tokens routed together in the reference, for a model with group_size=None whose experts have limited
            room: there, all tokens of a call are routed together, so the number depends on the batch.

    Returns:
        A JSON-able dictionary; for pictures with "image_size", which the converter reads and the reference does not.

    Raises:
        ValueError: names what the reference cannot express.
    """
    try:
        config = _config(model, group_size)
        places = reference_places(model)
    except AttributeError as error:  # models of other programs lack parts that are looked at here
        raise ValueError(f"the reference has no model like this one ({type(model).__name__}): {error}") from error
    ours, theirs = set(model.state_dict()), {place.tensor for place in places.values()}
    if ours != theirs:
        kept = [f"{name}, which it has no place for" for name in sorted(ours - theirs)]
        lacking = [f"no {name}, which it needs" for name in sorted(theirs - ours)]
        _need(False, "the model has " + "; ".join(kept + lacking))
    return config


def _config(model: nn.Module, group_size: int | None) -> dict[str, Any]:
    if hasattr(model, "visual") and hasattr(model, "text"):
        if not isinstance(model.text, TextTransformer):
            raise ValueError(f"the reference has no text tower like this one ({type(model.text).__name__})")
        bias = model.logit_bias
        return {
            "image": _image(model.visual, group_size, "visual."),
            "text": _text(model.text, group_size),
            "scale_init": math.exp(model.logit_scale.item()),
            "bias_init": None if bias is None else bias.item(),
        }
    return _image(model, group_size)


def _need(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(f"the reference cannot express this model: {what}")


def _image(model: nn.Module, group_size: int | None, prefix: str = "") -> dict[str, Any]:
    if not isinstance(model, VisionTransformer):
        raise ValueError(
            f"the reference has no model like this one ({type(model).__name__}): only V-MoE, Soft MoE and two-tower "
            "models of them can be written for it"
        )
    has_class = model.cls_token is not None
    pool = {("token", True): "token", ("token", False): "0", ("avg", False): "gap", ("map", False): "map"}
    _need((model.global_pool, has_class) in pool, f"global_pool={model.global_pool!r} with class_token={has_class}")
    _need(model.num_prefix_tokens == has_class, "it has register tokens")
    _need(not (model.no_embed_class and has_class), "no_embed_class=True")
    _need(isinstance(model.norm_pre, nn.Identity), "pre_norm=True")
    _need(isinstance(model.fc_norm, nn.Identity) and isinstance(model.norm, nn.LayerNorm), "fc_norm, or no final norm")
    _need(isinstance(model.patch_embed.norm, nn.Identity), "a norm after the patch embedding")
    _need(model.patch_embed.proj.in_channels == 3 and model.patch_embed.proj.bias is not None, "its patch embedding")
    representation = getattr(model, "pre_logits", None)
    temperature = getattr(model, "sincos2d_temperature", None)
    if model.pos_embed is not None:
        position = {"name": "learned"}
    elif temperature is not None:
        position = {"name": "sincos2d", "temperature": temperature}
    else:
        position = {"name": "none"}
    tokens = model.patch_embed.num_patches + model.num_prefix_tokens
    encoder = _encoder(model, tokens, group_size, prefix)
    encoder["dropout_rate"] = model.pos_drop.p if isinstance(model.pos_drop, nn.Dropout) else 0.0
    config = {
        "name": "VisionTransformerMoe",
        "num_classes": model.num_classes or None,
        "patch_size": list(model.patch_embed.patch_size),
        "hidden_size": model.embed_dim,
        "classifier": pool[model.global_pool, has_class],
        "representation_size": representation.out_features if isinstance(representation, nn.Linear) else None,
        "encoder": {**encoder, "position_emb": position},
    }
    if not (model.dynamic_img_size and model.pos_embed is None):
        config["image_size"] = list(model.patch_embed.img_size)
    return config


def _text(model: TextTransformer, group_size: int | None) -> dict[str, Any]:
    _need(model.eot_token_id is None, "its text tower hides padding (eot_token_id); the reference reads every position")
    return {
        "name": "TextTransformer",
        "vocab_size": model.vocab_size,
        "num_classes": model.num_classes or None,
        "hidden_size": model.num_features,
        "pool_type": model.pool,
        "encoder": {
            **_encoder(model, model.context_length, group_size, "text."),
            "position_emb": {"name": "none" if model.pos_embed is None else "learned"},
        },
    }


def _encoder(model: nn.Module, tokens: int, group_size: int | None, prefix: str) -> dict[str, Any]:
    first = model.blocks[0]
    mlps = [block.mlp for block in model.blocks]
    sparse = [i for i, mlp in enumerate(mlps) if isinstance(mlp, SparseMoE)]
    moe = {"layers": sparse, **(_moe([mlps[i] for i in sparse], tokens, group_size) if sparse else {})}
    own_widths = {mlp.experts.fc1.weight.shape[-2] for mlp in mlps if isinstance(mlp, SparseMoE)}
    widths = {mlp.fc1.out_features for mlp in mlps if not isinstance(mlp, SparseMoE)}
    for i, block in enumerate(model.blocks):
        _check_block(block, f"{prefix}blocks.{i}")
    pool = getattr(model, "attn_pool", None)
    if pool is not None:
        widths = widths or {pool.mlp.fc1.out_features}
        _need(pool.num_heads == first.attn.num_heads, "its attention pooling has another number of heads")
        _need(pool.mlp.fc1.out_features in widths, "its attention pooling has an MLP of another width")
    widths = widths or own_widths
    for kind, found in (("MLPs", widths), ("experts", own_widths)):
        _need(len(found) < 2, f"{kind} of several widths, {sorted(found)}")
    if own_widths - widths:
        moe["mlp_dim"] = max(own_widths)
    return {
        "num_layers": len(model.blocks),
        "mlp_dim": max(widths),
        "num_heads": first.attn.num_heads,
        "attention_dropout_rate": first.attn.attn_drop.p if isinstance(first.attn.attn_drop, nn.Dropout) else 0.0,
        "attention_qk_norm": not isinstance(first.attn.q_norm, nn.Identity),
        "moe": moe,
    }


def _check_block(block: nn.Module, name: str) -> None:
    parts = {"ls1", "ls2"} & {key for key, module in block.named_children() if not isinstance(module, nn.Identity)}
    _need(not parts, f"layer scale in {name}")
    _need(type(block.mlp) in (Mlp, SparseMoE), f"{name}.mlp is a {type(block.mlp).__name__}")
    experts = block.mlp.experts if isinstance(block.mlp, SparseMoE) else block.mlp
    act = experts.act
    tanh = isinstance(act, GELUTanh) or (isinstance(act, nn.GELU) and act.approximate == "tanh")
    _need(tanh, f"the activation of {name}.mlp is {act}, not GELU with tanh")
    _need(isinstance(getattr(experts, "norm", None) or nn.Identity(), nn.Identity), f"a norm inside {name}.mlp")
    _need(experts.fc1.bias is not None and block.attn.qkv.bias is not None, f"{name} has no biases")
    for norm in (block.norm1, block.norm2):
        _need(isinstance(norm, (nn.LayerNorm, LayerNorm)) and norm.eps == 1e-6, f"the norms of {name}: {norm}")


def _moe(layers: list[SparseMoE], tokens: int, group_size: int | None) -> dict[str, Any]:
    s: RoutingSettings = layers[0].settings
    _need(all(layer.settings == s for layer in layers), "sparse layers with different settings")
    for name, off in _FOREIGN.items():
        _need(getattr(s, name) == off, f"{name}={getattr(s, name)!r}")
    size = s.group_size or (group_size if s.router == "top_k" else tokens)
    factor = s.capacity_factor if s.router == "expert_choice" and not s.eval_capacity_factor else s.eval_capacity_factor
    unlimited = s.router == "top_k" and factor is None and s.capacity is None
    if size is None and not unlimited:
        raise ValueError(
            "group_size is None, all tokens of a call, and experts have limited room: the reference needs a number; "
            "give group_size (tokens per picture times pictures per batch)"
        )
    router = {"name": _ROUTERS[s.router], "noise_std": s.noise_std}
    if s.router == "soft":
        router["num_slots"] = layers[0].router.slots.shape[1]
    else:
        room = {"capacity": s.capacity} if s.capacity is not None else _room(s, factor)
        router["dispatcher"] = {"name": "einsum", "bfloat16": False, **room}
    if s.router == "top_k":
        router["num_selected_experts"] = s.num_selected_experts
        router["dispatcher"]["batch_priority"] = s.batch_priority
        router |= {f"{name}_loss_weight": getattr(s, f"{name}_loss") for name in ("importance", "load", "gshard")}
    return {
        "num_experts": s.num_experts,
        "group_size": size or tokens,
        "dropout_rate": layers[0].experts.drop.p,
        "router": router,
    }


def _room(s: RoutingSettings, factor: float | None) -> dict[str, Any]:
    if factor is None:  # K choices of at most all tokens for each expert
        factor = s.num_experts / s.num_selected_experts
    return {
        "capacity_factor": factor,
        "capacity_ceil_or_round": s.capacity_rounding,
        "capacity_multiple_of": s.capacity_multiple_of,
    }
