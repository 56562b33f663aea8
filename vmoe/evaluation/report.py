"""What an evaluation shows and leaves behind: the progress bar, the table, the JSON file."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from vmoe.data import EvalLoader
from vmoe.evaluation.distributed import world
from vmoe.whole import whole_file

LIBRARIES = ("vmoe", "torchvision", "timm", "open_clip_torch", "numpy", "pillow")
# Kinds of data that lie in no folder of the user's, or that share one: their split tells results apart.
NAMED_BY_SPLIT = ("emoji", "emoji_groups", "torchvision")


class Outcome(NamedTuple):
    """What a task found out about one checkpoint.

    Attributes:
        results: flat figures, shown as a table; the mean is taken of several checkpoints.
        details: further figures that JSON can hold; they are only in the file.
    """

    results: dict[str, float | int]
    details: dict[str, Any] = {}  # noqa: RUF012  (never changed)


class Progress:
    """A loader that shows a progress bar while it is read, in the first of several processes."""

    def __init__(self, loader: EvalLoader, description: str, console: Console) -> None:
        self.loader, self.description, self.console = loader, description, console

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        if world()[0] > 0:
            return iter(self.loader)
        return iter(track(self.loader, self.description, total=len(self.loader), console=self.console, transient=True))

    def __len__(self) -> int:
        return len(self.loader)

    @property
    def num_skipped(self) -> int:
        return self.loader.num_skipped


def mean_and_spread(results: list[dict[str, float | int]]) -> tuple[dict[str, float | int], dict[str, float]]:
    """({name: mean}, {name: standard deviation, n - 1}) of the figures of several checkpoints.

    What is equal for all, such as the number of samples, keeps its value and type. One checkpoint has no spread.
    """
    if len(results) == 1:
        return results[0], {}
    mean, spread = {}, {}
    for name in results[0]:
        values = [result[name] for result in results if name in result]
        equal = all(value == values[0] for value in values)
        mean[name] = values[0] if equal else sum(values) / len(values)
        if isinstance(values[0], float) and len(values) > 1:
            centre = sum(values) / len(values)
            spread[name] = math.sqrt(sum((value - centre) ** 2 for value in values) / (len(values) - 1))
    return mean, spread


def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide the figures; "source" for one that is not installed."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for name in LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:  # vmoe run from a checkout
            versions[name] = "source"
    return versions


def output_file(config) -> Path:
    """Where the result goes: `output`, or a name from task and data beside the (first) checkpoint."""
    if config.output is not None:
        return Path(config.output)
    checkpoint = Path(config.checkpoints[0])
    parts = ["evaluation", config.task, config.data.type]
    if config.data.type in NAMED_BY_SPLIT:
        parts.append(config.data.split)
    elif config.data.path is not None:
        parts.append(Path(config.data.path).stem)
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    return folder / f"{'_'.join(parts)}.json"


def write_json(report: dict[str, Any], file: Path) -> None:
    """Writes the file whole or not at all.

    Raises:
        ValueError: a figure is not a number, which JSON cannot hold.
    """
    text = json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(file) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def print_table(title: str, results: dict[str, float | int], spread: dict[str, float], console: Console) -> None:
    """Prints the figures; with a spread as mean ± standard deviation."""
    console.print(title, highlight=False, markup=False, soft_wrap=True)
    table = Table()
    table.add_column("measure")
    table.add_column("value", justify="right")
    for name, value in results.items():
        text = f"{value:.4f}" if isinstance(value, float) else str(value)
        table.add_row(name, f"{text} ± {spread[name]:.4f}" if name in spread else text)
    console.print(table)
