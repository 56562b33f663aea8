"""Running sums over recorded routing: what `gather_statistics` keeps while it streams over the data.

Shapes, by suffix: B batch, T tokens of one modality, S real tokens among them, E experts, K choices, C classes.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
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
        kept_BTK: bool, the expert had room.
    """

    real_BT: np.ndarray
    gate_BTE: np.ndarray
    expert_BTK: np.ndarray
    weight_BTK: np.ndarray
    asked_BTK: np.ndarray
    kept_BTK: np.ndarray

    @property
    def load_BTE(self) -> np.ndarray:
        """Float64, 1 where the expert had room for the token, else 0."""
        load_BTE = np.zeros(self.gate_BTE.shape)
        np.put_along_axis(load_BTE, self.expert_BTK, self.kept_BTK.astype(float), axis=-1)
        return load_BTE

    @property
    def weights_BTE(self) -> np.ndarray:
        """Float64 combine weights, 0 for experts that were not chosen."""
        weights_BTE = np.zeros(self.gate_BTE.shape)
        np.put_along_axis(weights_BTE, self.expert_BTK, self.weight_BTK.astype(float), axis=-1)
        return weights_BTE


def split_modalities(call: LayerRouting) -> dict[str, ModalityTokens]:
    """{modality: its tokens} of a call; those that it has.

    Raises:
        ValueError: the modalities do not lie in the same places in every row.
    """
    routing = call.routing
    grouped = {
        "real_BT": call.mask,
        "gate_BTE": call.gates,
        "expert_BTK": call.expert_index,
        "weight_BTK": call.combine_weights,
        "asked_BTK": call.kept | True if routing.chosen_GNK is None else routing.chosen_GNK,
        "kept_BTK": call.kept,
    }
    arrays = {name: _array(call.tokens(tensor)) for name, tensor in grouped.items()}
    if call.modality is None:
        return {call.modalities[0]: ModalityTokens(**arrays)}
    modality_BT = _array(call.tokens(call.modality))
    if (modality_BT != modality_BT[:1]).any():
        raise ValueError("the tokens of a modality must lie in the same places in every row of the batch")
    places = {name: np.flatnonzero(modality_BT[0] == m) for m, name in enumerate(call.modalities)}
    return {
        name: ModalityTokens(**{key: array[:, own] for key, array in arrays.items()})
        for name, own in places.items()
        if len(own)
    }


def _array(tensor: Tensor) -> np.ndarray:
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()


