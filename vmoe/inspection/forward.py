"""One pass of a model over images and texts, with its routing.

Shapes, by suffix: B batch, T tokens of one modality, K choices, C classes, D width of the embeddings.
"""

from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch.nn.functional as F
from timm.models.naflexvit import NaFlexVit
from timm.utils import unwrap_model
from torch import Tensor, nn

from vmoe.evaluation.classification import select_columns
from vmoe.evaluation.loaded_model import LoadedModel
from vmoe.evaluation.zero_shot import Template, feature_scorer
from vmoe.inspection.accumulate import Decoder, ModalityTokens, split_modalities
from vmoe.inspection.results import SampleRouting, TokenRouting
from vmoe.models.preprocess import preprocess_config
from vmoe.models.text import text_mask
from vmoe.moe import SparseMoE, record_routing
from vmoe.moe.record import WRAPPERS, unwrap
from vmoe.utils.config import ConfigError

TOP_CLASSES = 5


def sparse_layers(loaded: LoadedModel, required: bool = True) -> dict[str, SparseMoE]:
    """{name: sparse layer} in the order of the model, named as by `record_routing`; ConfigError: none, and required."""
    layers = {
        ".".join(part for part in name.split(".") if part not in WRAPPERS): module
        for name, module in unwrap(loaded.model).named_modules()
        if isinstance(module, SparseMoE)
    }
    if not layers and required:
        what = "a dense model, which has no experts to look at; give a sparse one's (vmoe.upcycle makes one of it)"
        raise ConfigError(f"{loaded.checkpoint} holds {what}")
    return layers


class Routed(NamedTuple):
    """What a model makes of images, texts or pairs, and where their tokens go."""

    loaded: LoadedModel
    layers: list[str]  # all sparse layers
    tokens: dict[str, dict[str, ModalityTokens]]  # {modality: {layer name: its tokens}}
    output_BD: Tensor | None  # a classifier's logits (B, C) or the images' embeddings (B, D)
    pixels_BHWC: np.ndarray | None  # uint8: the images as the model sees them, without the normalisation
    ids_BT: Tensor | None

    def text(self, b: int) -> tuple[list[str], dict[str, TokenRouting]]:
        """The text tokens of row `b`, and {layer name: their routing (T, K)}; nothing where no layer sees text."""
        layers = self.tokens.get("text")
        if not layers:
            return [], {}
        real_T = next(iter(layers.values())).real_BT[b]
        texts = token_decoder(self.loaded.tokenizer)(self.ids_BT[b].cpu().numpy()[real_T].tolist())
        return texts, {name: tokens.routing(b, real_T) for name, tokens in layers.items()}

    def sample(self, b: int) -> SampleRouting:
        """Row `b`; path, label, caption and names are left open."""
        images, patches = self.tokens.get("image", {}), []
        for name in self.layers:
            patches.append(None)
            if name in images:
                prefix, *grid = patch_grid(self.loaded.model, images[name].real_BT.shape[1])
                patches[-1] = images[name].routing(b, slice(prefix, None), grid)
        text_tokens, texts = self.text(b)
        text = [texts.get(name) for name in self.layers] if texts else []
        return SampleRouting(self.pixels_BHWC[b].copy(), "", None, None, text_tokens, patches, text, [])


