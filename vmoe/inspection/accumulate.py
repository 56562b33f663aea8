"""Running sums over recorded routing.

Shapes, by suffix: B batch, T tokens of a modality, S real ones, P patches, E experts, K choices of a token.
"""

import bisect
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from vmoe.inspection.information import class_information, normalized_mutual_information
from vmoe.inspection.results import MEASURES, LayerStatistics, TokenRouting, TypicalPatch
from vmoe.moe import LayerRouting, SparseMoE

Decoder = Callable[[Sequence[int]], list[str]]  # ids of text tokens -> their texts


@dataclass
class ModalityTokens:
    """The tokens of one modality in one call of one layer, as arrays on the CPU."""

    real_BT: np.ndarray  # bool, False for padding
    gate_BTE: np.ndarray  # the gate's distribution
    expert_BTK: np.ndarray  # chosen experts, best first
    weight_BTK: np.ndarray  # combine weights
    asked_BTK: np.ndarray  # bool, the choice stood (some routers leave out choices themselves)
    kept_BTK: np.ndarray  # bool, the expert had capacity

    def routing(self, b: int, positions: np.ndarray | slice, shape: Sequence[int] = (-1,)) -> TokenRouting:
        """The routing of some tokens of row `b`, in an array of a shape."""
        arrays = (array[b][positions] for array in (self.expert_BTK, self.weight_BTK, self.kept_BTK))
        return TokenRouting(*(array.reshape(*shape, array.shape[-1]) for array in arrays))


def split_modalities(call: LayerRouting) -> dict[str, ModalityTokens]:
    """{modality: its tokens} of a call; ValueError: they do not have the same positions in every row.

    A token of an ensemble has the choices of all its copies, and the mean of their gates.
    """

    def array(tensor: Tensor) -> np.ndarray:
        tensor = tensor.detach().cpu()
        return (tensor.float() if tensor.is_floating_point() else tensor).numpy()

    chosen_GNK = call.routing.chosen_GNK
    asked_GNK = call.kept | True if chosen_GNK is None else chosen_GNK
    copies, choices = call.groups.ensemble_size, (call.expert_index, call.combine_weights, asked_GNK, call.kept)
    gate_BTE = call.by_image(call.gates).unflatten(-1, (copies, -1)).mean(2)
    tensors = (call.tokens(call.mask)[::copies], gate_BTE, *map(call.by_image, choices))
    arrays = [array(tensor) for tensor in tensors]
    if call.modality is None:
        return {call.modalities[0]: ModalityTokens(*arrays)}
    modality_BT = array(call.tokens(call.modality))
    if (modality_BT != modality_BT[:1]).any():
        raise ValueError("the tokens of a modality must have the same positions in every row of the batch")
    positions = {name: np.flatnonzero(modality_BT[0] == m) for m, name in enumerate(call.modalities)}
    return {name: ModalityTokens(*(a[:, own] for a in arrays)) for name, own in positions.items() if len(own)}


