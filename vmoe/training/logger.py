"""What a run reports: metrics.jsonl, TensorBoard, progress, warnings, the final table."""

from __future__ import annotations

import json
import logging
import math
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn
from rich.table import Column
from torch import Tensor

from vmoe.data.workers import own_cores
from vmoe.distributed.process_group import mean_over_processes, sum_over_processes
from vmoe.moe import LayerRouting, RoutingRecord
from vmoe.moe.record import statistics_of
from vmoe.training.wandb_logger import WandbLog
from vmoe.utils.files import atomic_file
from vmoe.utils.tables import MetricTable
from vmoe.utils.world import world

logger = logging.getLogger("vmoe.training")

WAITING_SHARE, WAITING_FOR = 0.2, 5  # a warning follows above this share of the time, in so many logged steps in a row
LATEST = 200  # durations that the estimate of the time left is made from


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


class CollapseWatch:
    """Warns when the routing of a layer stays collapsed for `after` steps (0 never warns).

    One expert is asked for by most assignments (over half of those that an even load would not give it), or some expert
    by none.
    """

    def __init__(self, after: int) -> None:
        self.after = after
        self.since: dict[str, float] = {}  # {layer: the step at which it collapsed, or infinity once it was reported}

    def update(self, step: int, layers: dict[str, LayerRouting]) -> None:
        """Takes the routing of a logged step; all processes call it, and the first one warns."""
        for name, share_E in requested_shares(layers).items() if self.after else ():
            num_experts, share, idle = len(share_E), share_E.max().item(), int((share_E == 0).sum())
            even = 1 / num_experts
            crowded = num_experts > 1 and share > even + 0.5 * (1 - even)
            if not crowded and not idle:
                self.since.pop(name, None)
                continue
            since = self.since.setdefault(name, step)
            if step - since < self.after:
                continue
            self.since[name] = math.inf
            what = f"{share:.0%} of its tokens ask for one expert" if crowded else f"{idle} experts get no token"
            if world()[0] == 0:
                logger.warning(
                    f"the routing of {name} has collapsed: {what} of {num_experts} (steps {since} to {step}); raise "
                    "the balancing losses (importance_loss, load_loss, global_entropy_loss), lower optim.lr, or train "
                    "with more noise_std"
                )


class DataWatch:
    """Warns once, with a remedy, when the model waits for data in several logged steps in a row."""

    def __init__(self, num_workers: int, cached: bool = False) -> None:
        self.num_workers, self.cached, self.in_a_row, self.warned = num_workers, cached, 0, False

    def update(self, metrics: dict[str, float], readable: float) -> None:
        """Takes the metrics of a logged step; `readable`: images per second that this process's workers can read."""
        rank, processes = world()
        waiting = metrics["data_wait_share"]
        self.in_a_row = self.in_a_row + 1 if waiting > WAITING_SHARE else 0
        if self.in_a_row < WAITING_FOR or self.warned or rank > 0 or not readable > 0:
            return
        self.warned = True
        needed = metrics["images_per_second"] / processes / max(1 - waiting, 0.01)
        workers = max(math.ceil(needed / readable * max(self.num_workers, 1)), self.num_workers + 1)
        remedy = f"raise it to {min(workers, own_cores())}"
        if self.num_workers >= own_cores():
            remedy = f"all {own_cores()} CPU cores read already: store smaller images, or take more cores"
        if not self.cached:
            remedy += ", or set data.cache memory if the decoded images fit into it"
        logger.warning(
            f"the model waits for data {waiting:.0%} of the time: each process could take {needed:.0f} images/s, and "
            f"data.loader.num_workers {self.num_workers} reads {readable:.0f}; {remedy}"
        )


class TimeLeft:
    """Estimates how long the remaining steps, evaluations and checkpoints take.

    Each kind takes the mean of its latest durations without the longest: a step that compiles or waits for a slow disk
    says nothing about the others. `every`: steps between two evaluations and so on; 0: there is none.
    """

    def __init__(self, steps: int, **every: int) -> None:
        self.steps = steps
        self.every = {"step": 1, **{kind: number for kind, number in every.items() if number}}
        self.durations: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=LATEST))
        self.longest: dict[str, float] = defaultdict(float)

    def add(self, kind: str, seconds: float) -> None:
        self.durations[kind].append(seconds)
        self.longest[kind] = max(self.longest[kind], seconds)

    def seconds(self, step: int) -> float:
        """Seconds to the end after a step, whose evaluation and checkpoint are still to come."""
        left = 0.0
        for kind, every in self.every.items():
            known = sorted(self.durations[kind])
            done = (step if kind == "step" else step - 1) // every
            if known:
                left += fmean(known[:-1] or known) * (math.ceil(self.steps / every) - done)
        return left


