"""Which of our tensors holds which array of the reference, and how its axes lie.

An `Entry` turns one of our tensors into a view in the reference's layout, to be written or read: one table serves both
directions, gradients, and files larger than memory. Linear layers are transposed; queries, keys and values are three
arrays with an axis of heads there, one matrix here.
"""

import math
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

View = Callable[[np.ndarray], np.ndarray]


class Entry(NamedTuple):
    """A tensor of our state dict, and what gives a view of it, or of a part, in the layout of the checkpoint's array;
    of some arrays only `rows` lie there."""

    tensor: str
    view: View
    rows: slice = slice(None)


def same(array: np.ndarray) -> np.ndarray:
    return array


def transposed(array: np.ndarray) -> np.ndarray:
    return array.swapaxes(-1, -2)


def _gates(members: int, array: np.ndarray) -> np.ndarray:
    """The gates of an ensemble's members: (E, D) -> (D, M, E / M)."""
    return array.reshape(members, -1, array.shape[-1]).transpose(2, 0, 1)


_NORM = {"weight": ("scale", same), "bias": ("bias", same)}
_LINEAR = {"weight": ("kernel", transposed), "bias": ("bias", same)}
_PATCHES = {"weight": ("kernel", lambda array: array.transpose(2, 3, 1, 0)), "bias": ("bias", same)}
_SOFT = {"slots": ("mu", lambda array: array.transpose(2, 0, 1)), "scale": ("scale", same)}
_BLOCK, _THEIR_BLOCK = r"blocks\.(\d+)\.", r"Encoder/encoderblock_\1/"
_POOL = "MapHead/MultiHeadDotProductAttention"

# Our module -> its path there, and {our tensor: (the array there, its view)}.
_MODULES = [
    (r"patch_embed\.proj", "embedding", _PATCHES),
    (r"token_embedding", "Embed_0", {"weight": ("embedding", same)}),
    (_BLOCK + r"norm1", _THEIR_BLOCK + "LayerNorm_0", _NORM),
    (_BLOCK + r"norm2", _THEIR_BLOCK + "LayerNorm_1", _NORM),
    (_BLOCK + r"attn\.q_norm", _THEIR_BLOCK + "SelfAttention/query_ln", {"weight": ("scale", same)}),
    (_BLOCK + r"attn\.k_norm", _THEIR_BLOCK + "SelfAttention/key_ln", {"weight": ("scale", same)}),
    (_BLOCK + r"mlp\.fc1", _THEIR_BLOCK + "Mlp/Dense_0", _LINEAR),
    (_BLOCK + r"mlp\.fc2", _THEIR_BLOCK + "Mlp/Dense_1", _LINEAR),
    (_BLOCK + r"mlp\.experts\.fc1", _THEIR_BLOCK + "Moe/Mlp/Dense_0", _LINEAR),
    (_BLOCK + r"mlp\.experts\.fc2", _THEIR_BLOCK + "Moe/Mlp/Dense_1", _LINEAR),
    (_BLOCK + r"mlp\.router", _THEIR_BLOCK + "Moe/Router/dense", {"weight": ("kernel", transposed)}),
    (_BLOCK + r"mlp\.router", _THEIR_BLOCK + "Moe/Router", _SOFT),
    (r"norm", "Encoder/encoder_norm", _NORM),
    (r"attn_pool", "MapHead", {"latent": ("probe", same)}),
    (r"attn_pool\.q_norm", _POOL + "/query_ln", {"weight": ("scale", same)}),
    (r"attn_pool\.k_norm", _POOL + "/key_ln", {"weight": ("scale", same)}),
    (r"attn_pool\.norm", "MapHead/LayerNorm", _NORM),
    (r"attn_pool\.mlp\.fc1", "MapHead/Mlp/Dense_0", _LINEAR),
    (r"attn_pool\.mlp\.fc2", "MapHead/Mlp/Dense_1", _LINEAR),
    (r"pre_logits", "pre_logits", _LINEAR),
    (r"head", "head", _LINEAR),
]
# Our projections -> the attention there, and the names of the matrices that lie below each other in them.
_ATTENTION = [
    (_BLOCK + r"attn\.qkv", _THEIR_BLOCK + "SelfAttention", ("query", "key", "value")),
    (_BLOCK + r"attn\.proj", _THEIR_BLOCK + "SelfAttention", ("out",)),
    (r"attn_pool\.q", _POOL, ("query",)),
    (r"attn_pool\.kv", _POOL, ("key", "value")),
    (r"attn_pool\.proj", _POOL, ("out",)),
]


