"""Running sums over recorded routing, and the mutual information of two groupings.

Shapes, by suffix: B batch, T tokens of one modality, S real tokens among them, P patches, E experts, K choices of a
token, C classes.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from vmoe.moe import LayerRouting, SparseMoE


@dataclass
class ModalityTokens:
    """The tokens of one modality in one call of one layer, as arrays on the CPU.

    Attributes:
        real_BT: bool, False for padding.
        gate_BTE: the gate's distribution.
        expert_BTK: chosen experts, best first.
        weight_BTK: combine weights.
        asked_BTK: bool, the choice stood (some routers leave out choices themselves).
        kept_BTK: bool, the expert had capacity.
    """

    real_BT: np.ndarray
    gate_BTE: np.ndarray
    expert_BTK: np.ndarray
    weight_BTK: np.ndarray
    asked_BTK: np.ndarray
    kept_BTK: np.ndarray

    def by_expert(self, values_BTK: np.ndarray) -> np.ndarray:
        """(B, T, E) float64: a value of each choice at its expert, 0 elsewhere."""
        values_BTE = np.zeros(self.gate_BTE.shape)
        np.put_along_axis(values_BTE, self.expert_BTK, values_BTK.astype(float), axis=-1)
        return values_BTE


def split_modalities(call: LayerRouting) -> dict[str, ModalityTokens]:
    """{modality: its tokens} of a call; those that it has.

    Raises:
        ValueError: the modalities do not have the same positions in every row.
    """

    def array(tensor: Tensor) -> np.ndarray:
        tensor = call.tokens(tensor).detach().cpu()
        return (tensor.float() if tensor.is_floating_point() else tensor).numpy()

    chosen_GNK = call.routing.chosen_GNK
    asked_GNK = call.kept | True if chosen_GNK is None else chosen_GNK
    grouped = (call.mask, call.gates, call.expert_index, call.combine_weights, asked_GNK, call.kept)
    arrays = [array(tensor) for tensor in grouped]
    if call.modality is None:
        return {call.modalities[0]: ModalityTokens(*arrays)}
    modality_BT = array(call.modality)
    if (modality_BT != modality_BT[:1]).any():
        raise ValueError("the tokens of a modality must have the same positions in every row of the batch")
    positions = {name: np.flatnonzero(modality_BT[0] == m) for m, name in enumerate(call.modalities)}
    return {name: ModalityTokens(*(a[:, own] for a in arrays)) for name, own in positions.items() if len(own)}


class LayerSums:
    """Running sums of one sparse layer, in float64.

    Args:
        layer: the layer.
        num_classes: C, or None without labels.
        num_patches: typical patches to keep for each expert.

    Attributes:
        tokens, asked, kept, importance, expert_class, typical: as in `LayerStatistics`.
        expert_word: {token id: (E,)}.
    """

    def __init__(self, layer: SparseMoE, num_classes: int | None, num_patches: int) -> None:
        self.router = layer.router_type
        self.num_experts = E = layer.num_experts
        self.num_patches = num_patches
        self.tokens: dict[str, int] = defaultdict(int)
        self.asked, self.kept, self.importance = (defaultdict(lambda: np.zeros(E)) for _ in range(3))
        self.expert_class = None if num_classes is None else np.zeros((E, num_classes))
        self.expert_word: dict[int, np.ndarray] = defaultdict(lambda: np.zeros(E))
        self._entropy: dict[str, float] = defaultdict(float)
        self._without_expert: dict[str, int] = defaultdict(int)
        # For each expert a heap of (gate value, -index in the data, row, column, pixels), the least typical first.
        self._typical: list[list[tuple[float, int, int, int, np.ndarray]]] = [[] for _ in range(E)]

    def add(self, modality: str, tokens: ModalityTokens) -> np.ndarray:
        """Adds the tokens of a call.

        Returns:
            (B, T, E) float64, how much each expert did for each token: 1 if it took the token; for soft routing, the
            combine weight; 0 for padding.
        """
        real_BT = tokens.real_BT
        gate_SE = tokens.gate_BTE[real_BT].astype(float)
        done_BTE = tokens.by_expert(tokens.weight_BTK if self.router == "soft" else tokens.kept_BTK)
        done_BTE[~real_BT] = 0
        kept_E = asked_E = done_BTE.sum((0, 1))
        if self.router == "top_k":
            asked_BTK = tokens.asked_BTK & real_BT[..., None]
            asked_E = np.bincount(tokens.expert_BTK[asked_BTK], minlength=self.num_experts)
        self.asked[modality] += asked_E
        self.kept[modality] += kept_E
        self.importance[modality] += gate_SE.sum(0)
        self.tokens[modality] += len(gate_SE)
        logs_SE = np.log(gate_SE, out=np.zeros_like(gate_SE), where=gate_SE > 0)
        self._entropy[modality] -= float((gate_SE * logs_SE).sum())
        self._without_expert[modality] += int((~done_BTE.any(-1) & real_BT).sum())
        return done_BTE

    def add_classes(self, done_BTE: np.ndarray, label_B: np.ndarray) -> None:
        """Counts the image tokens by the class of their image."""
        np.add.at(self.expert_class.T, label_B, done_BTE.sum(1))

    def add_words(self, done_BTE: np.ndarray, real_BT: np.ndarray, ids_BT: np.ndarray) -> None:
        """Counts the text tokens by their id."""
        ids_U, index_S = np.unique(ids_BT[real_BT], return_inverse=True)
        done_UE = np.zeros((len(ids_U), self.num_experts))
        np.add.at(done_UE, index_S, done_BTE[real_BT])
        for word, done_E in zip(ids_U.tolist(), done_UE, strict=True):
            self.expert_word[word] += done_E

    def add_patches(
        self, done_BPE: np.ndarray, gate_BPE: np.ndarray, grid: tuple[int, int], index_B: np.ndarray, pixels_BHWC
    ) -> None:
        """Looks for typical patches: of each image, for each expert, the patch with the largest gate value.

        Args:
            done_BPE: what `add` gave, of the patches of the grid.
            gate_BPE: the gate's distribution.
            grid: (rows, columns).
            index_B: indices of the images in the data set.
            pixels_BHWC: the images, uint8.
        """
        if not self.num_patches:
            return
        h, w = pixels_BHWC.shape[1] // grid[0], pixels_BHWC.shape[2] // grid[1]
        value_BPE = np.where(done_BPE > 0, gate_BPE, 0)
        best_BE, value_BE = value_BPE.argmax(1), value_BPE.max(1)
        for expert, heap in enumerate(self._typical):
            for b in np.flatnonzero(value_BE[:, expert]).tolist():
                key = (float(value_BE[b, expert]), -int(index_B[b]))
                if len(heap) == self.num_patches and key < heap[0][:2]:
                    continue
                row, column = divmod(int(best_BE[b, expert]), grid[1])
                pixels = pixels_BHWC[b, row * h : (row + 1) * h, column * w : (column + 1) * w].copy()
                heapq.heappush(heap, (*key, row, column, pixels))
                if len(heap) > self.num_patches:
                    heapq.heappop(heap)

    @property
    def typical(self) -> list[list[tuple[int, int, int, float, np.ndarray]]]:
        """For each expert [(index in the data set, row, column, gate value, pixels)], the largest value first."""
        ordered = [sorted(heap, key=lambda entry: (-entry[0], -entry[1])) for heap in self._typical]
        return [[(-index, row, column, value, pixels) for value, index, row, column, pixels in own] for own in ordered]

    @property
    def entropy(self) -> dict[str, float]:
        """{modality: mean entropy of the gate, nats}."""
        return {name: total / max(1, self.tokens[name]) for name, total in self._entropy.items()}

    @property
    def share_dropped(self) -> dict[str, float]:
        """{modality: share of the assignments dropped; of the tokens, where experts choose}."""
        if self.router != "top_k":
            return {name: self._without_expert[name] / max(1, tokens) for name, tokens in self.tokens.items()}
        return {name: float(1 - self.kept[name].sum() / max(1, asked.sum())) for name, asked in self.asked.items()}


class Agreement:
    """How far two layers sort the tokens of a modality into the same groups.

    Counts, for each pair of layers, the tokens by their two first choices (the expert with the largest gate, with or
    without capacity). Layers that do not see the same tokens as the first one (a tower that merges or leaves out some)
    cannot be compared with it.

    Args:
        num_experts: {layer name: E}, in the order of the model.
    """

    def __init__(self, num_experts: dict[str, int]) -> None:
        self.num_experts = num_experts
        self.tables: dict[str, dict[tuple[str, str], np.ndarray]] = {}
        self.left_out: dict[str, list[str]] = {}  # {modality: layers that see other tokens than the first}

    def add(self, modality: str, layers: dict[str, ModalityTokens]) -> None:
        """Adds the tokens of one pass; layers that see other tokens than the first one go to `left_out`."""
        tables = self.tables.setdefault(modality, {})
        names = [name for name in self.num_experts if name in layers]
        real_BT = layers[names[0]].real_BT
        others = [name for name in names if layers[name].real_BT.shape != real_BT.shape]
        if others:
            self.left_out[modality] = list(dict.fromkeys([*self.left_out.get(modality, []), *others]))
        names = [name for name in names if name not in others]
        first = {name: layers[name].expert_BTK[..., 0][real_BT] for name in names}
        for i, one in enumerate(names):
            for other in names[i:]:
                shape = (self.num_experts[one], self.num_experts[other])
                pairs = np.ravel_multi_index((first[one], first[other]), shape)
                counts = np.bincount(pairs, minlength=shape[0] * shape[1]).reshape(shape)
                tables[one, other] = tables.get((one, other), 0) + counts

    def matrices(self) -> dict[str, np.ndarray]:
        """{modality: (L, L) normalised mutual information, NaN where a layer lacks the modality or was left out}."""
        index = {name: i for i, name in enumerate(self.num_experts)}
        result = {}
        for modality, tables in self.tables.items():
            matrix = np.full((len(index), len(index)), np.nan)
            for (one, other), table in tables.items():
                i, j = index[one], index[other]
                matrix[i, j] = matrix[j, i] = normalized_mutual_information(table)
            result[modality] = matrix
        return result


def normalized_mutual_information(table: np.ndarray) -> float:
    """I(A; B) / ((H(A) + H(B)) / 2) of a contingency table of two groupings; 0..1.

    1 if they are equal but for the names of the groups (also if both put all into one group), 0 if independent.

    Source: Vinh, Epps and Bailey, "Information Theoretic Measures for Clusterings Comparison", JMLR 11 (2010),
    where it is called NMI_sum.
    """
    p_AB = table / table.sum()
    entropies = sum(-(p * np.log(p, out=np.zeros_like(p), where=p > 0)).sum() for p in (p_AB.sum(1), p_AB.sum(0)))
    return 1.0 if entropies == 0 else float(np.clip(2 * contributions(table).sum() / entropies, 0, 1))


def contributions(table_EC: np.ndarray) -> np.ndarray:
    """How much each pair of expert and class adds to their mutual information, in nats.

    p(e, c) · log(p(e, c) / (p(e) p(c))): large where an expert gets much more of a class than its share, and the class
    is not rare. The sum over all pairs is the mutual information of expert and class.

    Args:
        table_EC: counts, (E, C).
    """
    p_EC = table_EC / max(1, table_EC.sum())
    even_EC = p_EC.sum(1, keepdims=True) * p_EC.sum(0, keepdims=True)
    ratio_EC = np.divide(p_EC, even_EC, out=np.ones_like(p_EC), where=p_EC > 0)
    return p_EC * np.log(ratio_EC)


def most_telling(table_EC: np.ndarray, count: int) -> list[int]:
    """The `count` columns that add most to the mutual information, those of one expert side by side.

    Args:
        table_EC: counts, (E, C).
        count: most columns to return; those without counts are left out.
    """
    total_C = contributions(table_EC).sum(0)
    order = np.lexsort((-table_EC.sum(0), -total_C.round(12)))  # equal ones: the more frequent first
    chosen = [int(c) for c in order[:count] if table_EC[:, c].sum() > 0]
    shares_EC = table_EC / np.maximum(table_EC.sum(0), 1)
    return sorted(chosen, key=lambda c: (shares_EC[:, c].argmax(), -shares_EC[:, c].max()))


def telling_of_expert(
    table_EC: np.ndarray, names: list[str], expert: int, count: int
) -> list[tuple[str, float, float]]:
    """At most `count` names that an expert gets more of than its share, those that add most information first.

    Returns:
        [(name, share of the name's tokens that go to this expert, share of the expert's tokens that have the name)].
    """
    own_C = contributions(table_EC)[expert]
    order = [c for c in np.argsort(-own_C, kind="stable")[:count].tolist() if own_C[c] > 0]
    of_name_C, of_expert = table_EC.sum(0), table_EC[expert].sum()
    return [
        (names[c], float(table_EC[expert, c] / of_name_C[c]), float(table_EC[expert, c] / of_expert)) for c in order
    ]