class ProgressBar(Progress):
    """A progress line on a terminal, plain lines elsewhere; `every` as in `TimeLeft`."""

    def __init__(self, console: Console, step: int, steps: int, **every: int) -> None:
        one_line = Column(no_wrap=True, overflow="ellipsis")
        columns = (TextColumn(f"{{task.fields[{name}]}}", table_column=one_line) for name in ("left", "metrics"))
        columns = (TextColumn("step"), MofNCompleteColumn(), *columns)
        super().__init__(*columns, console=console, disable=not console.is_terminal)
        self.steps, self.time_left = steps, TimeLeft(steps, **every)
        self._task = self.add_task("train", total=steps, completed=step, metrics="", left="-:--:--")

    def step_done(self, step: int, seconds: float) -> None:
        self.time_left.add("step", seconds)
        self.update(self._task, completed=step, left=self._left(step))

    @contextmanager
    def timing(self, kind: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.time_left.add(kind, time.monotonic() - began)

    def show(self, step: int, metrics: dict[str, float]) -> None:
        """Shows the metrics of a logged step; on a terminal as many as fit on the line."""
        texts, left = short_texts(metrics), self._left(step)
        if self.disable:
            say(self.console, ", ".join([f"step {step}/{self.steps}", *texts, f"{left} left"]))
        while texts and len(f"step {self.steps}/{self.steps} {left} {', '.join(texts)}") > self.console.width:
            texts.pop()
        self.update(self._task, metrics=", ".join(texts))

    def _left(self, step: int) -> str:
        return str(timedelta(seconds=round(self.time_left.seconds(step))))


def say(console: Console, text: str) -> None:
    """Prints a line as it is; above the progress line, if there is one."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def short_texts(metrics: dict[str, float]) -> list[str]:
    """The metrics of a progress line, the most important first."""
    texts = [f"loss {metrics['loss']:.4g}", f"{metrics['images_per_second']:.0f} img/s"]
    if metrics["data_wait_share"] >= 0.05:
        texts.append(f"waiting for data {metrics['data_wait_share']:.0%}")
    if "teacher_share" in metrics:
        texts.append(f"teacher {metrics['teacher_share']:.0%} of the time")
    if "routing/share_dropped" in metrics:
        texts.append(f"dropped {metrics['routing/share_dropped']:.1%}")
        texts.append(f"max/mean load {metrics['routing/load_max_over_mean']:.2f}")
        texts.append(f"idle experts {metrics['routing/experts_without_tokens']:.0f}")
    return texts


def final_table(summary: dict[str, Any]) -> MetricTable:
    """The table of a run's summary."""
    table = MetricTable(f"{summary['model']}, {summary['task']}", ["result", "value"], left=["result"])
    table.add_row("steps", str(summary["steps"]))
    table.add_row("parameters", f"{summary['parameters_total'] / 1e6:.2f} M")
    table.add_row("  active per token", f"{summary['parameters_active'] / 1e6:.2f} M")
    table.add_row("GFLOPs per image", f"{summary['gflops_per_image']:.3f}")
    if "gflops_per_text" in summary:
        table.add_row("GFLOPs per caption", f"{summary['gflops_per_text']:.3f}")
    table.add_row("training throughput", f"{summary['images_per_second']:.0f} images/s")
    table.add_row("training time", f"{summary['train_seconds']:.0f} s")
    if "teacher_share" in summary:
        table.add_row("  of which the teacher", f"{summary['teacher_share']:.0%}")
    table.add_row("final loss", f"{summary['loss']:.4f}")
    if "best" in summary:
        best = summary["best"]
        table.add_row(f"best {best['metric']} (step {best['step']})", f"{best['value']:.4f}")
    for name, value in summary["evaluation"].items():
        table.add_row(name, f"{value:.4f}" if isinstance(value, float) else str(value))
    return table
