"""The plan as tables for the terminal and as JSON."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Collection
from typing import Any

from rich.console import Console

from vmoe.planning.candidates import Candidate, Planner, Refused, too_large
from vmoe.planning.hardware import GiB
from vmoe.utils.tables import FigureTable

KINDS = {
    "weights": "weights",
    "gradients": "grads",
    "optimizer": "optim.",
    "ema": "EMA",
    "activations": "activ.",
    "all_to_all": "a2a",
    "low_precision_copies": "copies",
    "gathered_weights": "gathered",
    "loss": "loss",
    "input": "input",
    "optimizer_step": "step",
}
TRAFFIC = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
PARTS = {
    "products": "products",
    "memory": "memory",
    "launches": "launch",
    "all_to_all": "a2a",
    "weights_and_gradients": "weights",
    "optimizer": "optim.",
}


def show(console: Console, planner: Planner, ranked: list[Candidate], refused: list[Refused], top: int) -> None:
    """Prints the plan.

    Args:
        console: where to.
        planner: what was planned.
        ranked: all candidates, best first.
        refused: meshes that cannot be.
        top: candidates to list.
    """

    def line(text: str) -> None:
        console.print(text, highlight=False, markup=False)

    subject, hardware = planner.subject, planner.hardware
    line(
        f"{subject.total / 1e6:,.1f} M parameters, {subject.active / 1e6:,.1f} M active; batch "
        f"{planner.config.data.loader.batch_size} = {planner.world} processes x {planner.local_batch}"
        f"{_accumulated(planner)}; {planner.precision}; {planner.config.optim.name}"
    )
    for note in subject.notes:
        line(f"note: {note}")
    fitting = [candidate for candidate in ranked if candidate.fits]
    if not fitting:
        least = ranked[0]
        line(
            f"Nothing fits: the smallest, {least.mesh} {_checkpointing(least)}, {too_large(least)}. Take more or "
            "larger GPUs, a smaller batch with train.accumulate_steps, or another optimizer."
        )
    shown = (fitting or ranked)[:top]
    tables = (_overview(shown), _memory_table(shown, hardware.usable), _traffic_table(shown), _time_table(shown))
    for table in tables:
        if len(table.header) > table.keys:  # one process sends nothing
            console.print(table)
    _leftovers(line, ranked, refused, len(fitting) - len(shown))
    if fitting:
        best = fitting[0]
        checkpointing = str(best.grad_checkpointing).lower()
        line(
            f"Best: --parallel.dp_replicate {best.mesh.dp_replicate} --parallel.dp_shard {best.mesh.dp_shard} "
            f"--parallel.ep {best.mesh.ep} --train.grad_checkpointing {checkpointing}"
        )


def _accumulated(planner: Planner) -> str:
    times = planner.config.train.accumulate_steps
    return f", accumulated {times} times" if times > 1 else ""


def _checkpointing(candidate: Candidate) -> str:
    return "with checkpointing" if candidate.grad_checkpointing else "without checkpointing"


def _mesh(candidate: Candidate) -> list[str]:
    mesh = candidate.mesh
    return [f"{mesh.dp_replicate} x {mesh.dp_shard} x {mesh.ep}", "yes" if candidate.grad_checkpointing else "no"]


def _table(title: str, *columns: str, left: Collection[str] = ()) -> FigureTable:
    return FigureTable(title, ["mesh", "ckpt", *columns], keys=2, left=left)


def _overview(shown: list[Candidate]) -> FigureTable:
    title = "Meshes (dp_replicate x dp_shard x ep), best first; ckpt: train.grad_checkpointing"
    columns = ("GiB", "M params", "s/step", "TFLOP", "TFLOP/s", "bound by")
    table = _table(title, *columns, left=["bound by"])
    for one in shown:
        share = one.seconds[one.bound] / one.step_seconds
        table.add_row(
            *_mesh(one),
            f"{one.total / GiB:.1f}",
            f"{one.parameters / 1e6:,.0f}",
            f"{one.step_seconds:.3g}",
            f"{one.flops / 1e12:,.1f}",
            f"{one.flops / 1e12 / one.step_seconds:,.0f}",
            f"{PARTS[one.bound]} ({share:.0%})",
        )
    return table


def _memory_table(shown: list[Candidate], usable: float) -> FigureTable:
    kinds = [kind for kind in KINDS if any(one.memory[kind] for one in shown)]
    title = f"GiB of one process when most is needed, of {usable / GiB:.1f} usable"
    table = _table(title, *(KINDS[kind] for kind in kinds), "when", left=["when"])
    for one in shown:
        table.add_row(*_mesh(one), *(f"{one.memory[kind] / GiB:.2f}" for kind in kinds), one.moment.partition(" ")[0])
    return table


def _traffic_table(shown: list[Candidate]) -> FigureTable:
    kinds = [kind for kind in TRAFFIC if any(one.traffic.get(kind) for one in shown)]
    names = (kind.replace("_", "-").replace("all-to-all", "a2a") for kind in kinds)
    table = _table("GB that one process sends in a step", *names)
    for one in shown:
        table.add_row(*_mesh(one), *(f"{one.traffic.get(kind, 0) / 1e9:.2f}" for kind in kinds))
    return table


def _time_table(shown: list[Candidate]) -> FigureTable:
    table = _table("Milliseconds of a step (memory: its bandwidth)", *PARTS.values())
    for one in shown:
        table.add_row(*_mesh(one), *(f"{one.seconds[part] * 1e3:.3g}" for part in PARTS))
    return table


def _leftovers(line, ranked: list[Candidate], refused: list[Refused], hidden: int) -> None:
    """What the tables leave out, in a line for each reason."""
    if hidden > 0:
        line(f"{hidden} more fit (--top shows them).")
    large = [candidate for candidate in ranked if not candidate.fits]
    if large and len(large) < len(ranked):
        nearest = f"{large[0].mesh} {_checkpointing(large[0])}"
        line(f"{len(large)} do not fit; the nearest, {nearest}, {too_large(large[0])}.")
    reasons = defaultdict(list)
    for one in refused:
        reasons[one.reason].append(one.mesh)
    for reason, meshes in reasons.items():
        line(f"{len(meshes)} cannot be: {reason} ({meshes[0]}{', ...' if len(meshes) > 1 else ''}).")


def as_json(planner: Planner, ranked: list[Candidate], refused: list[Refused]) -> dict[str, Any]:
    """The whole plan: settings, candidates best first, and meshes that cannot be. Bytes and seconds."""
    subject = planner.subject
    return {
        "processes": planner.world,
        "batch_size_per_process": planner.local_batch,
        "precision": planner.precision,
        "optimizer": planner.config.optim.name,
        "hardware": dataclasses.asdict(planner.hardware),
        "parameters_total": subject.total,
        "parameters_active": subject.active,
        "notes": subject.notes,
        "candidates": [
            {
                "dp_replicate": one.mesh.dp_replicate,
                "dp_shard": one.mesh.dp_shard,
                "ep": one.mesh.ep,
                "grad_checkpointing": one.grad_checkpointing,
                "fits": one.fits,
                "reason": None if one.fits else too_large(one),
                "parameters_per_process": one.parameters,
                "memory_bytes": round(one.total),
                "memory_bytes_by_kind": {kind: round(size) for kind, size in one.memory.items()},
                "moment": one.moment,
                "flops_per_step": one.flops,
                "traffic_bytes": {kind: round(size) for kind, size in one.traffic.items()},
                "step_seconds": one.step_seconds,
                "seconds_by_part": one.seconds,
                "bound_by": one.bound,
            }
            for one in ranked
        ],
        "impossible": [
            {"dp_replicate": r.mesh.dp_replicate, "dp_shard": r.mesh.dp_shard, "ep": r.mesh.ep, "reason": r.reason}
            for r in refused
        ],
    }
