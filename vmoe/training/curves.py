"""curves.png: the learning curves of a run, drawn from its metrics.jsonl."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmoe.inspection.style import PALE, PALETTE, layer_titles, look, new_figure, save_figure
from vmoe.training.logger import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Curves = dict[str, tuple[list[int], list[float]]]  # {label: (steps, values)}
LOSSES = ("loss", "task_loss")
ACCURACIES = ("top1", "top5", "image_to_text_recall@1", "text_to_image_recall@1")
MOST_LAYERS = 8  # lines of the panel of the load


logger = logging.getLogger("vmoe.training")


def draw_curves(run: Path, best: dict[str, Any] | None = None) -> None:
    """Draws the loss, the accuracy or recall, and the load of the experts; if it fails, a warning says why.

    `best` is the state of `BestWatch`.
    """
    try:
        panels = _panels(read_metrics(run / "metrics.jsonl"), best)
        if panels := {title: curves for title, curves in panels.items() if curves}:
            _draw_panels(panels, run / "curves.png", best)
    except Exception as error:  # the run is done
        logger.warning("no curves.png: %s", error or type(error).__name__)


def _draw_panels(panels: dict[str, Curves], file: Path, best: dict[str, Any] | None) -> None:
    width, height = 3.4 * len(panels), 2.6
    edges = {"left": 0.5 / width, "right": 1 - 0.1 / width, "bottom": 0.45 / height, "top": 1 - 0.25 / height}
    with look(constrained=False):  # a layout by hand takes half the time
        figure = new_figure(width, height)
        axes = figure.subplots(1, len(panels), squeeze=False, gridspec_kw={**edges, "wspace": 0.22})[0]
        for ax, (title, curves) in zip(axes, panels.items(), strict=True):
            _draw(ax, title, curves)
            if best is not None and title == "evaluation":
                ax.axvline(best["step"], color=PALE, linewidth=0.8, linestyle=":")
                ax.set_xlabel(f"step (best {best['metric']}: {best['value']:.4f} at step {best['step']})")
        save_figure(figure, file)


def _panels(lines: list[dict[str, Any]], best: dict[str, Any] | None) -> dict[str, Curves]:
    """{title of a panel: its curves}"""
    names = list(dict.fromkeys(name for line in lines for name in line))
    layers = [name for name in names if name.startswith("routing/") and name.endswith("/load_max_over_mean")]
    layers = [name for name in layers if name.count("/") == 2][:MOST_LAYERS]  # without those of single modalities
    titles = layer_titles([name.split("/")[1] for name in layers])
    evaluated = dict.fromkeys((*ACCURACIES, *([best["metric"]] if best else [])))
    return {
        "loss": {name: _curve(lines, name) for name in LOSSES if name in names},
        "evaluation": {
            name: _curve(lines, f"evaluation/{name}") for name in evaluated if f"evaluation/{name}" in names
        },
        "load of the busiest expert / mean": {title: _curve(lines, name) for title, name in zip(titles, layers)},
    }


def _curve(lines: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """(steps, values) of a metric where it is a number."""
    pairs = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
    return [step for step, _ in pairs], [value for _, value in pairs]


def _draw(ax: Axes, title: str, curves: Curves) -> None:
    for colour, (label, (steps, values)) in zip(PALETTE, curves.items()):
        ax.plot(steps, values, color=colour, linewidth=1.2, label=label, marker="." if len(steps) < 30 else None)
    ax.set_title(title, loc="left")
    ax.set_xlabel("step")
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.ticklabel_format(axis="y", useOffset=False)  # it would push the title up
    ax.grid(axis="y", color="#E3E7EB", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    if len(curves) > 1 or title == "evaluation":
        ax.legend(fontsize=7, edgecolor="white", framealpha=0.8, loc="best")
