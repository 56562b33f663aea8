"""SigLino's models (https://github.com/tiiuae/siglino, arXiv 2512.20157) as ours: from its arguments and weights."""

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
from torch import nn

from vmoe.convert.arrays import CheckpointError, StoredArray, state_arrays
from vmoe.convert.fit import Fill, Rows, filled, filler, fit, without_memory
from vmoe.convert.layout import Entry, View, same
from vmoe.convert.section import COUNT, FLAG, POSITIVE, SIZE, ConfigError, Section
from vmoe.models.factory import create_model
from vmoe.models.siglino import SIGLINO_CONFIGS, SigLino

_ACTIVATIONS = {"silu": "swiglu", "relu2": "relu2glu"}
# What its constructor takes where it is not given.
_MOE_ARGS = {"num_experts": 16, "num_shared_experts": 1, "top_k": 3, "score_before_experts": False}
_MOE_ARGS |= {"route_norm": True, "route_scale": 0.8633, "activation": "relu2"}
_TEACHER_DIMS = {"dinov3": 1280, "siglip2": 1152}
# Arguments that change nothing of a forward pass.
_IGNORED = ("rope_theta", "max_seq_len", "enable_3d_rope", "use_tok_norm", "use_flex_attn")
# A norm that the training applied to the teacher's features, not to the model's.
UNUSED = frozenset({"layer_norm_dinov3.weight", "layer_norm_dinov3.bias"})
_POOL, _THEIR_POOL = r"siglip2_pool\.", "siglip2_multihead_attention_pooling_head."
_BLOCK, _LAYER = r"blocks\.(\d+)\.", r"layers.\1."

# Our tensor -> the array there.
_NAMES = [
    (r"cls_token|norm\.weight", r"\g<0>"),
    (r"reg_token", "storage_tokens"),
    (r"frequencies", "freqs_cis_golden"),
    (r"patch_embed\.proj\.weight", "img_projector.weight"),
    (_BLOCK + r"norm1\.weight", _LAYER + "attention_norm.weight"),
    (_BLOCK + r"norm2\.weight", _LAYER + "ffn_norm.weight"),
    (_BLOCK + r"attn\.sinks", _LAYER + "attention.sinks"),
    (_BLOCK + r"attn\.proj\.weight", _LAYER + "attention.wo.weight"),
    (_BLOCK + r"mlp\.fc2\.weight", _LAYER + "feed_forward.w2.weight"),
    (_BLOCK + r"mlp\.experts\.fc2\.weight", _LAYER + "moe.experts.w2"),
    (_BLOCK + r"mlp\.shared\.fc2\.weight", _LAYER + "moe.shared_experts.w2.weight"),
    (_BLOCK + r"mlp\.router\.weight", _LAYER + "moe.router.gate.weight"),
    (_BLOCK + r"mlp\.router\.expert_bias", _LAYER + "moe.expert_bias"),
    (r"teachers\.(\w+)\.(.*)", r"\1_adapter.\2"),
    (_POOL + r"latent", _THEIR_POOL + "probe"),
    (_POOL + r"proj\.(\w+)", _THEIR_POOL + r"attention.out_proj.\1"),
    (_POOL + r"norm\.(\w+)", _THEIR_POOL + r"layernorm.\1"),
    (_POOL + r"mlp\.(.*)", _THEIR_POOL + r"mlp.\1"),
]
# Our tensor -> the arrays there whose rows lie below each other in it.
_STACKED = [
    (_BLOCK + r"attn\.qkv\.weight", _LAYER + "attention.", ("wq.weight", "wk.weight", "wv.weight")),
    (_BLOCK + r"mlp\.fc1\.weight", _LAYER + "feed_forward.", ("w1.weight", "w3.weight")),
    (_BLOCK + r"mlp\.experts\.fc1\.weight", _LAYER + "moe.experts.", ("w1", "w3")),
    (_BLOCK + r"mlp\.shared\.fc1\.weight", _LAYER + "moe.shared_experts.", ("w1.weight", "w3.weight")),
]


