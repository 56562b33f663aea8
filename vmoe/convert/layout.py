"""Which of our tensors holds which array of the reference, and how its axes lie.

A `Place` turns one of our tensors into a view in the reference's layout. Writing into the view fills the tensor,
reading it gives the reference's array; so one table serves both directions, gradients, and files larger than memory.
Linear layers are transposed; queries, keys and values are three arrays with an axis of heads there, one matrix here.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from vmoe.moe import SparseMoE

View = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Place:
    """Attributes:
    tensor: its name in our state dict.
    view: our array -> a view of it in the reference's layout.
    """

    tensor: str
    view: View


def _same(array: np.ndarray) -> np.ndarray:
    return array


def _linear(array: np.ndarray) -> np.ndarray:
    return array.swapaxes(-1, -2)


Places = Iterator[tuple[str, str, View]]


def reference_places(model: nn.Module) -> dict[str, Place]:
    """{the reference's name: where it lies in the model}, for a V-MoE, a Soft MoE or a two-tower model.

    Raises:
        ValueError: for a model that the reference does not have.
    """
    if hasattr(model, "visual") and hasattr(model, "text"):
        places = {}
        for tower, ours, theirs in ((model.visual, "visual.", "img/"), (model.text, "text.", "txt/")):
            if not isinstance(tower, VisionTransformer) and ours == "visual.":
                raise ValueError(f"the reference has no image tower like this one ({type(tower).__name__})")
            for name, place in _tower(tower).items():
                places[theirs + name] = Place(ours + place.tensor, place.view)
        places["s"] = Place("logit_scale", _same)
        if model.logit_bias is not None:
            places["b"] = Place("logit_bias", _same)
        return places
    if not isinstance(model, VisionTransformer):
        raise ValueError(
            f"the reference has no model like this one ({type(model).__name__}): only V-MoE, Soft MoE and two-tower "
            "models of them can be written for it"
        )
    return _tower(model)


def _tower(model: nn.Module) -> dict[str, Place]:
    rows = _image(model) if isinstance(model, VisionTransformer) else _text(model)
    return {theirs: Place(ours, view) for theirs, ours, view in rows}


def _image(model: VisionTransformer) -> Places:
    yield "embedding/kernel", "patch_embed.proj.weight", lambda array: array.transpose(2, 3, 1, 0)
    yield "embedding/bias", "patch_embed.proj.bias", _same
    if model.cls_token is not None:
        yield "cls", "cls_token", _same
    yield from _encoder(model)
    if isinstance(getattr(model, "pre_logits", None), nn.Linear):
        yield from _dense("pre_logits", "pre_logits")


def _text(model: nn.Module) -> Places:
    yield "Embed_0/embedding", "token_embedding.weight", _same
    yield from _encoder(model)


def _encoder(model: nn.Module) -> Places:
    if getattr(model, "pos_embed", None) is not None:
        yield "Encoder/posembed_input/pos_embedding", "pos_embed", _same
    for i, block in enumerate(model.blocks):
        yield from _block(block, f"Encoder/encoderblock_{i}", f"blocks.{i}")
    yield from _norm("Encoder/encoder_norm", "norm")
    if getattr(model, "attn_pool", None) is not None:
        yield from _map_head(model.attn_pool)
    if isinstance(model.head, nn.Linear):
        yield from _dense("head", "head")


def _norm(theirs: str, ours: str) -> Places:
    yield f"{theirs}/scale", f"{ours}.weight", _same
    yield f"{theirs}/bias", f"{ours}.bias", _same


def _dense(theirs: str, ours: str) -> Places:
    yield f"{theirs}/kernel", f"{ours}.weight", _linear
    yield f"{theirs}/bias", f"{ours}.bias", _same


def _mlp(theirs: str, ours: str) -> Places:
    yield from _dense(f"{theirs}/Dense_0", f"{ours}.fc1")
    yield from _dense(f"{theirs}/Dense_1", f"{ours}.fc2")


def _heads(theirs: str, ours: str, part: int, heads: int) -> Places:
    """One of the matrices that lie below each other in our projection: `part` 0, 1, ..."""

    def kernel(array: np.ndarray) -> np.ndarray:
        width = array.shape[1]
        return array[part * width : (part + 1) * width].reshape(heads, -1, width).transpose(2, 0, 1)

    def bias(array: np.ndarray, parts: int) -> np.ndarray:
        width = array.shape[0] // parts
        return array[part * width : (part + 1) * width].reshape(heads, -1)

    parts = {"qkv": 3, "kv": 2, "q": 1}[ours.rpartition(".")[2]]
    yield f"{theirs}/kernel", f"{ours}.weight", kernel
    yield f"{theirs}/bias", f"{ours}.bias", lambda array: bias(array, parts)


def _attention_out(theirs: str, ours: str, heads: int) -> Places:
    def kernel(array: np.ndarray) -> np.ndarray:
        return array.reshape(array.shape[0], heads, -1).transpose(1, 2, 0)

    yield f"{theirs}/out/kernel", f"{ours}.proj.weight", kernel
    yield f"{theirs}/out/bias", f"{ours}.proj.bias", _same


def _qk_norms(attention: nn.Module, theirs: str, ours: str) -> Places:
    if not isinstance(attention.q_norm, nn.Identity):
        yield f"{theirs}/query_ln/scale", f"{ours}.q_norm.weight", _same
        yield f"{theirs}/key_ln/scale", f"{ours}.k_norm.weight", _same


def _block(block: nn.Module, theirs: str, ours: str) -> Places:
    yield from _norm(f"{theirs}/LayerNorm_0", f"{ours}.norm1")
    yield from _norm(f"{theirs}/LayerNorm_1", f"{ours}.norm2")
    attention, heads = f"{theirs}/SelfAttention", block.attn.num_heads
    for part, name in enumerate(("query", "key", "value")):
        yield from _heads(f"{attention}/{name}", f"{ours}.attn.qkv", part, heads)
    yield from _attention_out(attention, f"{ours}.attn", heads)
    yield from _qk_norms(block.attn, attention, f"{ours}.attn")
    if not isinstance(block.mlp, SparseMoE):
        yield from _mlp(f"{theirs}/Mlp", f"{ours}.mlp")
        return
    yield from _mlp(f"{theirs}/Moe/Mlp", f"{ours}.mlp.experts")
    router = f"{theirs}/Moe/Router"
    if block.mlp.router_type == "soft":
        yield f"{router}/mu", f"{ours}.mlp.router.slots", lambda array: array.transpose(2, 0, 1)
        yield f"{router}/scale", f"{ours}.mlp.router.scale", _same
    else:
        yield f"{router}/dense/kernel", f"{ours}.mlp.router.weight", _linear


def _map_head(pool: nn.Module) -> Places:
    attention = "MapHead/MultiHeadDotProductAttention"
    yield "MapHead/probe", "attn_pool.latent", _same
    yield from _heads(f"{attention}/query", "attn_pool.q", 0, pool.num_heads)
    yield from _heads(f"{attention}/key", "attn_pool.kv", 0, pool.num_heads)
    yield from _heads(f"{attention}/value", "attn_pool.kv", 1, pool.num_heads)
    yield from _attention_out(attention, "attn_pool", pool.num_heads)
    yield from _qk_norms(pool, attention, "attn_pool")
    yield from _norm("MapHead/LayerNorm", "attn_pool.norm")
    yield from _mlp("MapHead/Mlp", "attn_pool.mlp")


def stored_grid(tokens: int, prefix: int, config_grid: tuple[int, int] | None, new: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns that position embeddings were made for: the config's if they fit, else a square.

    Args:
        tokens: position embeddings, with that of a class token.
        prefix: class tokens of the model, 0 or 1.
        config_grid: what the config's own image_size gives, or None.
        new: the model's; for patches that fit nothing else.

    Raises:
        ValueError: if no grid has so many patches.
    """
    patches = tokens - prefix
    side = math.isqrt(max(0, patches))
    for grid in (config_grid, (side, side), new):
        if grid is not None and math.prod(grid) == patches > 0:
            return grid
    kind = "with" if prefix else "without"
    raise ValueError(f"{tokens} position embeddings are no square grid {kind} a class token, as the model is")


def zoom_positions(positions_1TD: np.ndarray, old: tuple[int, int], new: tuple[int, int]) -> np.ndarray:
    """Position embeddings of a grid of patches, for another grid; as the reference's `vit_zoom`.

    Linear interpolation whose corners are the old grid's corners: new row i of n lies at i·(m - 1)/(n - 1) of m old
    ones. (The reference calls scipy.ndimage.zoom, whose rounding makes the last row zero for some pairs of sizes, such
    as 15 -> 26; that is not repeated here.)

    Args:
        positions_1TD: (1, T, D); T is the old grid's patches, after class tokens, whose embeddings are kept.
        old, new: rows and columns.
    """
    prefix = positions_1TD.shape[1] - math.prod(old)
    kept, patches = positions_1TD[:, :prefix], positions_1TD[:, prefix:].astype(np.float64)
    rows, columns = (_interpolation(*sizes) for sizes in zip(old, new, strict=True))
    zoomed = np.einsum("hH,wW,HWd->hwd", rows, columns, patches.reshape(*old, -1), optimize=True)
    return np.concatenate([kept, zoomed.reshape(1, math.prod(new), -1).astype(positions_1TD.dtype)], axis=1)


def _interpolation(old: int, new: int) -> np.ndarray:
    """(new, old) weights of linear interpolation with aligned corners."""
    place = np.arange(new) * ((old - 1) / (new - 1)) if new > 1 else np.zeros(1)
    place = np.minimum(place, old - 1)
    low = np.minimum(place.astype(int), max(old - 2, 0))
    weights = np.zeros((new, old))
    weights[np.arange(new), low] += 1 - (place - low)
    weights[np.arange(new), np.minimum(low + 1, old - 1)] += place - low
    return weights