def routed(loaded: LoadedModel, image_BCHW: Tensor | None, ids_BT: Tensor | None) -> Routed:
    """Runs the model on images, texts or pairs; call it inside `evaluating`."""
    model, output, pixels_BHWC = loaded.model, None, None
    with record_routing(model) as record:
        if image_BCHW is None:
            model.encode_text(ids_BT.to(loaded.device), normalize=True)
        elif loaded.tokenizer is None:
            output = model(image_BCHW)
        elif ids_BT is None:
            output = model.encode_image(image_BCHW, normalize=True)
        else:
            output = model(image_BCHW, ids_BT.to(loaded.device))
            output = output["image_features"] if isinstance(output, dict) else output[0]
    tokens: dict[str, dict[str, ModalityTokens]] = {}
    for name, call in record.layers.items():
        for modality, own in split_modalities(call).items():
            tokens.setdefault(modality, {})[name] = own
    end = getattr(loaded.tokenizer, "eot_token_id", None)
    for name, own in tokens.get("text", {}).items():
        if own.real_BT.shape != ids_BT.shape:
            seen, given = own.real_BT.shape[1], ids_BT.shape[1]
            raise ValueError(f"{name} sees {seen} text tokens, but the tokenizer gives {given}")
        if end is not None:  # some models read their padding too
            own.real_BT = own.real_BT & text_mask(ids_BT, end).cpu().numpy()
    if image_BCHW is not None:
        image = image_BCHW.detach().float().cpu() * loaded.transform.std + loaded.transform.mean
        pixels = (image * 255).round().clamp(0, 255).byte().expand(-1, 3, -1, -1)
        pixels_BHWC = pixels.permute(0, 2, 3, 1).numpy()
    return Routed(loaded, list(sparse_layers(loaded, required=False)), tokens, output, pixels_BHWC, ids_BT)


def name_images(
    samples: Iterable[SampleRouting],
    loaded: LoadedModel,
    output_BD: Tensor,
    names: list[str] | None,
    are_classes: bool,
    class_columns: list[list[int]] | None = None,
    templates: Sequence[Template] | str | None = None,
) -> None:
    """Fills in the `TOP_CLASSES` likeliest of C names (None, of a classifier: "class 0", ...) of each sample.

    `output_BD` is what `routed` gave; `are_classes`: the names are those of the labels; `class_columns` as in
    `vmoe.evaluation.classification.select_columns`. ValueError: a classifier of another number of classes.
    """
    scores_BC = output_BD.float()
    if loaded.tokenizer is not None:
        score = feature_scorer(loaded.model, loaded.tokenizer, names, templates, loaded.device)
        scores_BC = score(F.normalize(scores_BC, dim=-1))
    scores_BC = select_columns(scores_BC, class_columns)
    if names is None:
        names = [f"class {c}" for c in range(scores_BC.shape[1])]
    if len(names) != scores_BC.shape[1]:
        raise ValueError(f"{loaded.checkpoint} has {scores_BC.shape[1]} classes, but {len(names)} names were given")
    top = scores_BC.softmax(1).topk(min(TOP_CLASSES, len(names)))
    for sample, values, classes in zip(samples, top.values.tolist(), top.indices.tolist(), strict=True):
        sample.top_classes = [(names[c], value) for c, value in zip(classes, values)]
        sample.top_labels = classes if are_classes else []


def patch_grid(model: nn.Module, num_tokens: int) -> tuple[int, int, int]:
    """(prefix tokens, rows, columns) of an image tower's token sequence; ValueError if it has no such order."""
    model = unwrap_model(model)
    for tower in (model, getattr(model, "visual", None), getattr(getattr(model, "visual", None), "trunk", None)):
        embed, expected = getattr(tower, "patch_embed", None), getattr(tower, "num_prefix_tokens", 0)
        if embed is None and hasattr(tower, "class_embedding"):  # open_clip's own vision transformer
            embed, expected = tower, 1
        rows, columns = getattr(embed, "grid_size", None) or (0, 0)
        if isinstance(tower, NaFlexVit):  # which sees images of its usual size here
            embed = tower.embeds
            rows, columns = embed.dynamic_feat_size(preprocess_config(tower)["input_size"][1:])
        if not hasattr(tower, "num_prefix_tokens"):  # a later stage of Swin sees a coarser grid
            while rows * columns > max(1, num_tokens):
                rows, columns = (rows + 1) // 2, (columns + 1) // 2
        if embed is not None and num_tokens - rows * columns == expected:
            return expected, rows, columns
    raise ValueError(f"cannot arrange {num_tokens} tokens on a grid of patches of {type(model).__name__}")


def token_decoder(tokenizer: Any) -> Decoder:
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
