"""Routing statistics as files: statistics.json for what people read, statistics.npz for the large tables."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from vmoe.evaluation.results_file import write_json
from vmoe.inspection.mutual_information import telling_of_expert
from vmoe.inspection.results import LayerStatistics, RoutingStatistics
from vmoe.utils.atomic import whole_file

TELLING = 10  # classes and words listed for each expert


def write_statistics(statistics: RoutingStatistics, folder: str | Path, config: dict[str, Any]) -> list[Path]:
    """Writes statistics.json and statistics.npz.

    The arrays are, for each layer NAME, "NAME/expert_class" (E, C), "NAME/expert_word" (E, W) and "NAME/words" (W,)
    texts, as far as there are any; "class_names" (C,).

    Args:
        statistics: what `gather_statistics` gave.
        folder: where to; it is made.
        config: the settings that they were made with, for the JSON file.

    Returns:
        The two files.
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
            arrays[f"{layer.name}/expert_word"] = np.stack(list(layer.expert_word.values()), axis=1)
            arrays[f"{layer.name}/words"] = np.array(list(layer.expert_word))
    with whole_file(array_file) as temporary:
        np.savez_compressed(temporary, **arrays)
    return [json_file, array_file]


def statistics_json(statistics: RoutingStatistics, config: dict[str, Any]) -> dict[str, Any]:
    """What statistics.json holds: all figures but the large tables, of which it lists the most telling entries."""
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
    modalities = {
        name: {
            "tokens": tokens,
            "asked": layer.asked[name].tolist(),
            "kept": layer.kept[name].tolist(),
            "importance": layer.importance[name].tolist(),
            "share_dropped": layer.share_dropped[name],
            "entropy": layer.entropy[name],
        }
        for name, tokens in layer.tokens.items()
    }
    settings = ("num_experts", "num_selected_experts", "router", "eval_capacity_factor", "capacity", "batch_priority")
    experts: list[dict[str, Any]] = [{} for _ in range(layer.num_experts)]
    tables = {}
    if layer.expert_class is not None and class_names is not None:
        tables["classes"] = (layer.expert_class, class_names)
    if layer.expert_word:
        tables["words"] = (np.stack(list(layer.expert_word.values()), axis=1), list(layer.expert_word))
    for e, expert in enumerate(experts):
        for kind, (table, names) in tables.items():
            expert[kind] = [
                {"name": name, "share_of_name": of_name, "share_of_expert": of_expert}
                for name, of_name, of_expert in telling_of_expert(table, names, e, TELLING)
            ]
        expert["typical_patches"] = [
            {"sample": patch.sample, "row": patch.row, "column": patch.column, "weight": patch.weight}
            for patch in layer.typical_patches[e]
        ]
    return {
        "name": layer.name,
        **{name: getattr(layer, name) for name in settings},
        "modalities": modalities,
        "experts": experts,
    }
