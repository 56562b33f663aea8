"""What a run logs: metrics.jsonl, TensorBoard, and the metrics of the routing over all processes."""

import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vmoe.distributed.process_group import mean_over_processes, sum_over_processes
from vmoe.moe import LayerRouting, RoutingRecord
from vmoe.moe.record import statistics_of
from vmoe.training.wandb_logger import WandbLog
from vmoe.utils.files import atomic_file

logger = logging.getLogger("vmoe.training")


class MetricsLog:
    """Writes each logged step as a line of metrics.jsonl, to TensorBoard, and to another log if there is one, as W&B;
    nothing if `run` is None.

    Lines after `step`, from which a run continues, are dropped, so that no step appears twice.
    """

    def __init__(self, run: Path | None, step: int, tensorboard: bool, other: WandbLog | None = None) -> None:
        self._file = self._writer = None
        self._other = other
        if run is None:
            return
        file = run / "metrics.jsonl"
        kept = "".join(json.dumps(line) + "\n" for line in read_metrics(file) if line["step"] <= step)
        with atomic_file(file) as draft:
            draft.write_text(kept, encoding="utf-8")
        self._file = file.open("a", encoding="utf-8")
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Writes a line without "experts/...", too many for it; what is not finite becomes null (JSON has no NaN)."""
        if self._file is None:
            return
        line = {name: value for name, value in metrics.items() if not name.startswith("experts/")}
        finite = {name: value if math.isfinite(value) else None for name, value in line.items()}
        self._file.write(json.dumps({"step": step, **finite}) + "\n")
        self._file.flush()
        if self._writer is not None:
            for name, value in metrics.items():
                self._writer.add_scalar(name, value, step)
        if self._other is not None:
            self._other.write(step, metrics)

    def image(self, step: int, name: str, file: Path) -> None:
        """Shows an image file in TensorBoard."""
        if self._writer is not None:
            pixels = np.asarray(Image.open(file).convert("RGB"))
            self._writer.add_image(name, pixels, step, dataformats="HWC")

    def close(self) -> None:
        for stream in (self._file, self._writer, self._other):
            if stream is not None:
                stream.close()
        self._file = self._writer = self._other = None


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl without one that was cut off; none of a missing file."""
    entries = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return entries


# --- metrics of the routing over all processes, which call these together ---


def requested_shares(layers: dict[str, LayerRouting]) -> dict[str, Tensor]:
    """{layer: (E,) share of the assignments that ask for each expert, before any is dropped}."""
    counts = {
        name: torch.bincount(routing.expert_index[routing.mask].flatten(), minlength=routing.gates.shape[-1])
        for name, routing in layers.items()
    }
    return {name: count_E / count_E.sum().clamp(min=1) for name, count_E in sum_over_processes(counts).items()}


def routing_metrics(record: RoutingRecord) -> dict[str, float]:
    """The metrics of a step's routing (docs/training.md); empty for a dense model."""
    layers = {}
    for name, routing in record.layers.items():
        means = mean_over_processes([float(value) for value in routing.means.values()])
        counted = statistics_of(sum_over_processes(routing.counts))
        layers[name] = {key: float(value) for key, value in counted.items()} | dict(zip(routing.means, means))
    if not layers:
        return {}
    metrics = {
        "routing/share_dropped": sum(layer["share_dropped"] for layer in layers.values()) / len(layers),
        "routing/load_max_over_mean": max(layer["load_max_over_mean"] for layer in layers.values()),
        "routing/experts_without_tokens": sum(layer["experts_without_tokens"] for layer in layers.values()),
    }
    for name, share_E in requested_shares(record.layers).items():
        layers[name]["largest_share"] = share_E.max().item()
        metrics.update({f"routing/{name}/{key}": value for key, value in layers[name].items()})
    return metrics


def expert_metrics(record: RoutingRecord) -> dict[str, float]:
    """For each expert "experts/LAYER/MODALITY/load_E", its share of the kept assignments (soft routing has none), and
    "experts/LAYER/MODALITY/importance_E", the mean of its gate values."""
    metrics = {}
    for name, routing in record.layers.items():
        for modality, own_GN in routing.mask_by_modality.items():
            sums = {"importance": routing.gates.detach()[own_GN].sum(0), "tokens": own_GN.sum()}
            if not routing.routing.soft:
                sums["load"] = routing.load_by_modality[modality]
            sums = sum_over_processes(sums)
            totals = {"importance": sums.pop("tokens"), "load": sums.get("load", torch.zeros(1)).sum()}
            for kind, sum_E in sums.items():
                for expert, value in enumerate((sum_E / totals[kind].clamp(min=1)).tolist()):
                    metrics[f"experts/{name}/{modality}/{kind}_{expert:02d}"] = value
    return metrics
