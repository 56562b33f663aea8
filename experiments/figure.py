"""The figure of an experiment: a point for each run, or a line through metrics that differ in a number."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.compare import Estimate, estimate
from experiments.plan import PlotConfig
from experiments.results import Results, pattern
from vmoe.inspection.style import PALETTE, look, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


MARKERS, DASHES = "osD^vP", ("-", "--", ":", "-.")
LABELS = {
    "gflops_per_image": "GFLOPs per image",
    "images_per_second": "images/s in training",
    "parameters_total": "parameters",
    "parameters_active": "active parameters",
    "train_seconds": "seconds of training",
}
# Metrics that are shares: shown in percent.
SHARES = re.compile(r"top\d|mean_per_class|ece$|recall@|\dshot(_std)?$|share|gain|robust|accuracy")


def is_share(metric: str) -> bool:
    return SHARES.search(metric) is not None


def draw(results: Results, file: Path) -> Figure:
    """Means over seeds, with their standard errors."""
    plot, ys = results.experiment.plot, results.experiment.plotted
    lines, factor = "*" in ys[0], 100 if is_share(ys[0]) else 1
    with look():
        figure = new_figure(6.4, 3.6)
        axes = figure.subplots()
        for (number, run), (kind, y) in itertools.product(enumerate(results.runs), enumerate(ys)):
            points = line(results, run, y) if lines else point(results, run, plot.x, y)
            if not points:
                continue
            xs, means, errors = zip(*((x, factor * one.mean, factor * (one.error or 0)) for x, one in points))
            style = {"color": PALETTE[number % len(PALETTE)], "marker": MARKERS[kind % len(MARKERS)]}
            style |= {"linestyle": DASHES[kind % len(DASHES)], "label": run if len(ys) == 1 else f"{run}: {y}"}
            axes.errorbar(xs, means, errors, markersize=5, capsize=2, linewidth=1, **style)
        low, high = axes.get_xlim()
        if plot.log:
            axes.set_xscale("log")
        elif not lines and low > 0 and high - low < 0.2 * high:  # costs that hardly differ look as they are
            axes.set_xlim(0.9 * low, 1.1 * high)
        if not plot.log:
            axes.locator_params(axis="x", nbins=6)
        axes.set_xlabel("*" if lines and plot.x == PlotConfig.x else LABELS.get(plot.x, plot.x))
        axes.set_ylabel(ys[0] if factor == 1 else f"{ys[0]}, %")
        axes.grid(alpha=0.25)
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
        save_figure(figure, file)
    return figure


def point(results: Results, run: str, x: str, y: str) -> list[tuple[float, Estimate]]:
    """The mean of a run, [] if it has none of the metrics."""
    xs, ys = results.values(run, x), results.values(run, y)
    return [(estimate([*xs.values()]).mean, estimate([*ys.values()]))] if xs and ys else []


def line(results: Results, run: str, y: str) -> list[tuple[float, Estimate]]:
    """A point for each metric that the pattern fits, at the number that its "*" stands for."""
    names = {name for record in results.of(run).values() for name in record["metrics"]}
    numbers = {float(found[1]): name for name in names if (found := pattern(y).fullmatch(name))}
    return [(x, estimate([*results.values(run, name).values()])) for x, name in sorted(numbers.items())]