def reference_layout(model: nn.Module) -> dict[str, Entry]:
    """{the reference's name: where it lies in the model}; a ValueError for a model that the reference does not have."""
    if not (hasattr(model, "visual") and hasattr(model, "text")):
        return _tower(require_vision(model))
    layout = {}
    for tower, ours, theirs in ((require_vision(model.visual), "visual.", "img/"), (model.text, "text.", "txt/")):
        layout |= {theirs + name: Entry(ours + entry.tensor, entry.view) for name, entry in _tower(tower).items()}
    layout["s"] = Entry("logit_scale", same)
    if model.logit_bias is not None:
        layout["b"] = Entry("logit_bias", same)
    return layout


def require_vision(model: nn.Module) -> VisionTransformer:
    """The model itself; a ValueError if it is none of timm's vision transformers."""
    if not isinstance(model, VisionTransformer):
        what = "only V-MoE, Soft MoE and two-tower models of them can be written for it"
        raise ValueError(f"the reference has no model like this one ({type(model).__name__}): {what}")
    return model


def _tower(model: nn.Module) -> dict[str, Entry]:
    tensors = model.state_dict()
    own = {"cls_token": "cls", "pos_embed": "Encoder/posembed_input/pos_embedding"}
    layout = {array: Entry(tensor, same) for tensor, array in own.items() if tensor in tensors}
    for module in dict.fromkeys(name.rpartition(".")[0] for name in tensors):
        for pattern, theirs, arrays in _MODULES:
            match = re.fullmatch(pattern, module)
            if match and any(f"{module}.{tensor}" in tensors for tensor in arrays):
                for tensor, (array, view) in arrays.items():  # also those that it lacks, which are missed then
                    if module.endswith(".router") and (members := getattr(model, "ensemble_size", 1)) > 1:
                        view = partial(_gates, members)
                    layout[f"{match.expand(theirs)}/{array}"] = Entry(f"{module}.{tensor}", view)
        for pattern, theirs, parts in _ATTENTION:
            if match := re.fullmatch(pattern, module):
                heads = model.get_submodule(module.rpartition(".")[0]).num_heads
                for array, entry in _projection(module, parts, heads):
                    layout[f"{match.expand(theirs)}/{array}"] = entry
    return layout


def _projection(module: str, parts: tuple[str, ...], heads: int) -> Iterator[tuple[str, Entry]]:
    weight, bias = f"{module}.weight", f"{module}.bias"
    if parts == ("out",):
        yield "out/kernel", Entry(weight, lambda array: array.reshape(len(array), heads, -1).transpose(1, 2, 0))
        yield "out/bias", Entry(bias, same)
        return

    def rows(index: int, array: np.ndarray) -> np.ndarray:
        return np.split(array, len(parts))[index].reshape(heads, -1, *array.shape[1:])

    for index, part in enumerate(parts):
        yield f"{part}/kernel", Entry(weight, lambda array, index=index: rows(index, array).transpose(2, 0, 1))
        yield f"{part}/bias", Entry(bias, partial(rows, index))


def zoom_positions(positions_1TD: np.ndarray, old: tuple[int, int], new: tuple[int, int]) -> np.ndarray:
    """Position embeddings (1, T, D) of a grid of patches, for another grid; as the reference's `vit_zoom`.

    Linear, corners aligned; class tokens, which come first, stay. (The reference's scipy.ndimage.zoom makes the last
    row zero for some pairs of sizes, such as 15 -> 26; that is not repeated.)
    """
    prefix = positions_1TD.shape[1] - math.prod(old)
    kept, patches = np.split(positions_1TD, [prefix], axis=1)
    grid_1DHW = torch.tensor(patches, dtype=torch.float64).reshape(1, *old, -1).permute(0, 3, 1, 2)
    zoomed = nn.functional.interpolate(grid_1DHW, size=new, mode="bilinear", align_corners=True)
    return np.concatenate([kept, zoomed.flatten(2).transpose(1, 2).numpy().astype(kept.dtype)], axis=1)