class LayerSums:
    """Sums of one sparse layer as it is set now, in float64; `finish` makes statistics of them.

    `num_classes` is None without labels; `num_patches` typical patches are kept for each expert.
    """

    def __init__(
        self, name: str, layer: SparseMoE, num_classes: int | None, num_patches: int, decode: Decoder | None
    ) -> None:
        E, self.per_token, self.soft = layer.num_experts, layer.per_token, layer.soft
        self.statistics = LayerStatistics(
            name=name,
            num_experts=E,
            num_selected_experts=layer.num_selected_experts if self.per_token else E,
            router=layer.router_type,
            **{name: getattr(layer, name) for name in ("eval_capacity_factor", "batch_priority", "capacity")},
            **{name: {} for name in MEASURES},
            expert_class=None if num_classes is None else np.zeros((E, num_classes)),
            typical_patches=[[] for _ in range(E)],
        )
        self.num_patches, self.decode = num_patches, decode
        self.images: list[tuple[np.ndarray, np.ndarray]] = []  # of each batch, assignments (B, E) and labels (B,)

    def add(
        self, modality: str, tokens: ModalityTokens, label_B: np.ndarray | None = None, ids_BT: np.ndarray | None = None
    ) -> np.ndarray:
        """Adds the tokens of a call, those of images by their labels and those of texts by their ids.

        Returns (B, T, E) float64: 1 where an expert took a token; for soft routing the combine weight; 0 for padding.
        """
        sums, real_BT = self.statistics, tokens.real_BT
        gate_SE = tokens.gate_BTE[real_BT].astype(float)
        done_BTE = np.zeros(tokens.gate_BTE.shape)
        done_BTK = tokens.weight_BTK if self.soft else tokens.kept_BTK
        np.put_along_axis(done_BTE, tokens.expert_BTK, done_BTK.astype(float), axis=-1)
        done_BTE[~real_BT] = 0
        kept_E = asked_E = done_BTE.sum((0, 1))
        if self.per_token:
            asked_BTK = tokens.asked_BTK & real_BT[..., None]
            asked_E = np.bincount(tokens.expert_BTK[asked_BTK], minlength=sums.num_experts)
        logs_SE = np.log(gate_SE, out=np.zeros_like(gate_SE), where=gate_SE > 0)
        unused, entropy = int((~done_BTE.any(-1) & real_BT).sum()), -float((gate_SE * logs_SE).sum())
        # Sums until `finish`; of `share_dropped` that of the tokens without an expert.
        added = (len(gate_SE), asked_E, kept_E, gate_SE.sum(0), unused, entropy)
        for name, value in zip(MEASURES, added, strict=True):
            table = getattr(sums, name)
            table[modality] = table.get(modality, 0) + value
        if label_B is not None and sums.expert_class is not None:
            np.add.at(sums.expert_class.T, label_B, done_BTE.sum(1))
            self.images.append((done_BTE.sum(1).astype(np.float32), label_B))
        if ids_BT is not None:
            ids_U, index_S = np.unique(ids_BT[real_BT], return_inverse=True)
            done_UE = np.zeros((len(ids_U), sums.num_experts))
            np.add.at(done_UE, index_S, done_BTE[real_BT])
            for text, done_E in zip(self.decode(ids_U.tolist()), done_UE, strict=True):  # two ids may read the same
                sums.expert_token[text] = sums.expert_token.get(text, 0) + done_E
        return done_BTE

    def add_patches(
        self, done_BPE: np.ndarray, gate_BPE: np.ndarray, grid: tuple[int, int], index_B: np.ndarray, pixels_BHWC
    ) -> None:
        """Keeps typical patches: of each image, for each expert, the patch with the largest gate value.

        `done_BPE` is what `add` gave, of the patches of the grid (rows, columns); `index_B` are the images' indices.
        """
        if not self.num_patches:
            return
        h, w = pixels_BHWC.shape[1] // grid[0], pixels_BHWC.shape[2] // grid[1]
        value_BPE = np.where(done_BPE > 0, gate_BPE, 0)
        best_BE, value_BE = value_BPE.argmax(1), value_BPE.max(1)
        for expert, found in enumerate(self.statistics.typical_patches):
            for b in np.flatnonzero(value_BE[:, expert]).tolist():
                value, index = float(value_BE[b, expert]), int(index_B[b])
                if len(found) == self.num_patches and (-value, index) > _order(found[-1]):
                    continue
                row, column = divmod(int(best_BE[b, expert]), grid[1])
                pixels = pixels_BHWC[b, row * h : (row + 1) * h, column * w : (column + 1) * w].copy()
                bisect.insort(found, TypicalPatch(index, row, column, value, pixels), key=_order)
                del found[self.num_patches :]

    def finish(self) -> LayerStatistics:
        """The statistics; call it once."""
        sums = self.statistics
        for modality, tokens in sums.tokens.items():
            sums.entropy[modality] /= max(1, tokens)
            sums.share_dropped[modality] /= max(1, tokens)
            if self.per_token:
                asked, kept = sums.asked[modality].sum(), sums.kept[modality].sum()
                sums.share_dropped[modality] = float(1 - kept / max(1, asked))
        if "image" not in sums.tokens:
            sums.expert_class = None
        if self.images:
            count_NE, label_N = (np.concatenate(parts) for parts in zip(*self.images))
            sums.class_information = class_information(count_NE, label_N, sums.expert_class.shape[1])
        if not self.soft:  # counts
            for table in (sums.asked, sums.kept, sums.expert_token):
                table.update({key: counts.round().astype(np.int64) for key, counts in table.items()})
            if sums.expert_class is not None:
                sums.expert_class = sums.expert_class.round().astype(np.int64)
        return sums


def _order(patch: TypicalPatch) -> tuple[float, int]:
    return -patch.weight, patch.sample


class Agreement:
    """How far two layers sort the tokens of a modality into the same groups; `num_experts` is {layer name: E}.

    Counts, for each pair of layers, the tokens by their two first choices (the expert with the largest gate, with or
    without capacity). Layers that see other tokens than the first one cannot be compared with it.
    """

    def __init__(self, num_experts: dict[str, int]) -> None:
        self.num_experts = num_experts
        self.tables: dict[str, dict[tuple[int, int], np.ndarray]] = {}  # {modality: {indices of two layers: counts}}

    def add(self, modality: str, layers: dict[str, ModalityTokens]) -> None:
        """Adds the tokens of one pass."""
        seen = [(i, E, layers[name]) for i, (name, E) in enumerate(self.num_experts.items()) if name in layers]
        real_BT, tables = seen[0][2].real_BT, self.tables.setdefault(modality, {})
        first = [(i, E, own.expert_BTK[..., 0][real_BT]) for i, E, own in seen if own.real_BT.shape == real_BT.shape]
        for (i, E, one), (j, F, other) in itertools.combinations_with_replacement(first, 2):
            np.add.at(tables.setdefault((i, j), np.zeros((E, F), int)), (one, other), 1)

    def matrices(self) -> dict[str, np.ndarray]:
        """{modality: (L, L) normalised mutual information, NaN where a layer lacks the modality or is not compared}."""
        size = len(self.num_experts)
        result = {modality: np.full((size, size), np.nan) for modality in self.tables}
        for modality, tables in self.tables.items():
            for (i, j), table in tables.items():
                result[modality][[i, j], [j, i]] = normalized_mutual_information(table)
        return result
