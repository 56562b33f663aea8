"""The output of a capacity sweep: flat metrics, a table, a CSV file and a figure."""

from __future__ import annotations

import csv
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from vmoe.evaluation.capacity import Sweep
from vmoe.utils.config import ConfigError
from vmoe.utils.tables import MetricTable

# Okabe and Ito's colours, told apart with any colour vision; shapes and dashes tell them apart in print.
CURVES = {
    "bpr": {"label": "BPR", "color": "#0072B2", "marker": "o", "linestyle": "-"},
    "vanilla": {"label": "vanilla", "color": "#D55E00", "marker": "s", "linestyle": "--"},
    "experts": {"label": "expert choice", "color": "#009E73", "marker": "D", "linestyle": "-"},
}
NO_LIMIT = "#5B6570"
SPEEDS = ("median", "lower_quartile", "upper_quartile")
COLUMNS = (
    *("checkpoint", "curve", "num_selected_experts", "factor", "top1", "top1_error", "top5", "share_dropped"),
    *("gflops_per_image", "images_per_second", "images_per_second_lower", "images_per_second_upper"),
)


def flat_results(sweep: Sweep) -> dict[str, float | int]:
    """{name: metric} of a sweep for the table of results, such as "top1_bpr_0.4" and "top1_no_limit"."""
    several = len({point.setting.num_selected_experts for point in sweep.points}) > 1
    results: dict[str, float | int] = {}
    for point in sweep.points:
        setting = point.setting
        name = "no_limit" if setting.factor is None else f"{setting.curve}_{setting.factor:g}"
        results[f"k{setting.num_selected_experts}_top1_{name}" if several else f"top1_{name}"] = point.top1
    for gain in sweep.gains:
        if gain.factor is None:
            prefix = f"k{gain.num_selected_experts}_" if several else ""
            results[f"{prefix}bpr_gain_below_1"] = gain.gain
    return {**results, "num_samples": sweep.num_samples, "num_skipped": sweep.num_skipped}


def sweep_details(sweep: Sweep) -> dict[str, Any]:
    """All of a sweep, as JSON can hold it."""
    points = []
    for point in sweep.points:
        speed = None if point.images_per_second is None else dict(zip(SPEEDS, point.images_per_second))
        content = {"curve": point.setting.curve, **point.setting._asdict(), **asdict(point)}
        del content["setting"]
        points.append({**content, "images_per_second": speed})
    return {"points": points, "bpr_gain": [gain._asdict() for gain in sweep.gains]}


def print_sweep(sweep: Sweep, checkpoint: str, console: Console) -> None:
    """Prints a row per setting, with standard errors and the quartiles of the speed, and what BPR gained."""
    several = len({point.setting.num_selected_experts for point in sweep.points}) > 1
    console.print(f"accuracy, cost and speed of {checkpoint}", highlight=False, markup=False, soft_wrap=True)
    header = [*(["K"] if several else []), "factor", "order", "top-1", "dropped", "GFLOPs", "images/s"]
    table = MetricTable("", header, keys=len(header) - 4, left=["order"])
    for point in sweep.points:
        setting, speed = point.setting, point.images_per_second
        table.add_row(
            *([str(setting.num_selected_experts)] if several else []),
            "none" if setting.factor is None else f"{setting.factor:g}",
            CURVES[setting.curve]["label"] if setting.curve in CURVES else "",
            f"{point.top1:.3f} ± {point.top1_error:.3f}",
            f"{point.share_dropped:.1%}",
            f"{point.gflops_per_image:.4g}",
            "" if speed is None else f"{speed[0]:.0f} ({speed[1]:.0f}-{speed[2]:.0f})",
        )
    console.print(table)
    for gain in sweep.gains:
        if gain.factor is None:
            console.print(verdict(gain.num_selected_experts, gain.gain, gain.error), highlight=False, soft_wrap=True)


def verdict(num_selected_experts: int, gain: float, error: float) -> str:
    """One sentence on whether BPR is the better curve below capacity 1; two standard errors are taken as noise."""
    if gain > 2 * error:
        outcome = "BPR is the better curve"
    elif gain < -2 * error:
        outcome = "BPR is the WORSE curve"
    else:
        outcome = "BPR and vanilla routing cannot be told apart"
    return f"K = {num_selected_experts}, below capacity 1: {outcome}, top-1 {gain:+.4f} ± {error:.4f} in the mean"


