"""What an evaluation writes of each class (a table, and the confusion matrix as numbers and as an image) and sample.

Shapes, by suffix: N samples, C classes; of a confusion matrix (right class, predicted class).
"""

from __future__ import annotations

import csv
import warnings
from collections.abc import Callable, Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vmoe.utils.files import atomic_file

MOST_CLASSES = 5_000  # of a matrix, which then has 25 million counts: 200 MB
MOST_NUMBERS, MOST_NAMES = 15, 40  # classes up to which the image has the counts in its cells, and the names


def confusion_matrix(label_N: Tensor, predicted_N: Tensor, num_classes: int) -> Tensor:
    """(C, C), how often images of each class (row) are taken for each class (column)."""
    counts = torch.bincount(label_N * num_classes + predicted_N, minlength=num_classes**2)
    return counts.view(num_classes, num_classes)


def write_class_files(files: Sequence[Path], per_class: list[dict[str, Any]], confusion_CC: Tensor) -> Sequence[Path]:
    """Writes and returns three files: the table of the classes, and the matrix as a table and as an image.

    `per_class` is `Predictions.per_class`. The table says which other class most images are taken for: the first one of
    several.
    """
    names = [row["class"] for row in per_class]
    wrong_CC = confusion_CC.clone().fill_diagonal_(0)
    most_C, with_C = wrong_CC.max(dim=1)
    rows = [["class", "top1", "num_samples", "most_confused_with", "num_confused"]]
    for row, most, other in zip(per_class, most_C.tolist(), with_C.tolist(), strict=True):
        rows.append([*row.values(), names[other] if most else "", most])
    table, matrix, image = files
    write_csv(table, rows)
    write_csv(matrix, [["class", *names], *([name, *row] for name, row in zip(names, confusion_CC.tolist()))])
    draw_confusion(names, confusion_CC, image)
    return files


def write_csv(file: Path, rows: Iterable[Sequence[Any]]) -> None:
    """Writes a table atomically, in UTF-8."""
    with atomic_file(file) as draft, draft.open("w", encoding="utf-8", errors="backslashreplace", newline="") as stream:
        csv.writer(stream).writerows(rows)


def write_samples(file: Path, samples: dict[str, Tensor], name_of: Callable[[int], str]) -> Path:
    """Writes and returns the table of samples: "index" and "sample", its name, then the other columns (N,)."""
    index, *columns = (column_N.tolist() for column_N in samples.values())
    header = ["index", "sample", *list(samples)[1:]]
    write_csv(file, [header, *zip(index, map(name_of, index), *columns, strict=True)])
    return file


def draw_confusion(names: Sequence[str], confusion_CC: Tensor, file: Path) -> None:
    """Draws the share of each class's images that are taken for each class."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    num_classes = len(names)
    share_CC = (confusion_CC / confusion_CC.sum(dim=1, keepdim=True).clamp(min=1)).numpy()
    with rc_context({"font.size": 8, "text.parse_math": False}):
        side = min(9.0, 3.0 + 0.25 * num_classes)
        figure = Figure(figsize=(side + 0.7, side), layout="constrained")
        axes = figure.subplots()
        shown = axes.imshow(share_CC, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
        figure.colorbar(shown, ax=axes, shrink=0.7, label="share of the images of the class")
        axes.set_xlabel("predicted class")
        axes.set_ylabel("class")
        if num_classes <= MOST_NAMES:
            shorter = [name if len(name) <= 24 else f"{name[:23]}…" for name in names]
            axes.set_xticks(range(num_classes), shorter, rotation=90)
            axes.set_yticks(range(num_classes), shorter)
        if num_classes <= MOST_NUMBERS:
            for row, column in product(range(num_classes), repeat=2):
                colour = "white" if share_CC[row, column] > 0.5 else "black"
                axes.text(column, row, int(confusion_CC[row, column]), ha="center", va="center", color=colour)
        with atomic_file(file) as draft, warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing from font")
            figure.savefig(draft, dpi=150)