class LayerSums:
    """Running sums of one sparse layer, in float64.

    Args:
        layer: the layer.
        num_classes: C, or None without labels.
        num_patches: typical patches to keep for each expert.

    Attributes:
        tokens: {modality: tokens seen}.
        asked: {modality: (E,)}, as in `LayerStatistics`.
        kept: {modality: (E,)}.
        importance: {modality: (E,)}.
        expert_class: (E, C) or None.
        expert_word: {token id: (E,)}.
    """

    def __init__(self, layer: SparseMoE, num_classes: int | None, num_patches: int) -> None:
        self.router = layer.router_type
        self.num_experts = E = layer.num_experts
        self.num_patches = num_patches
        self.tokens: dict[str, int] = {}
        self.asked: dict[str, np.ndarray] = {}
        self.kept: dict[str, np.ndarray] = {}
        self.importance: dict[str, np.ndarray] = {}
        self.expert_class = None if num_classes is None else np.zeros((E, num_classes))
        self.expert_word: dict[int, np.ndarray] = {}
        self._entropy: dict[str, float] = {}
        self._without_expert: dict[str, int] = {}
        # For each expert a heap of (gate value, -place in the data, row, column, pixels), the least typical first.
        self._typical: list[list[tuple[float, int, int, int, np.ndarray]]] = [[] for _ in range(E)]

    def add(self, modality: str, tokens: ModalityTokens) -> np.ndarray:
        """Adds the tokens of a call.

        Returns:
            (B, T, E) float64, how much each expert did for each token: 1 for one that had room; for soft routing, the
            combine weight; 0 for padding.
        """
        E, real_BT = self.num_experts, tokens.real_BT
        gate_SE = tokens.gate_BTE[real_BT].astype(float)
        done_BTE = tokens.weights_BTE if self.router == "soft" else tokens.load_BTE
        done_BTE[~real_BT] = 0
        kept_E = done_BTE.sum((0, 1))
        asked_E = kept_E
        if self.router == "top_k":
            asked_BTK = tokens.asked_BTK & real_BT[..., None]
            asked_E = np.bincount(tokens.expert_BTK[asked_BTK], minlength=E)
        for sums, new_E in ((self.asked, asked_E), (self.kept, kept_E), (self.importance, gate_SE.sum(0))):
            sums[modality] = sums.get(modality, np.zeros(E)) + new_E
        self.tokens[modality] = self.tokens.get(modality, 0) + len(gate_SE)
        logs_SE = np.log(gate_SE, out=np.zeros_like(gate_SE), where=gate_SE > 0)
        self._entropy[modality] = self._entropy.get(modality, 0.0) - float((gate_SE * logs_SE).sum())
        nobody = int((~done_BTE.any(-1) & real_BT).sum())
        self._without_expert[modality] = self._without_expert.get(modality, 0) + nobody
        return done_BTE

    def add_classes(self, done_BTE: np.ndarray, label_B: np.ndarray) -> None:
        """Counts the image tokens by the class of their picture."""
        np.add.at(self.expert_class.T, label_B, done_BTE.sum(1))

    def add_words(self, done_BTE: np.ndarray, real_BT: np.ndarray, ids_BT: np.ndarray) -> None:
        """Counts the words by their token id."""
        ids_U, place_S = np.unique(ids_BT[real_BT], return_inverse=True)
        done_UE = np.zeros((len(ids_U), self.num_experts))
        np.add.at(done_UE, place_S, done_BTE[real_BT])
        for word, done_E in zip(ids_U.tolist(), done_UE, strict=True):
            self.expert_word[word] = self.expert_word.get(word, 0) + done_E

    def add_patches(
        self,
        done_BPE: np.ndarray,
        gate_BPE: np.ndarray,
        columns: int,
        index_B: np.ndarray,
        pixels: Callable[[int, int, int], np.ndarray],
    ) -> None:
        """Looks for typical patches: of each picture, for each expert, the patch with the largest gate value.

        Args:
            done_BPE: what `add` gave, of the P patches of the grid.
            gate_BPE: the gate's distribution.
            columns: of the grid.
            index_B: places of the pictures in the data set.
            pixels: (place in the batch, row, column) -> (h, w, 3) uint8.
        """
        if not self.num_patches:
            return
        value_BPE = np.where(done_BPE > 0, gate_BPE, 0)
        best_BE = value_BPE.argmax(1)
        value_BE = np.take_along_axis(value_BPE, best_BE[:, None], 1)[:, 0]
        for expert, heap in enumerate(self._typical):
            for b in np.flatnonzero(value_BE[:, expert]).tolist():
                key = (float(value_BE[b, expert]), -int(index_B[b]))
                if len(heap) == self.num_patches and key < heap[0][:2]:
                    continue
                row, column = divmod(int(best_BE[b, expert]), columns)
                heapq.heappush(heap, (*key, row, column, pixels(b, row, column)))
                if len(heap) > self.num_patches:
                    heapq.heappop(heap)

    @property
    def typical(self) -> list[list[tuple[float, int, int, int, np.ndarray]]]:
        """For each expert [(gate value, place in the data set, row, column, pixels)], the largest value first."""
        ordered = [sorted(heap, key=lambda entry: (-entry[0], -entry[1])) for heap in self._typical]
        return [[(value, -place, *rest) for value, place, *rest in heap] for heap in ordered]

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

    Counts, for each pair of layers, the tokens by their two first choices (the expert with the largest gate, whether or
    not it had room). Layers that do not see the same tokens as the first one (a tower that merges or leaves out some)
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
        place = {name: i for i, name in enumerate(self.num_experts)}
        result = {}
        for modality, tables in self.tables.items():
            matrix = np.full((len(place), len(place)), np.nan)
            for (one, other), table in tables.items():
                i, j = place[one], place[other]
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
    p_A, p_B = p_AB.sum(1), p_AB.sum(0)
    entropies = _entropy(p_A) + _entropy(p_B)
    if entropies == 0:
        return 1.0
    return float(np.clip(2 * (entropies - _entropy(p_AB)) / entropies, 0, 1))


def _entropy(p: np.ndarray) -> float:
    p = p[p > 0]
    return float(-(p * np.log(p)).sum())
