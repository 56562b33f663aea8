"""The output of an evaluation: the progress bar, the table, the JSON file."""

from __future__ import annotations

import dataclasses
import itertools
import json
import platform
import statistics
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from vmoe.data import EvalLoader
from vmoe.evaluation.config import EvaluationConfig
from vmoe.models.manifest import is_checkpoint
from vmoe.utils.files import atomic_file, local_path, read_json
from vmoe.utils.tables import MetricTable
from vmoe.utils.world import world

LIBRARIES = ("torchvision", "timm", "open_clip_torch", "numpy", "pillow")
# Kinds of data whose path holds several splits: the split is part of the file's name.
NAMED_BY_SPLIT = ("emoji", "emoji_groups", "torchvision", "karpathy")


class Outcome(NamedTuple):
    """The results of a task for one checkpoint."""

    results: dict[str, float | int]  # flat metrics, shown as a table; the mean is taken of several checkpoints
    details: dict[str, Any]  # more metrics, as JSON can hold them; they are only in the file
    confusion_CC: Tensor | None = None  # (right class, predicted class), where samples have one class
    samples: dict[str, Tensor] | None = None  # columns (N,) of the table of samples, "index" (in the data) first


class Progress:
    """A loader that shows a progress bar while it is read, in the first of several processes."""

    def __init__(self, loader: EvalLoader, description: str, console: Console) -> None:
        self.loader, self.description, self.console = loader, description, console

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        if world()[0] > 0:
            return iter(self.loader)
        return iter(track(self.loader, self.description, total=len(self.loader), console=self.console, transient=True))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)


def mean_and_spread(results: list[dict[str, float | int]]) -> tuple[dict[str, float | int], dict[str, float]]:
    """({name: mean}, {name: standard deviation, n - 1}) of the metrics of several checkpoints; one has no deviations.

    What is equal for all, such as the number of samples, keeps its value and type.
    """
    if len(results) == 1:
        return results[0], {}
    mean, spread = {}, {}
    for name in results[0]:
        values = [result[name] for result in results if name in result]
        if len(values) < len(results):  # there is no ece if scores are NaN
            continue
        mean[name] = values[0] if len(set(values)) == 1 else statistics.fmean(values)
        if isinstance(values[0], float):
            spread[name] = statistics.stdev(values)
    return mean, spread


def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that affect the metrics."""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "vmoe": "source"}
    with suppress(PackageNotFoundError):
        versions["vmoe"] = version("vmoe")
    return versions | {name: version(name) for name in LIBRARIES}


def output_file(config: EvaluationConfig) -> Path:
    """The file of the result: `output`, or a name of task and data beside the (first) checkpoint.

    If that file holds the result of other settings, the name gets a number: NAME_2.json and so on.
    """
    if config.output is not None:
        return Path(config.output)
    checkpoint, data = local_path(config.checkpoints[0]), config.data
    parts = ["evaluation", config.task, data.type]
    parts += [data.name or Path(data.path).resolve().stem] if data.name or data.path else []
    parts += [data.split] if data.type in NAMED_BY_SPLIT else []
    if len(config.checkpoints) > 1:
        parts.append(f"{len(config.checkpoints)}_checkpoints")
    elif not checkpoint.is_dir() and checkpoint.stem != "model":  # a file of its own among others, such as ema
        parts.append(checkpoint.stem)
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    if (inside := checkpoint_around(folder)) is not None:  # beside it, or in the run's folder
        parts.append(inside.name)
        folder = inside.parent.parent if inside.parent.name == "checkpoints" else inside.parent
    settings = _settings(json.loads(json.dumps(dataclasses.asdict(config))))
    for number in itertools.count(1):
        file = folder / f"{'_'.join(parts)}{f'_{number}' if number > 1 else ''}.json"
        try:
            if _settings(read_json(file, max_bytes=2**28)["config"]) == settings:
                return file
        except OSError:  # there is none, or it could not be written to either
            return file
        except (ValueError, KeyError, TypeError):  # no result of an evaluation
            continue


def checkpoint_around(folder: Path) -> Path | None:
    """The checkpoint that a folder is or lies in, which another file would damage."""
    return next((each for each in (folder, *folder.absolute().parents) if is_checkpoint(each)), None)


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    """The settings that a result depends on."""
    naflex = config["loader"].get("naflex")  # older files have no such key
    loader = {"on_bad": config["loader"]["on_bad"], "seq_len": naflex and max(naflex["seq_lens"])}
    return {**config, "loader": loader, "device": None, "output": None}


def write_json(report: dict[str, Any], file: Path) -> None:
    """Writes the file atomically; ValueError: a metric is NaN, which JSON cannot hold."""
    text = json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False)
    with atomic_file(file) as temporary:
        # Names of files need not be UTF-8; what is not becomes an escape of JSON's own.
        temporary.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")


def print_table(title: str, results: dict[str, float | int], spread: dict[str, float], console: Console) -> None:
    """Prints the metrics; with a spread as mean ± standard deviation."""
    console.print(title, highlight=False, markup=False, soft_wrap=True)
    table = MetricTable("", ["measure", "value"], left=["measure"])
    for name, value in results.items():
        text = f"{value:.4f}" if isinstance(value, float) else str(value)
        table.add_row(name, f"{text} ± {spread[name]:.4f}" if name in spread else text)
    console.print(table)
