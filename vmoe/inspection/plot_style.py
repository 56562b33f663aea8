"""The common look of the figures."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from vmoe.inspection.example_plot import INK, PALE, one_line_for_missing_glyphs
from vmoe.utils.atomic import whole_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 150
MODALITY_COLOURS = {"image": "#0072B2", "text": "#D55E00"}  # Okabe and Ito's
HEAT = "Blues"  # from white to dark, for any colour vision and in print


@contextmanager
def style(constrained: bool = True) -> Iterator[None]:
    """No file of the user's own changes the look, and nothing here changes theirs."""
    from matplotlib import rc_context, rcParamsDefault

    look = {
        "font.family": "DejaVu Sans",
        "font.size": 8,
        "text.parse_math": False,  # a "$" in a class name or caption is one
        "axes.titlesize": 9,
        "axes.edgecolor": "#AAB2BD",
        "axes.labelcolor": INK,
        "axes.titlecolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "hatch.linewidth": 0.6,
        "hatch.color": "#FFFFFF",
        "figure.constrained_layout.use": constrained,
    }
    kept = {key: value for key, value in rcParamsDefault.items() if not key.startswith(("backend", "datapath"))}
    with rc_context({**kept, **look}):
        yield


def new_figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=DPI, facecolor="white")


def panels(count: int, columns: int, height: float) -> tuple[Figure, list[Axes]]:
    """A figure with `count` axes in rows of up to `columns`, each `height` inches high."""
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    figure = new_figure(max(5.5, 3.6 * columns), height * rows + 0.8)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for ax in axes[count:]:
        ax.set_visible(False)
    return figure, axes[:count]


def heading(figure: Figure, title: str, note: str) -> None:
    """A bold title and a pale line below it, at the left; constrained layout makes room for them."""
    lines = note.count("\n") + 1
    figure.suptitle(f"{title}\n" + "\n" * lines, x=0.01, ha="left", fontsize=11, weight="bold", color=INK)
    height = figure.get_figheight()
    figure.text(0.01, 1 - 0.34 / height, note, fontsize=8, color=PALE, va="top", linespacing=1.3)


def expert_axis(ax: Axes, num_experts: int) -> None:
    step = math.ceil(num_experts / 16)
    ax.set_xticks(range(0, num_experts, step))
    ax.set_xlim(-0.6, num_experts - 0.4)
    ax.set_xlabel("expert", fontsize=7.5, color=PALE)


def percent(value: float, _place: int | None = None) -> str:
    return f"{value:.0%}"


def percent_axis(ax: Axes) -> None:
    ax.yaxis.set_major_formatter(percent)
    ax.spines[["top", "right"]].set_visible(False)


def swatch(figure: Figure, left: float, bottom: float, width: float, height: float, colour: str) -> None:
    """A coloured rectangle; all numbers are shares of the figure."""
    from matplotlib.patches import Rectangle

    figure.add_artist(Rectangle((left, bottom), width, height, color=colour, transform=figure.transFigure))


def save_figure(figure: Figure, file: Path) -> Path:
    """Writes the figure whole or not at all."""
    with whole_file(file) as temporary, one_line_for_missing_glyphs():
        figure.savefig(temporary)
    return file
