"""The output of a capacity sweep: flat metrics, a table and a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from vmoe.evaluation.capacity import Sweep
from vmoe.utils.tables import MetricTable

# Okabe and Ito's colours, distinct for any colour vision; shapes and dashes are distinct in print.
CURVES = {
    "bpr": {"label": "BPR", "color": "#0072B2", "marker": "o", "linestyle": "-"},
    "vanilla": {"label": "vanilla", "color": "#D55E00", "marker": "s", "linestyle": "--"},
    "experts": {"label": "expert choice", "color": "#009E73", "marker": "D", "linestyle": "-"},
}
NO_LIMIT = "#5B6570"


def flat_results(sweep: Sweep) -> dict[str, float | int]:
    """{name: metric} of a sweep for the table of results, such as "top1_bpr_0.4" and "top1_no_limit"."""
    results: dict[str, float | int] = {}
    for point in sweep.points:
        limit = "no_limit" if point.factor is None else f"{point.curve}_{point.factor:g}"
        results[f"top1_{limit}"] = point.top1
    for gain in sweep.gains:
        if gain.factor is None:
            results["bpr_gain_below_1"] = gain.gain
    return {**results, "num_samples": sweep.num_samples, "num_skipped": sweep.num_skipped}


def sweep_details(sweep: Sweep) -> dict[str, Any]:
    """All of a sweep, as JSON can hold it."""
    return {"points": [point._asdict() for point in sweep.points], "bpr_gain": [gain._asdict() for gain in sweep.gains]}


def print_sweep(sweep: Sweep, checkpoint: str, console: Console) -> None:
    """Prints a row per setting, with standard errors and the quartiles of the speed, and what BPR gained."""
    console.print(f"accuracy, cost and speed of {checkpoint}", highlight=False, markup=False, soft_wrap=True)
    header = ["factor", "order", "top-1", "dropped", "GFLOPs", "images/s"]
    table = MetricTable("", header, keys=2, left=["order"])
    for point in sweep.points:
        speed = point.images_per_second
        table.add_row(
            "none" if point.factor is None else f"{point.factor:g}",
            CURVES[point.curve]["label"] if point.curve in CURVES else "",
            f"{point.top1:.3f} ± {point.top1_error:.3f}",
            f"{point.share_dropped:.1%}",
            f"{point.gflops_per_image:.4g}",
            "" if speed is None else "{median:.0f} ({lower_quartile:.0f}-{upper_quartile:.0f})".format(**speed),
        )
    console.print(table)
    for gain in sweep.gains:
        if gain.factor is None:
            console.print(verdict(gain.gain, gain.error), highlight=False, soft_wrap=True)


def verdict(gain: float, error: float) -> str:
    """One sentence on whether BPR is the better curve below capacity 1; two standard errors are taken as noise."""
    outcome = "no clear difference between BPR and vanilla routing"
    if abs(gain) > 2 * error:
        outcome = "BPR is the better curve" if gain > 0 else "BPR is the WORSE curve"
    return f"below capacity 1: {outcome}, top-1 {gain:+.4f} ± {error:.4f} in the mean"


def draw_sweep(points: list[dict[str, Any]], file: Path) -> None:
    """Plots accuracy against capacity, cost and, if all settings were timed, speed, as in the V-MoE paper.

    `points` are those of `sweep_details`. Error bars are binomial standard errors, and quartiles of the speed.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    labels = {"factor": "capacity factor", "gflops_per_image": "GFLOPs per image"}
    if all(point["images_per_second"] for point in points):
        labels["median"] = "images per second"
        points = [{**point, **point["images_per_second"]} for point in points]
    with rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(4.6 * len(labels), 3.9), layout="constrained")
        for axes, (name, label) in zip(figure.subplots(1, len(labels), sharey=True), labels.items()):
            _draw_curves(axes, points, name)
            axes.set_xlabel(label)
            axes.grid(alpha=0.25)
        figure.axes[0].set_ylabel("top-1")
        figure.axes[0].legend(frameon=False, loc="lower right")
        figure.savefig(file, dpi=150)


def _draw_curves(axes, points: list[dict[str, Any]], name: str) -> None:
    """The curves against `name`; without a limit both are one point."""
    for point in points:
        if point["curve"] != "both":
            continue
        x, y = point[name], point["top1"]
        if name == "factor":
            axes.axhline(y, linestyle=":", label="no limit", color=NO_LIMIT)
        else:
            axes.plot(x, y, "*", markersize=11, zorder=5, color=NO_LIMIT)
            axes.annotate("no limit", (x, y), (0, 7), textcoords="offset points", ha="center", fontsize=8)
    for curve, style in CURVES.items():
        own = [point for point in points if point["curve"] == curve]
        if own:
            x, y, error = ([point[column] for point in own] for column in (name, "top1", "top1_error"))
            quartiles = None
            if name == "median":
                ends = [(point["lower_quartile"], point["upper_quartile"]) for point in own]
                quartiles = list(zip(*((median - low, high - median) for median, (low, high) in zip(x, ends))))
            axes.errorbar(x, y, yerr=error, xerr=quartiles, markersize=5, linewidth=1.6, elinewidth=0.8, **style)