def write_sweep(report: dict[str, Any], file: Path) -> list[Path]:
    """Writes CSV and figure of an evaluation's report beside its JSON file; returns the files."""
    table, figure = file.with_suffix(".csv"), file.with_suffix(".png")
    with open(table, "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        for entry in report["checkpoints"]:
            for point in entry["details"]["points"]:
                speeds = [(point["images_per_second"] or {}).get(name) for name in SPEEDS]
                writer.writerow({**point, "checkpoint": entry["checkpoint"], **dict(zip(COLUMNS[-3:], speeds))})
    draw_sweep([entry["details"]["points"] for entry in report["checkpoints"]], figure)
    return [table, figure]


def draw_sweep(sweeps: list[list[dict[str, Any]]], file: Path) -> None:
    """Accuracy against capacity, cost and speed, as in the V-MoE paper's figures on batch-prioritized routing.

    Error bars are standard errors: binomial for one checkpoint, between the checkpoints for several. The speed is drawn
    with its quartiles. Without a limit both orders give the same, a dotted line or a star.

    Raises:
        ConfigError: the checkpoints were swept with different settings, because their models differ.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    settings = [[(point["curve"], point["num_selected_experts"], point["factor"]) for point in own] for own in sweeps]
    if any(own != settings[0] for own in settings):
        raise ConfigError(
            "no figure of checkpoints with different routers or num_selected_experts: evaluate them one by one, or set "
            "capacity.num_selected_experts"
        )
    points = [_mean_point(same) for same in zip(*sweeps)]
    choices = list(dict.fromkeys(point["num_selected_experts"] for point in points))
    labels = {"factor": "capacity factor", "gflops_per_image": "GFLOPs per image"}
    if all(point["speed"] is not None for point in points):
        labels["speed"] = "images per second"
    with rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(4.6 * len(labels), 3.9), layout="constrained")
        FigureCanvasAgg(figure)
        for axes, (name, label) in zip(figure.subplots(1, len(labels), sharey=True), labels.items()):
            for number, K in enumerate(choices):
                own = [point for point in points if point["num_selected_experts"] == K]
                _draw_curves(axes, own, name, f", K = {K}" if len(choices) > 1 else "", number)
            axes.set_xlabel(label)
            axes.grid(alpha=0.25)
        figure.axes[0].set_ylabel("top-1")
        figure.axes[0].legend(frameon=False, loc="lower right")
        figure.savefig(file, dpi=150)


def _mean_point(same: tuple[dict[str, Any], ...]) -> dict[str, Any]:
    """One setting over the checkpoints."""
    top1 = [point["top1"] for point in same]
    speeds = [point["images_per_second"] for point in same]
    return {
        **same[0],
        "top1": statistics.fmean(top1),
        "top1_error": statistics.stdev(top1) / len(top1) ** 0.5 if len(top1) > 1 else same[0]["top1_error"],
        "gflops_per_image": statistics.fmean(point["gflops_per_image"] for point in same),
        "speed": [statistics.fmean(speed[part] for speed in speeds) for part in SPEEDS] if all(speeds) else None,
    }


def _draw_curves(axes, points: list[dict[str, Any]], name: str, suffix: str, number: int) -> None:
    """The curves of one K; a later K is paler and hollow."""
    for point in points:
        if point["curve"] == "both" and name == "factor":
            label = f"no limit{suffix}"
            axes.axhline(point["top1"], color=NO_LIMIT, linestyle=":", label=label, alpha=1 / (1 + number))
        elif point["curve"] == "both":
            x = point["speed"][0] if name == "speed" else point[name]
            axes.plot(x, point["top1"], "*", color=NO_LIMIT, markersize=11, alpha=1 / (1 + number), zorder=5)
            axes.annotate("no limit", (x, point["top1"]), (0, 7), textcoords="offset points", ha="center", fontsize=8)
    for curve, style in CURVES.items():
        own = [point for point in points if point["curve"] == curve]
        if not own:
            continue
        x, x_error = [point[name] for point in own], None
        if name == "speed":
            x, lower, upper = zip(*(point["speed"] for point in own))
            x_error = [[abs(end - middle) for end, middle in zip(ends, x)] for ends in (lower, upper)]
        axes.errorbar(
            x,
            [point["top1"] for point in own],
            yerr=[point["top1_error"] for point in own],
            xerr=x_error,
            markersize=5,
            linewidth=1.6,
            elinewidth=0.8,
            alpha=1 / (1 + 0.6 * number),
            markerfacecolor="white" if number else style["color"],
            **{**style, "label": style["label"] + suffix},
        )
