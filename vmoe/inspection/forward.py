"""One pass of a model over images and texts, with its routing.

Shapes, by suffix: B batch, T tokens of one modality, C classes, D width of the embeddings, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch.nn.functional as F
from timm.utils import unwrap_model
from torch import Tensor, nn

from vmoe.evaluation.classification import select_columns
from vmoe.evaluation.loaded_model import LoadedModel
from vmoe.evaluation.zero_shot import Template, feature_scorer
from vmoe.inspection.accumulate import ModalityTokens, split_modalities
from vmoe.inspection.results import TokenRouting
from vmoe.models.text import text_mask
from vmoe.moe import SparseMoE, record_routing
from vmoe.moe.record import WRAPPERS, unwrap
from vmoe.utils.config import ConfigError

TOP_CLASSES = 5


def sparse_layers(subject: LoadedModel, required: bool = True) -> dict[str, SparseMoE]:
    """{name: sparse layer} in the order of the model, named as by `record_routing`; ConfigError: none, and required."""
    layers = {
        ".".join(part for part in name.split(".") if part not in WRAPPERS): module
        for name, module in unwrap(subject.model).named_modules()
        if isinstance(module, SparseMoE)
    }
    if not layers and required:
        raise ConfigError(
            f"{subject.checkpoint} holds a dense model, which has no experts to look at; give a sparse one's "
            "(vmoe.upcycle makes one of it)"
        )
    return layers


def routed(
    subject: LoadedModel, image_BCHW: Tensor | None, ids_BT: Tensor | None
) -> tuple[dict[str, dict[str, ModalityTokens]], Tensor | None]:
    """Runs the model on images, texts or pairs; call it inside `evaluating`.

    Returns ({modality: {layer name: its tokens}}, a classifier's logits (B, C) or the images' embeddings (B, D)).
    """
    model, device = subject.model, subject.device
    with record_routing(model) as record:
        if image_BCHW is None:
            output = None
            model.encode_text(ids_BT.to(device), normalize=True)
        elif subject.tokenizer is None:
            output = model(image_BCHW)
        elif ids_BT is None:
            output = model.encode_image(image_BCHW, normalize=True)
        else:
            output = model(image_BCHW, ids_BT.to(device))
            output = output["image_features"] if isinstance(output, dict) else output[0]
    tokens: dict[str, dict[str, ModalityTokens]] = {}
    for name, call in record.layers.items():
        for modality, own in split_modalities(call).items():
            tokens.setdefault(modality, {})[name] = own
    end = getattr(subject.tokenizer, "eot_token_id", None)
    for name, own in tokens.get("text", {}).items():
        if own.real_BT.shape != ids_BT.shape:
            seen, given = own.real_BT.shape[1], ids_BT.shape[1]
            raise ValueError(f"{name} sees {seen} text tokens, but the tokenizer gives {given}")
        if end is not None:  # some models read their padding too
            own.real_BT = own.real_BT & text_mask(ids_BT, end).cpu().numpy()
    return tokens, output


def shown_pixels(subject: LoadedModel, image_BCHW: Tensor) -> np.ndarray:
    """(B, H, W, 3) uint8: the images as the model sees them, without the normalisation."""
    image = image_BCHW.detach().float().cpu() * subject.transform.std + subject.transform.mean
    return (image * 255).round().clamp(0, 255).byte().expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()


def likeliest_names(
    subject: LoadedModel,
    output_BD: Tensor,
    names: list[str] | None,
    class_columns: list[list[int]] | None = None,
    templates: Sequence[Template] | str | None = None,
) -> list[list[tuple[int, str, float]]]:
    """For each image the `TOP_CLASSES` likeliest names: (index among the names, name, probability).

    `output_BD` is what `routed` gave, `names` are C names (None, of a classifier: "class 0", ...), `class_columns` as
    in `vmoe.evaluation.classification.select_columns`. Raises ValueError for a classifier of another number of classes.
    """
    scores_BC = output_BD.float()
    if subject.tokenizer is not None:
        score = feature_scorer(subject.model, subject.tokenizer, names, templates, subject.device)
        scores_BC = score(F.normalize(scores_BC, dim=-1))
    scores_BC = select_columns(scores_BC, class_columns)
    if names is None:
        names = [f"class {c}" for c in range(scores_BC.shape[1])]
    if len(names) != scores_BC.shape[1]:
        raise ValueError(f"{subject.checkpoint} has {scores_BC.shape[1]} classes, but {len(names)} names were given")
    top = scores_BC.softmax(1).topk(min(TOP_CLASSES, len(names)))
    rows = zip(top.values.tolist(), top.indices.tolist(), strict=True)
    return [[(c, names[c], value) for value, c in zip(*row, strict=True)] for row in rows]


def patch_grid(model: nn.Module, num_tokens: int) -> tuple[int, int, int]:
    """(prefix tokens, rows, columns) of an image tower's token sequence; ValueError if it has no such order."""
    model = unwrap_model(model)
    for tower in (model, getattr(model, "visual", None), getattr(getattr(model, "visual", None), "trunk", None)):
        embed, expected = getattr(tower, "patch_embed", None), getattr(tower, "num_prefix_tokens", 0)
        if embed is None and hasattr(tower, "class_embedding"):  # open_clip's own vision transformer
            embed, expected = tower, 1
        rows, columns = getattr(embed, "grid_size", None) or (0, 0)
        if embed is not None and num_tokens - rows * columns == expected:
            return expected, rows, columns
    raise ValueError(f"cannot arrange {num_tokens} tokens on a grid of patches of {type(model).__name__}")


def text_routing(
    subject: LoadedModel, layers: dict[str, ModalityTokens], ids_BT: Tensor | None, b: int
) -> tuple[list[str], dict[str, TokenRouting]]:
    """The text tokens of row `b`, and {layer name: their routing (T, K)}; nothing where no layer sees text."""
    if not layers:
        return [], {}
    real_T = next(iter(layers.values())).real_BT[b]
    texts = token_decoder(subject.tokenizer)(ids_BT[b].cpu().numpy()[real_T].tolist())
    return texts, {name: tokens.routing(b, real_T) for name, tokens in layers.items()}


def token_decoder(tokenizer: Any) -> Callable[[Sequence[int]], list[str]]:
    """A function that writes each token id as text, by the decoding of open_clip's or Hugging Face's tokenizer.

    A token of open_clip's that does not end its word gets an ellipsis ("sky…"). ValueError: it cannot decode.
    """
    inner = tokenizer if hasattr(tokenizer, "decode") else getattr(tokenizer, "tokenizer", None)
    if not hasattr(inner, "decode"):
        raise ValueError(f"{type(tokenizer).__name__} has no decode(): the text tokens cannot be named")
    special = set(getattr(inner, "all_special_ids", ()))
    symbols = getattr(inner, "decoder", None)  # of open_clip's own tokenizer: {id: symbol}

    @cache
    def name(token: int) -> str:
        text = inner.decode([token]).strip() or f"token {token}"
        goes_on = token not in special and isinstance(symbols, dict) and not symbols[token].endswith("</w>")
        return f"{text}…" if goes_on else text

    return lambda tokens: [name(token) for token in tokens]
