"""Routing statistics: what they hold, and their files.

Shapes, by suffix: E experts, K choices of a token (K = E where experts or slots choose), C classes, L sparse layers,
T tokens of a caption, H and W pixels of an image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vmoe.evaluation.results_file import write_json
from vmoe.inspection.accumulate import telling_of_expert
from vmoe.utils.files import atomic_file

TELLING = 10  # classes and word pieces listed for each expert


@dataclass
class TypicalPatch:
    """A patch whose gate value (`weight`, 0..1) for an expert is large.

    `sample` is the index of its image in the data set; `row` and `column` count from 0, from the upper left; `pixels`
    is (h, w, 3) uint8, the patch as the model saw it.
    """

    sample: int
    row: int
    column: int
    weight: float
    pixels: np.ndarray


@dataclass
class LayerStatistics:
    """What one sparse layer did with all tokens of the data; padding is never counted.

    Soft routing has no assignments: there, `asked`, `kept`, `expert_class` and `expert_word` hold sums of the tokens'
    combine weights (how many tokens' worth of output came from each expert), and nothing is dropped. Where experts
    choose (expert choice), `asked` equals `kept`, and dropped are the tokens that no expert took.

    Attributes:
        name: of the layer, such as "blocks.1.mlp".
        num_experts: E.
        num_selected_experts: experts that each token chooses; E where experts or slots choose.
        router: "top_k", "expert_choice" or "soft".
        eval_capacity_factor: that the layer ran with; None: no limit (top_k), or the capacity
            factor of training (expert_choice).
        batch_priority: whether the tokens with the largest gates went first.
        tokens: {modality: tokens seen}; only the modalities that the layer met.
        asked: {modality: (E,) assignments that asked for each expert}.
        kept: {modality: (E,) of these, how many were kept}, the load.
        importance: {modality: (E,) sum of the tokens' gate values}.
        entropy: {modality: mean entropy of a token's gate, in nats; 0..log E}.
        share_dropped: {modality: share of the assignments (expert choice: of the tokens) that were dropped, 0..1}.
        expert_class: (E, C) kept assignments of image tokens by the class of their image; None without labels.
        expert_word: {word piece: (E,) kept assignments of it}; empty where the layer met no text.
        typical_patches: for each expert the patches with its largest gate values, largest first, at most one per
            image; empty lists where the layer met no images.
        capacity: a fixed number of rows that each expert takes from a group, which overrides the factor; or None.
    """

    name: str
    num_experts: int
    num_selected_experts: int
    router: str
    eval_capacity_factor: float | None
    batch_priority: bool
    tokens: dict[str, int]
    asked: dict[str, np.ndarray]
    kept: dict[str, np.ndarray]
    importance: dict[str, np.ndarray]
    entropy: dict[str, float]
    share_dropped: dict[str, float]
    expert_class: np.ndarray | None = None
    expert_word: dict[str, np.ndarray] = field(default_factory=dict)
    typical_patches: list[list[TypicalPatch]] = field(default_factory=list)
    capacity: int | None = None

    @property
    def word_table(self) -> np.ndarray:
        """(E, W) of all word pieces."""
        return np.stack(list(self.expert_word.values()), axis=1)


@dataclass
class TokenRouting:
    """Where the tokens of one image or one caption went in one layer.

    The leading axes are (rows, columns) of the grid for an image, (T,) for a caption.

    Attributes:
        expert: (..., K) int, the chosen experts, best first (all E of them where experts or slots choose).
        weight: (..., K) float32 combine weights; 0 for an expert that did not take the token.
        kept: (..., K) bool, the expert took the token.
    """

    expert: np.ndarray
    weight: np.ndarray
    kept: np.ndarray

    @property
    def best_kept(self) -> np.ndarray:
        """(...) int, the best-weighted chosen expert that took each token; -1: dropped by all of them."""
        first = self.kept.argmax(axis=-1)[..., None]
        expert = np.take_along_axis(self.expert, first, axis=-1)[..., 0]
        return np.where(self.kept.any(axis=-1), expert, -1)


@dataclass
class SampleRouting:
    """One image, and its caption if there is one, with their routing in every layer.

    Attributes:
        image: (H, W, 3) uint8 as the model saw it.
        path: file of the image, or another name of the sample.
        label: index of its class, or None.
        caption: its text, or None.
        words: T word pieces of the caption as the tokenizer cut it, its special ones included; [] without a caption.
        patches: for each layer of `RoutingStatistics.layers` the routing of the patches, (rows, columns, K);
            None for a layer that sees text only.
        text: for each layer the routing of the text tokens, (T, K); None for a layer that sees images only; [] without
            a caption.
        top_classes: (name, probability) of the model's likeliest names, likeliest first.
        top_labels: their indices into `RoutingStatistics.class_names`, to compare with `label` (names may be alike, or
            longer than the model's); [] where they are no classes of the data.
    """

    image: np.ndarray
    path: str
    label: int | None
    caption: str | None
    words: list[str]
    patches: list[TokenRouting | None]
    text: list[TokenRouting | None]
    top_classes: list[tuple[str, float]]
    top_labels: list[int] = field(default_factory=list)


@dataclass
class RoutingStatistics:
    """What the experts of a model did with a data set.

    Attributes:
        layers: one per sparse layer, in the order of the model.
        agreement: {modality: (L, L) agreement of the routing between two layers, 0..1}: normalised mutual information
            of the tokens' first choices; NaN where a layer does not see the modality, or not the same tokens.
        agreement_left_out: {modality: names of the layers that have no agreement, since they see other tokens of the
            modality than the first layer does}; only modalities with such layers.
        class_names: C names of the labels, or None.
        num_samples: images that were read.
        num_skipped: unreadable ones that were skipped.
        samples: `num_images` of them, evenly spread over the data.
        sample_index: their indices in the data set.
        words_from: "captions" of the data, "class names", or None where no text was read.
        checkpoint: the model, as the user named it.
        weights_fingerprint: SHA-256 (hex) of its weights file.
        data: what the data set is, in a few words.
        data_fingerprint: SHA-256 (hex) of what is in it.
        versions: {library: version}.
    """

    layers: list[LayerStatistics]
    agreement: dict[str, np.ndarray]
    class_names: list[str] | None
    num_samples: int
    num_skipped: int
    samples: list[SampleRouting]
    sample_index: list[int]
    words_from: str | None
    checkpoint: str
    weights_fingerprint: str
    data: str
    data_fingerprint: str
    versions: dict[str, str] = field(default_factory=dict)
    agreement_left_out: dict[str, list[str]] = field(default_factory=dict)

    @property
    def modalities(self) -> list[str]:
        """Names of the modalities that some layer met: "image", "text" or both."""
        return list(dict.fromkeys(name for layer in self.layers for name in layer.tokens))


def write_statistics(statistics: RoutingStatistics, folder: str | Path, config: dict[str, Any]) -> list[Path]:
    """Writes statistics.json, with the `config` of the inspection, and statistics.npz to a folder; returns both files.

    The arrays are, for each layer NAME, "NAME/expert_class" (E, C), "NAME/expert_word" (E, W) and "NAME/words" (W,)
    texts, as far as there are any; "class_names" (C,).
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    json_file, array_file = folder / "statistics.json", folder / "statistics.npz"
    write_json(statistics_json(statistics, config), json_file)
    arrays: dict[str, np.ndarray] = {}
    if statistics.class_names is not None:
        arrays["class_names"] = np.array(statistics.class_names)
    for layer in statistics.layers:
        if layer.expert_class is not None:
            arrays[f"{layer.name}/expert_class"] = layer.expert_class
        if layer.expert_word:
            arrays[f"{layer.name}/expert_word"] = layer.word_table
            arrays[f"{layer.name}/words"] = np.array(list(layer.expert_word))
    with atomic_file(array_file) as temporary:
        np.savez_compressed(temporary, **arrays)
    return [json_file, array_file]


def statistics_json(statistics: RoutingStatistics, config: dict[str, Any]) -> dict[str, Any]:
    """What statistics.json holds: all but the large tables, of which it lists the most telling entries."""
    return {
        "checkpoint": statistics.checkpoint,
        "sha256": statistics.weights_fingerprint,
        "data": {
            "name": statistics.data,
            "fingerprint": statistics.data_fingerprint,
            "num_samples": statistics.num_samples,
            "num_skipped": statistics.num_skipped,
            "words_from": statistics.words_from,
        },
        "layers": [_layer_json(layer, statistics.class_names) for layer in statistics.layers],
        "agreement": {
            modality: [[None if math.isnan(value) else value for value in row] for row in matrix.tolist()]
            for modality, matrix in statistics.agreement.items()
        },
        "agreement_left_out": statistics.agreement_left_out,
        "config": config,
        "versions": statistics.versions,
    }


def _layer_json(layer: LayerStatistics, class_names: list[str] | None) -> dict[str, Any]:
    settings = ("name", "num_experts", "num_selected_experts", "router", "eval_capacity_factor", "capacity",
                "batch_priority")  # fmt: skip
    measures = ("tokens", "asked", "kept", "importance", "share_dropped", "entropy")
    modalities = {
        modality: {name: np.asarray(getattr(layer, name)[modality]).tolist() for name in measures}
        for modality in layer.tokens
    }
    tables = {}
    if layer.expert_class is not None and class_names is not None:
        tables["classes"] = (layer.expert_class, class_names)
    if layer.expert_word:
        tables["words"] = (layer.word_table, list(layer.expert_word))
    keys = ("name", "share_of_name", "share_of_expert")
    experts: list[dict[str, Any]] = []
    for e, patches in enumerate(layer.typical_patches):
        expert = {
            kind: [dict(zip(keys, entry, strict=True)) for entry in telling_of_expert(table, names, e, TELLING)]
            for kind, (table, names) in tables.items()
        }
        where = [{key: getattr(patch, key) for key in ("sample", "row", "column", "weight")} for patch in patches]
        experts.append({**expert, "typical_patches": where})
    return {**{name: getattr(layer, name) for name in settings}, "modalities": modalities, "experts": experts}
