"""The goals that were set for speed and memory, and what the results say of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
Figure = dict[str, float]

# The case for which the goals were set.
LAYER = {"tokens": 6304, "width": 384, "hidden": 1536, "experts": 8, "selected": 1, "capacity": 1.0}
BOTH = ("forward", "forward + backward")


@dataclass(frozen=True)
class Bar:
    """A goal.

    Attributes:
        what: is compared.
        limit: of the ratio.
        at_most: the ratio shall be `limit` at most; else at least.
        command: that measures it.
        found: {"median", "min", "max"} of the ratio; None: not measured.
    """

    what: str
    limit: float
    at_most: bool
    command: str
    found: Figure | None

    @property
    def goal(self) -> str:
        return f"{'≤' if self.at_most else '≥'} {self.limit:.2f}"

    @property
    def met(self) -> bool:
        assert self.found is not None
        return self.found["median"] <= self.limit if self.at_most else self.found["median"] >= self.limit


def bars(sections: Sequence[dict[str, Any]], kind: str) -> list[Bar]:
    """All goals for a device.

    Args:
        sections: of the device's results; among several that measure the same, the one that was finished last counts.
        kind: "cpu" or "cuda".
    """
    if kind == "cuda":
        return _for_cuda(sections)
    other = ("--compile", "--allocator", "--threads")  # the goals were set for none of these
    fitting = [section for section in sections if not any(option in section["command"] for option in other)]
    return _for_cpu(sorted(fitting, key=lambda section: section["finished"]))


def _find(sections: Sequence[dict[str, Any]], benchmark: str, **wanted: Any) -> Row | None:
    """The last row of a benchmark with these values."""
    rows = [row for section in sections if section["benchmark"] == benchmark for row in section["rows"]]
    fitting = [row for row in rows if all(row.get(name) == value for name, value in wanted.items())]
    return fitting[-1] if fitting else None


def _ratio(row: Row | None, other: str) -> Figure | None:
    return None if row is None else row["ratios"].get(other)


def _for_cpu(sections: Sequence[dict[str, Any]]) -> list[Bar]:
    found: list[Bar] = []

    def add(what: str, limit: float, benchmark: str, figure: Figure | None, at_most: bool = True) -> None:
        found.append(Bar(what, limit, at_most, f"python -m benchmarks.{benchmark}", figure))

    for dtype, limits in (("float32", (1.05, 1.05)), ("bfloat16", (1.10, 1.15))):
        for one_pass, limit in zip(BOTH, limits, strict=True):
            row = _find(sections, "layer", comparison="mlp", name="vmoe", dtype=dtype, **{"pass": one_pass}, **LAYER)
            add(f"layer / dense MLP, {dtype}, {one_pass}", limit, "layer", _ratio(row, "dense"))
    for dtype in ("float32", "bfloat16"):
        row = _find(sections, "layer", comparison="mlp", name="vmoe", dtype=dtype, **{"pass": BOTH[1]}, **LAYER)
        add(f"activations without one gathered copy / dense MLP's, {dtype}", 1.15, "layer", _memory(row))
    for one_pass, limit in (("inference", 0.95), ("training", 0.93)):
        size = {"batch": 32, "image_size": 224, "pass": one_pass}
        row = _find(sections, "model", name="dropless", dtype="float32", **size)
        figure = None if row is None else row["speed_ratio"]
        add(f"V-MoE S/16 / ViT-S/16, pictures per second, {one_pass}", limit, "model", figure, at_most=False)
    sizes = {name: LAYER[name] for name in ("tokens", "width", "hidden")}
    for one_pass in BOTH:
        wanted = {"name": "layer", "dtype": "float32", "pass": one_pass, **sizes}
        row = _find(sections, "scaling", comparison="experts", experts=128, **wanted)
        add(f"E = 128 / E = 8, {one_pass}", 1.25, "scaling", _ratio(row, "base"))
    for one_pass in BOTH:
        wanted = {"name": "layer, BPR", "dtype": "float32", "pass": one_pass, **LAYER}
        row = _find(sections, "dispatch", comparison="priority", **wanted)
        add(f"BPR / vanilla dispatch, whole layer, {one_pass}", 1.02, "dispatch", _ratio(row, "layer, vanilla"))
    for one_pass in BOTH:
        wanted = {"name": "experts", "dtype": "float32", "pass": one_pass, **sizes}
        row = _find(sections, "scaling", comparison="capacity", capacity=0.5, **wanted)
        add(f"capacity 0.5 / 1.0, time of the experts, {one_pass}", 0.56, "scaling", _ratio(row, "base"))
    return found


def _memory(row: Row | None) -> Figure | None:
    """Activations less one gathered copy of the kept rows, over the dense twin's: a count, without spread."""
    if row is None or row["activations_ratio"] == 0:
        return None
    dense_mib = row["activations_mib"] / row["activations_ratio"]
    ratio = (row["activations_mib"] - row["gathered_copy_mib"]) / dense_mib
    return dict.fromkeys(("median", "min", "max"), ratio)


def _for_cuda(sections: Sequence[dict[str, Any]]) -> list[Bar]:
    """Forward with backward in bfloat16 at the sizes that were measured, eager or compiled."""
    found = []
    for section in sections:
        for row in section["rows"]:
            if (row["comparison"], row.get("name"), row.get("pass")) != ("mlp", "vmoe", BOTH[1]):
                continue
            if row["dtype"] == "bfloat16":
                size = f"{row['tokens']} tokens, D = {row['width']}, E = {row['experts']}, K = {row['selected']}"
                what = f"layer / dense MLP, {size}, forward + backward"
                found.append(Bar(what, 1.15, True, section["command"], row["ratios"]["dense"]))
    return found
