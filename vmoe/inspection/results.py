"""What routing statistics hold.

Shapes, by suffix: E experts, K choices of a token (K = E where experts or slots choose), C classes, L sparse layers,
T words of a caption, H and W pixels of a picture.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass
class TypicalPatch:
    """A patch to which a layer gave one expert with a particularly large gate value.

    Attributes:
        sample: place of its picture in the data set.
        row: of the patch in the picture's grid, from the top, from 0.
        column: likewise, from the left.
        weight: the gate value, 0..1.
        pixels: (h, w, 3) uint8, the patch as the model saw it.
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
        eval_capacity_factor: that the layer ran with; None: every expert had room for all (top_k), or the capacity
            factor of training (expert_choice).
        batch_priority: whether the tokens with the largest gates went first.
        tokens: {modality: tokens seen}; only the modalities that the layer met.
        asked: {modality: (E,) assignments that asked for each expert}.
        kept: {modality: (E,) of these, how many had room}, the load.
        importance: {modality: (E,) sum of the tokens' gate values}.
        entropy: {modality: mean entropy of a token's gate, in nats; 0..log E}.
        share_dropped: {modality: share of the assignments (expert choice: of the tokens) that found no room, 0..1}.
        expert_class: (E, C) kept assignments of image tokens by the class of their picture; None without labels.
        expert_word: {word piece: (E,) kept assignments of it}; empty where the layer met no words.
        typical_patches: for each expert the patches with its largest gate values, largest first, at most one per
            picture; empty lists where the layer met no pictures.
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


@dataclass
class TokenRouting:
    """Where the tokens of one picture or one caption went in one layer.

    The leading axes are (rows, columns) of the grid for a picture, (T,) for a caption.

    Attributes:
        expert: (..., K) int, the chosen experts, best first (all E of them where experts or slots choose).
        weight: (..., K) float32 combine weights; 0 for an expert that passed the token over.
        kept: (..., K) bool, the expert had room (took the token).
    """

    expert: np.ndarray
    weight: np.ndarray
    kept: np.ndarray

    @property
    def best_kept(self) -> np.ndarray:
        """(...) int, the best-weighted chosen expert that had room for each token; -1: dropped by all of them."""
        place = self.kept.argmax(axis=-1)[..., None]
        expert = np.take_along_axis(self.expert, place, axis=-1)[..., 0]
        return np.where(self.kept.any(axis=-1), expert, -1)


@dataclass
class SampleRouting:
    """One picture, and its caption if there is one, with their routing in every layer.

    Attributes:
        image: (H, W, 3) uint8 as the model saw it.
        path: file of the picture, or another name of the sample.
        label: index of its class, or None.
        caption: its text, or None.
        words: T word pieces of the caption as the tokenizer cut it, its special ones included; [] without a caption.
        patches: for each layer of `RoutingStatistics.layers` the routing of the patches, (rows, columns, K);
            None for a layer that sees words only.
        text: for each layer the routing of the words, (T, K); None for a layer that sees pictures only; [] without
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
        num_samples: pictures that were read.
        num_skipped: unreadable ones that were left out.
        samples: `num_pictures` of them, spread evenly over the data.
        sample_index: their places in the data set.
        words_from: "captions" of the data, "class names", or None where no words were read.
        checkpoint: the model, as the user named it.
        weights_fingerprint: SHA-256 (hex) of its weights file.
        data: what the data set is, in words.
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
