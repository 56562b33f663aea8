"""What a run shows: its progress with the time left, and the final table."""

import math
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn
from rich.table import Column

from vmoe.utils.tables import MetricTable

LATEST = 200  # durations that the estimate of the time left is made from


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
    table.add_row("final task loss", f"{summary['loss']:.4f}")
    if "best" in summary:
        best = summary["best"]
        table.add_row(f"best {best['metric']} (step {best['step']})", f"{best['value']:.4f}")
    for name, value in summary["evaluation"].items():
        table.add_row(name, f"{value:.4f}" if isinstance(value, float) else str(value))
    return table
