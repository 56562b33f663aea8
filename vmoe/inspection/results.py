"""Routing statistics: what they hold, and their files.

Shapes: E experts, K choices of a token (E where experts or slots choose), C classes, L sparse layers, T text tokens.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vmoe.evaluation.results_file import write_json
from vmoe.inspection.information import most_informative
from vmoe.utils.files import atomic_file

MAX_INFORMATIVE = 10  # classes and text tokens listed for each expert
# Fields of `LayerStatistics`: what the layer is; what was measured, each {modality: value}.
SETTINGS = ("name", "num_experts", "num_selected_experts", "router", "eval_capacity_factor", "capacity")
SETTINGS += ("batch_priority",)
MEASURES = ("tokens", "asked", "kept", "importance", "share_dropped", "entropy")


def evenly_spaced(length: int, count: int) -> list[int]:
    """At most `count` indices of a list, evenly spaced."""
    return np.linspace(0, length - 1, min(count, length)).round().astype(int).tolist()


@dataclass
class TypicalPatch:
    """A patch whose gate value (`weight`, 0..1) for an expert is large."""

    sample: int  # index of its image in the data set
    row: int  # from 0, from the upper left
    column: int
    weight: float
    pixels: np.ndarray  # (h, w, 3) uint8, as the model saw it


@dataclass
class LayerStatistics:
    """What one sparse layer did with all tokens of the data; padding is never counted.

    Soft routing has sums of combine weights for assignments, and drops nothing. In expert choice `asked` equals `kept`,
    and dropped are the tokens that no expert took.
    """

    name: str  # such as "blocks.1.mlp"
    num_experts: int  # E
    num_selected_experts: int  # experts that each token chooses; E where experts or slots choose
    router: str  # its name in `vmoe.moe.layer.ROUTERS`
    eval_capacity_factor: float | None  # of this run; None: no limit (top_k), or the factor of training (expert_choice)
    batch_priority: bool  # whether the tokens with the largest gates went first
    tokens: dict[str, int]  # {modality: tokens seen}; only the modalities that the layer met
    asked: dict[str, np.ndarray]  # {modality: (E,) assignments that asked for each expert}
    kept: dict[str, np.ndarray]  # {modality: (E,) of these, how many were kept}, the load
    importance: dict[str, np.ndarray]  # {modality: (E,) sum of the tokens' gate values}
    entropy: dict[str, float]  # {modality: mean entropy of a token's gate, in nats; 0..log E}
    share_dropped: dict[str, float]  # {modality: share of the assignments (expert choice: of the tokens) dropped, 0..1}
    expert_class: np.ndarray | None = None  # (E, C) kept assignments of image tokens by the class of their image
    class_information: dict[str, float | int] | None = None  # see `vmoe.inspection.information.class_information`
    expert_token: dict[str, np.ndarray] = field(default_factory=dict)  # {text token: (E,) kept assignments of it}
    typical_patches: list[list[TypicalPatch]] = field(default_factory=list)  # of each expert, largest gate value first
    capacity: int | None = None  # a fixed number of rows that each expert takes from a group; overrides the factor

    @property
    def settings(self) -> dict[str, Any]:
        """What the layer is, by the names in `SETTINGS`."""
        return {name: getattr(self, name) for name in SETTINGS}

    @property
    def token_table(self) -> np.ndarray:
        """(E, T) of all text tokens."""
        return np.stack(list(self.expert_token.values()), axis=1)


@dataclass
class TokenRouting:
    """Where the tokens of one image, (rows, columns), or of one text, (T,), went in one layer."""

    expert: np.ndarray  # (..., K) int, the chosen experts, best first (all E of them where experts or slots choose)
    weight: np.ndarray  # (..., K) float32 combine weights; 0 for an expert that did not take the token
    kept: np.ndarray  # (..., K) bool, the expert took the token

    @property
    def best_kept(self) -> np.ndarray:
        """(...) int, the best-weighted chosen expert that took each token; -1: dropped by all of them."""
        first = self.kept.argmax(axis=-1)[..., None]
        expert = np.take_along_axis(self.expert, first, axis=-1)[..., 0]
        return np.where(self.kept.any(axis=-1), expert, -1)


@dataclass
class SampleRouting:
    """One image, and its caption if there is one, with their routing in every layer."""

    image: np.ndarray  # (H, W, 3) uint8, as the model saw it
    path: str  # file of the image, or another name of the sample
    label: int | None  # index of its class
    caption: str | None
    text_tokens: list[str]  # T tokens of the caption, the special ones included; [] without a caption
    patches: list[TokenRouting | None]  # of each layer, (rows, columns, K); None for a layer that sees text only
    text: list[TokenRouting | None]  # of each layer, (T, K); None for one that sees images only; [] without a caption
    top_classes: list[tuple[str, float]]  # the model's likeliest names with their probabilities, likeliest first
    # Their indices among the data's classes, to compare with `label` (two names may be alike); [] if they are none.
    top_labels: list[int] = field(default_factory=list)


@dataclass
class RoutingStatistics:
    """What the experts of a model did with a data set."""

    layers: list[LayerStatistics]  # in the order of the model
    # {modality: (L, L) normalised mutual information of two layers' first choices, 0..1}; NaN where there is none.
    agreement: dict[str, np.ndarray]
    class_names: list[str] | None
    num_samples: int  # images that were read
    num_skipped: int  # unreadable ones
    samples: list[SampleRouting]  # `num_images` of them, evenly spaced in the data
    sample_index: list[int]  # their indices in the data set
    texts_from: str | None  # "captions" of the data, "class names", or None where no text was read
    checkpoint: str  # as the user named it
    weights_fingerprint: str  # SHA-256 (hex) of the weights file
    data: str  # the data set in short
    data_fingerprint: str  # SHA-256 (hex) of what is in it
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def modalities(self) -> list[str]:
        """Names of the modalities that some layer met: "image", "text" or both."""
        return list(dict.fromkeys(name for layer in self.layers for name in layer.tokens))


def write_statistics(statistics: RoutingStatistics, folder: str | Path, config: dict[str, Any]) -> list[Path]:
    """Writes statistics.json, with the `config` of the inspection, and statistics.npz to a folder; returns both files.

    The arrays: "class_names" (C,); of each layer NAME "NAME/expert_class" (E, C), "NAME/expert_token" (E, T) and
    "NAME/text_tokens" (T,), as far as there are any.
    """
    json_file, array_file = Path(folder, "statistics.json"), Path(folder, "statistics.npz")
    write_json(_statistics_json(statistics, config), json_file)
    arrays = {} if statistics.class_names is None else {"class_names": np.array(statistics.class_names)}
    for layer in statistics.layers:
        if layer.expert_class is not None:
            arrays[f"{layer.name}/expert_class"] = layer.expert_class
        if layer.expert_token:
            arrays[f"{layer.name}/expert_token"] = layer.token_table
            arrays[f"{layer.name}/text_tokens"] = np.array(list(layer.expert_token))
    with atomic_file(array_file) as temporary:
        np.savez_compressed(temporary, **arrays)
    return [json_file, array_file]


def _statistics_json(statistics: RoutingStatistics, config: dict[str, Any]) -> dict[str, Any]:
    """All but the large tables, of which it lists the most informative entries."""
    return {
        "checkpoint": statistics.checkpoint,
        "sha256": statistics.weights_fingerprint,
        "data": {
            "name": statistics.data,
            "fingerprint": statistics.data_fingerprint,
            "num_samples": statistics.num_samples,
            "num_skipped": statistics.num_skipped,
            "texts_from": statistics.texts_from,
        },
        "layers": [_layer_json(layer, statistics.class_names) for layer in statistics.layers],
        "agreement": {name: np.where(np.isnan(one), None, one).tolist() for name, one in statistics.agreement.items()},
        "config": config,
        "versions": statistics.versions,
    }


def _layer_json(layer: LayerStatistics, class_names: list[str] | None) -> dict[str, Any]:
    modalities = {
        modality: {name: np.asarray(getattr(layer, name)[modality]).tolist() for name in MEASURES}
        for modality in layer.tokens
    }
    tables = {}
    if layer.expert_class is not None and class_names is not None:
        tables["classes"] = (layer.expert_class, class_names)
    if layer.expert_token:
        tables["text_tokens"] = (layer.token_table, list(layer.expert_token))
    experts = []
    for e, patches in enumerate(layer.typical_patches):
        informative = {kind: most_informative(*table, e, MAX_INFORMATIVE) for kind, table in tables.items()}
        where = [{key: getattr(patch, key) for key in ("sample", "row", "column", "weight")} for patch in patches]
        experts.append({**informative, "typical_patches": where})
    information = {"class_information": layer.class_information}
    return {**layer.settings, "modalities": modalities, **information, "experts": experts}