def from_siglino(args: Mapping[str, Any], state: Mapping[str, Any]) -> SigLino:
    """One of SigLino's models, in eval mode; called as `model(pixel_values=..., padding_mask=..., spatial_shapes=...)`.

    Args:
        args: the arguments of its constructor (`SigLinoArgs`), "moe_args" being a dictionary. Those that are absent
            have its defaults.
        state: its state dict, {"layers.0.attention.wq.weight": array or tensor, ...}.

    ConfigError: an argument cannot be converted. CheckpointError: the weights do not fit the arguments.
    """
    name, kwargs, _, rows = plan_siglino(state_arrays(state), "state", args)
    return filled(create_model(name, **kwargs), rows)


def is_siglino(arrays: Mapping[str, StoredArray]) -> bool:
    """Whether these are the tensors of a SigLino."""
    return {"img_projector.weight", "freqs_cis_golden", "cls_token"} <= arrays.keys()


def plan_siglino(
    stored: Mapping[str, StoredArray], source: object, args: Mapping[str, Any] | None = None, name: str | None = None
) -> tuple[str, dict[str, Any], nn.Module, Rows]:
    """Checks that weights, `source` in errors, fit the arguments or the model `name`, before any number is read.

    Returns the model's name and arguments, the model on the meta device, and for each tensor its entry and a function
    that reads the weights into its view. Without arguments and name, the released model with these shapes is taken.
    """
    if args is not None:
        if name is not None:
            raise ConfigError("give either the arguments or the name of a model, not both")
        kwargs, scale = siglino_settings(args)
        name = "siglino_moe_0_3b" if kwargs["num_experts"] else "siglino_0_6b"
    else:
        kwargs, scale, name = {}, 1.0, _checked_name(stored, source, name)
    model = without_memory(lambda: create_model(name, **kwargs))
    rows = _fit(model, stored, source, "the arguments" if args is not None else name)
    if scale != 1.0:
        rows = [
            (entry, partial(_scaled, fill, scale) if entry.tensor.endswith(".experts.fc2.weight") else fill)
            for entry, fill in rows
        ]
    return name, kwargs, model, rows


def _fit(model: nn.Module, stored: Mapping[str, StoredArray], source: object, what: str) -> Rows:
    return fit(model, siglino_layout(model), stored.keys() - UNUSED, partial(filler, stored), source, what)


def _scaled(fill: Fill, factor: float, target: np.ndarray) -> None:
    fill(target)
    target *= np.float32(factor)


def _checked_name(stored: Mapping[str, StoredArray], source: object, name: str | None) -> str:
    """The released model that weights fit; `name` chooses between models of the same shapes."""
    if name is not None:
        if name not in SIGLINO_CONFIGS:
            raise ConfigError(
                f"{source} is a SigLino: --model must be one of {', '.join(SIGLINO_CONFIGS)}, got {name!r}"
            )
        return name
    width = stored["cls_token"].shape[-1:]
    fitting = []
    for each, config in SIGLINO_CONFIGS.items():
        with suppress(CheckpointError):
            if width == (config["embed_dim"],):
                _fit(without_memory(partial(create_model, each)), stored, source, each)
                fitting.append(each)
    if not fitting:
        known = ", ".join(SIGLINO_CONFIGS)
        raise CheckpointError(
            f"{source} is a SigLino of other sizes than {known}: give its arguments, --config FILE.json, or --model to "
            "see what differs"
        )
    if len(fitting) > 1:
        raise ConfigError(
            f"{source} fits {' and '.join(fitting)}, whose difference no tensor shows: choose one with --model"
        )
    return fitting[0]


