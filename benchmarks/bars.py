"""The goals for speed and memory on a CPU, and whether the results meet them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
Ratio = dict[str, float]

# The case for which the goals were set.
LAYER = {"tokens": 6304, "width": 384, "hidden": 1536, "experts": 8, "selected": 1, "capacity": 1.0}
BOTH = ("forward", "forward + backward")


@dataclass(frozen=True)
class Bar:
    """A goal and its measurement."""

    what: str  # is compared
    limit: float  # of the ratio
    at_most: bool  # the ratio must be at most `limit`, otherwise at least
    command: str  # measures it
    found: Ratio | None  # {"median", "min", "max"} of the ratio; None: not measured

    @property
    def goal(self) -> str:
        return f"{'≤' if self.at_most else '≥'} {self.limit:.2f}"

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

    for dtype, limits in (("float32", (1.05, 1.05)), ("bfloat16", (1.12, 1.15))):
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
    return found


def _memory(row: Row | None) -> Ratio | None:
    """Activations less one gathered copy of the kept rows, over the dense layer's: a count, without spread."""
    if row is None or row["activations_ratio"] == 0:
        return None
    dense_mib = row["activations_mib"] / row["activations_ratio"]
    ratio = (row["activations_mib"] - row["gathered_copy_mib"]) / dense_mib
    return dict.fromkeys(("median", "min", "max"), ratio)
