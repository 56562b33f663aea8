"""The figure of an experiment: a point for each run, or a line through metrics that differ in a number."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.compare import Estimate, estimate
from vmoe.inspection.style import PALETTE, look, new_figure, save_figure

if TYPE_CHECKING:
    from experiments.report import Results

MARKERS = "osD^vP*X"


def draw(results: Results, file: Path) -> None:
    """Means over seeds, with their standard errors."""
    plot, y = results.experiment.plot, results.experiment.plot.y or results.metrics[0]
    with look():
        figure = new_figure(6.4, 3.6)
        axes = figure.subplots()
        for number, run in enumerate(results.runs):
            points = line(results, run, y) if "*" in y else point(results, run, plot.x, y)
            style = {"color": PALETTE[number % len(PALETTE)], "marker": MARKERS[number % len(MARKERS)]}
            if points:
                xs, ys = zip(*points)
                errors = [one.error or 0 for one in ys]
                axes.errorbar(xs, [one.mean for one in ys], errors, label=run, markersize=5, capsize=2, **style)
        if plot.log:
            axes.set_xscale("log")
        axes.set_xlabel("value of *" if "*" in y else plot.x)
        axes.set_ylabel(y)
        axes.grid(alpha=0.25)
        if axes.has_data():
            axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
        save_figure(figure, file)


def point(results: Results, run: str, x: str, y: str) -> list[tuple[float, Estimate]]:
    """The mean of a run, [] if it has none of the metrics."""
    xs, ys = results.values(run, x), results.values(run, y)
    return [(estimate([*xs.values()]).mean, estimate([*ys.values()]))] if xs and ys else []


def line(results: Results, run: str, pattern: str) -> list[tuple[float, Estimate]]:
    """A point for each metric that the pattern fits, at the number that its "*" stands for."""
    form = re.compile(re.escape(pattern).replace(r"\*", r"(\d+(?:\.\d+)?)"))
    names = {name for record in results.of(run).values() for name in record["metrics"]}
    numbers = {float(found[1]): name for name in names if (found := form.fullmatch(name))}
    return [(x, estimate([*results.values(run, name).values()])) for x, name in sorted(numbers.items())]