def siglino_settings(args: Mapping[str, Any]) -> tuple[dict[str, Any], float]:
    """The arguments of our model, and a factor of all experts' results that goes into their weights."""
    section = Section(args)
    get, moe = section.get, Section(section.take("moe_args", _MOE_ARGS) or {"num_experts": 0}, "moe_args")
    depth = get("n_layers", SIZE, 18)
    first = min(get("first_n_layers_dense", COUNT, 0), depth)
    expert_width = get("moe_dim", COUNT, 768)
    num_experts = moe.get("num_experts", COUNT, 8) if first < depth else 0
    if num_experts and moe.get("score_before_experts", FLAG, True):
        raise moe.wrong("score_before_experts", True, "false, as in all released models")
    kwargs = {
        "patch_size": get("spatial_patch_size", SIZE, 16),
        "in_chans": get("channel_size", SIZE, 3),
        "embed_dim": get("dim", SIZE, 768),
        "depth": depth,
        "num_heads": get("n_heads", SIZE, 12),
        "head_dim": get("head_dim", SIZE, 128, optional=True),
        "num_kv_heads": get("n_kv_heads", SIZE, 4, optional=True),
        "mlp_width": get("ffn_dim", SIZE, None) or expert_width,
        "mlp": section.choice("activation", "silu", _ACTIVATIONS),
        "reg_tokens": get("n_storage_tokens", COUNT, 4),
        "qk_norm": get("use_qk_norm", FLAG, True),
        "norm_weights": get("parameterized_norm", FLAG, True),
        "norm_eps": get("norm_eps", POSITIVE, 1e-5),
        "min_frequency": get("rope_min_freqs", POSITIVE, 1.0),
        "max_frequency": get("rope_max_freqs", POSITIVE, 20.0),
        "teacher_dims": _teacher_dims(section),
        "moe_layers": list(range(first, depth)),
        "num_experts": num_experts,
    }
    kwargs["img_size"] = 16 * kwargs["patch_size"]
    kwargs["head_dim"] = kwargs["head_dim"] or kwargs["embed_dim"] // kwargs["num_heads"]  # timm would drop a None
    scale = moe.get("route_scale", POSITIVE, 1.0)
    kwargs |= _expert_settings(moe, expert_width) if num_experts else {"expert_width": expert_width or None}
    section.choice("temporal_patch_size", 1, {1: 1})
    section.finish(*_IGNORED)
    return kwargs, scale


def _expert_settings(moe: Section, expert_width: int) -> dict[str, Any]:
    settings = {
        "num_selected_experts": moe.get("top_k", SIZE, 1),
        "num_shared_experts": moe.get("num_shared_experts", COUNT, 1),
        "expert_width": expert_width,
        "expert_mlp": moe.choice("activation", "silu", _ACTIVATIONS),
        "gate": moe.choice("score_func", "sigmoid", ("sigmoid", "softmax")),
        "normalize_weights": moe.get("route_norm", FLAG, False),
    }
    moe.finish("use_grouped_mm")
    return settings


def _teacher_dims(section: Section) -> dict[str, int]:
    names, widths = section.take("teachers", ("siglip2", "dinov3")), section.take("teachers_dim", (1152, 1024))
    try:
        given = {name: SIZE.convert(width) for name, width in zip(names, widths, strict=True)}
    except (TypeError, ValueError):
        raise section.wrong("teachers_dim", widths, f"a whole number >= 1 for each of the teachers {names}") from None
    return {name: given.get(name, width) for name, width in _TEACHER_DIMS.items()}


# --- which array is which tensor ---


def siglino_layout(model: nn.Module) -> Iterator[tuple[str, Entry]]:
    """The array that each tensor of a model, or some rows of it, come from, and where it lies."""
    for tensor, value in model.state_dict().items():
        for pattern, theirs in _NAMES:
            if match := re.fullmatch(pattern, tensor):
                yield match.expand(theirs), Entry(tensor, same)
        for pattern, theirs, parts in _STACKED:
            if match := re.fullmatch(pattern, tensor):
                stop = 0
                for part, size in zip(parts, _heights(model, tensor, value.shape[-2]), strict=True):
                    start, stop = stop, stop + size
                    yield match.expand(theirs) + part, Entry(tensor, _rows(start, stop))
        if match := re.fullmatch(_POOL + r"(q|kv)\.(weight|bias)", tensor):
            width = model.siglip2_pool.q.out_features
            rows = slice(0, width) if match[1] == "q" else slice(width, None)
            yield f"{_THEIR_POOL}attention.in_proj_{match[2]}", Entry(tensor, same, rows)


def _heights(model: nn.Module, tensor: str, height: int) -> tuple[int, ...]:
    """Rows of the arrays that are stacked in a tensor."""
    if not tensor.endswith("qkv.weight"):
        return height // 2, height // 2
    attn = model.get_submodule(tensor.removesuffix(".qkv.weight"))
    return tuple(heads * attn.head_dim for heads in (attn.num_heads, attn.num_kv_heads, attn.num_kv_heads))


def _rows(start: int, stop: int) -> View:
    return lambda array: array[..., start:stop, :]
