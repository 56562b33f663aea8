"""The goals that were set for speed and memory, and what the results say of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
Ratio = dict[str, float]

# The case for which the goals were set.
LAYER = {"tokens": 6304, "width": 384, "hidden": 1536, "experts": 8, "selected": 1, "capacity": 1.0}
BOTH = ("forward", "forward + backward")
# Steps of the emoji training: the fewest that say something of its speed, and all that are configured.
SHORT_RUN, WHOLE_RUN = 20, 300


@dataclass(frozen=True)
class Bar:
    """A goal."""

    what: str  # is compared
    limit: float  # of the ratio
    at_most: bool  # the ratio shall be `limit` at most; else at least
    command: str  # measures it
    found: Ratio | None  # {"median", "min", "max"} of the ratio; None: not measured
    said: str | None = None  # the goal in words, in place of the limit

    @property
    def goal(self) -> str:
        return self.said or f"{'≤' if self.at_most else '≥'} {self.limit:.2f}"

    @property
    def met(self) -> bool:
        assert self.found is not None
        return self.found["median"] <= self.limit if self.at_most else self.found["median"] >= self.limit


def bars(sections: Sequence[dict[str, Any]]) -> list[Bar]:
    """All goals, which are for a CPU, given the sections of its results."""
    other = ("--compile", "--allocator", "--threads", "--depth")  # for which no goals were set
    fitting = [section for section in sections if not any(option in section["command"] for option in other)]
    return _goals(sorted(fitting, key=lambda section: section["finished"]))


def _find(sections: Sequence[dict[str, Any]], benchmark: str, **wanted: Any) -> Row | None:
    """The last row of a benchmark with these values."""
    rows = [row for section in sections if section["benchmark"] == benchmark for row in section["rows"]]
    fitting = [row for row in rows if all(row.get(name) == value for name, value in wanted.items())]
    return fitting[-1] if fitting else None


def _ratio(row: Row | None, other: str) -> Ratio | None:
    return None if row is None else row["ratios"].get(other)


def _kept(row: Row | None) -> str:
    """The share of the assignments that the left side computed."""
    return "" if row is None or row["kept"] == 1 else f" ({row['kept']:.1%} kept)"


def _goals(sections: Sequence[dict[str, Any]]) -> list[Bar]:
    found: list[Bar] = []

    def add(what: str, limit: float, benchmark: str, ratio: Ratio | None, at_most: bool = True) -> None:
        found.append(Bar(what, limit, at_most, f"python -m benchmarks.{benchmark}", ratio))

    for dtype, limits in (("float32", (1.05, 1.05)), ("bfloat16", (1.10, 1.15))):
        for one_pass, limit in zip(BOTH, limits, strict=True):
            row = _find(sections, "layer", comparison="mlp", name="vmoe", dtype=dtype, **{"pass": one_pass}, **LAYER)
            add(f"layer / dense MLP, {dtype}, {one_pass}{_kept(row)}", limit, "layer", _ratio(row, "dense"))
    for dtype in ("float32", "bfloat16"):
        row = _find(sections, "layer", comparison="mlp", name="vmoe", dtype=dtype, **{"pass": BOTH[1]}, **LAYER)
        add(f"activations without one gathered copy / dense MLP's, {dtype}", 1.15, "layer", _memory(row))
    for one_pass, limit in (("inference", 0.95), ("training", 0.93)):
        size = {"batch": 32, "image_size": 224, "pass": one_pass}
        row = _find(sections, "model", name="dropless", dtype="float32", **size)
        ratio = None if row is None else row["speed_ratio"]
        add(f"V-MoE S/16 / ViT-S/16, images per second, {one_pass}", limit, "model", ratio, at_most=False)
    sizes = {name: LAYER[name] for name in ("tokens", "width", "hidden")}
    for one_pass in BOTH:
        wanted = {"name": "layer", "dtype": "float32", "pass": one_pass, **sizes}
        row = _find(sections, "scaling", comparison="experts", experts=128, **wanted)
        add(f"E = 128 / E = 8, {one_pass}{_kept(row)}", 1.25, "scaling", _ratio(row, "base"))
    for one_pass in BOTH:
        wanted = {"name": "layer, BPR", "dtype": "float32", "pass": one_pass, **LAYER}
        row = _find(sections, "dispatch", comparison="priority", **wanted)
        add(f"BPR / vanilla dispatch, whole layer, {one_pass}", 1.02, "dispatch", _ratio(row, "layer, vanilla"))
    for one_pass in BOTH:
        wanted = {"name": "experts", "dtype": "float32", "pass": one_pass, **sizes}
        row = _find(sections, "scaling", comparison="capacity", capacity=0.5, **wanted)
        add(f"capacity 0.5 / 1.0, time of the experts, {one_pass}", 0.56, "scaling", _ratio(row, "base"))
    return [*found, *_training(sections)]


def _training(sections: Sequence[dict[str, Any]]) -> list[Bar]:
    """The emoji training against an earlier checkout: its speed, and its accuracy after a whole run."""
    command = "python -m benchmarks.train_throughput --against DIR"
    of_training = [section for section in sections if section["benchmark"] == "train_throughput"]
    sections = [section for section in of_training if all(row["steps"] >= SHORT_RUN for row in section["rows"])]
    row = _find(sections, "train_throughput", name="now")
    ratio = None if row is None else row["speed_ratio"]
    what = "`configs/limoe_tiny_emoji.yaml`, now / before"
    speed = Bar(f"{what}, images per second in training", 1.50, False, command, ratio)
    before, now = (_find(sections, "train_throughput", name=name, steps=WHOLE_RUN) for name in ("before", "now"))
    words = {"at_most": False, "command": f"{command} --steps {WHOLE_RUN}", "said": "not below the lowest seed"}
    what = f"{what}, final top-1"
    if before is None or now is None:
        return [speed, Bar(what, 1.0, found=None, **words)]
    old, new = before["top1"], now["top1"]
    ratio = {name: new[name] / old["median"] for name in ("median", "min", "max")}
    return [speed, Bar(what, old["min"] / old["median"], found=ratio, **words)]


def _memory(row: Row | None) -> Ratio | None:
    """Activations less one gathered copy of the kept rows, over the dense layer's: a count, without spread."""
    if row is None or row["activations_ratio"] == 0:
        return None
    dense_mib = row["activations_mib"] / row["activations_ratio"]
    ratio = (row["activations_mib"] - row["gathered_copy_mib"]) / dense_mib
    return dict.fromkeys(("median", "min", "max"), ratio)
