"""The plan as tables for the terminal and as JSON."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from typing import Any

from rich.console import Console

from vmoe.distributed.mesh import MeshSize
from vmoe.planning.hardware import GiB
from vmoe.planning.planner import Candidate, Planner
from vmoe.utils.tables import MetricTable

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
TRAFFIC = {"all_reduce": "all-reduce", "all_gather": "all-gather", "reduce_scatter": "reduce-scatter",
           "all_to_all": "a2a"}  # fmt: skip
PARTS = {"matmul": "matmul", "memory": "memory", "launch": "launch", "all_to_all": "a2a",
         "weights_and_gradients": "weights", "optimizer": "optim."}  # fmt: skip


def show(
    console: Console, planner: Planner, ranked: list[Candidate], impossible: dict[MeshSize, str], top: int
) -> None:
    """Prints the plan: the `top` best of the `ranked` candidates, and why others are left out."""

    def line(text: str) -> None:
        console.print(text, highlight=False, markup=False)

    model, times = planner.model, planner.config.train.accumulate_steps
    line(
        f"{model.total / 1e6:,.1f} M parameters, {model.active / 1e6:,.1f} M active; batch "
        f"{planner.config.data.loader.batch_size} = {planner.world} processes x {planner.local_batch}"
        f"{f', accumulated {times} times' if times > 1 else ''}; {planner.precision}; {planner.config.optim.name}"
    )
    for note in model.notes:
        line(f"note: {note}")
    fitting = [one for one in ranked if one.fits]
    if not fitting:
        line(
            f"Nothing fits: the smallest, {_name(ranked[0])}, {too_large(ranked[0])}. Take more or "
            "larger GPUs, a smaller batch with train.accumulate_steps, or another optimizer."
        )
    shown = (fitting or ranked)[:top]
    for table in _tables(shown, planner.hardware.usable):
        if len(table.header) > table.keys:  # one process sends nothing
            console.print(table)
    if len(fitting) > len(shown):
        line(f"{len(fitting) - len(shown)} more fit (--top shows them).")
    if 0 < len(fitting) < len(ranked):
        nearest = ranked[len(fitting)]
        line(f"{len(ranked) - len(fitting)} do not fit; the nearest, {_name(nearest)}, {too_large(nearest)}.")
    meshes = defaultdict(list)
    for mesh, reason in impossible.items():
        meshes[reason].append(mesh)
    for reason, own in meshes.items():
        line(f"{len(own)} are impossible: {reason} ({own[0]}{', ...' if len(own) > 1 else ''}).")
    if fitting:
        options = " ".join(f"--parallel.{name} {size}" for name, size in vars(fitting[0].mesh).items())
        line(f"Best: {options} --train.grad_checkpointing {str(fitting[0].grad_checkpointing).lower()}")


def _tables(shown: list[Candidate], usable: float) -> list[MetricTable]:
    kinds = [kind for kind in KINDS if any(one.memory[kind] for one in shown)]
    sent = [kind for kind in TRAFFIC if any(one.traffic.get(kind) for one in shown)]
    title = "Meshes (dp_replicate x dp_shard x ep), best first; ckpt: train.grad_checkpointing"
    contents = {
        title: ["GiB", "M params", "s/step", "TFLOP", "TFLOP/s", "bound by"],
        f"GiB of one process when most is needed, of {usable / GiB:.1f} usable": [*map(KINDS.get, kinds), "when"],
        "GB that one process sends in a step": [TRAFFIC[kind] for kind in sent],
        "Milliseconds of a step (memory: its bandwidth)": list(PARTS.values()),
    }
    tables = [MetricTable(title, ["mesh", "ckpt", *columns], keys=2, left=["bound by", "when"])
              for title, columns in contents.items()]  # fmt: skip
    for one in shown:
        rows = [
            [f"{one.total / GiB:.1f}", f"{one.parameters / 1e6:,.0f}", f"{one.step_seconds:.3g}",
             f"{one.flops / 1e12:,.1f}", f"{one.flops / 1e12 / one.step_seconds:,.0f}",
             f"{PARTS[one.bound]} ({one.seconds[one.bound] / one.step_seconds:.0%})"],
            [*(f"{one.memory[kind] / GiB:.2f}" for kind in kinds), one.moment.partition(" ")[0]],
            [f"{one.traffic.get(kind, 0) / 1e9:.2f}" for kind in sent],
            [f"{one.seconds[part] * 1e3:.3g}" for part in PARTS],
        ]  # fmt: skip
        key = [" x ".join(map(str, vars(one.mesh).values())), "yes" if one.grad_checkpointing else "no"]
        for table, row in zip(tables, rows, strict=True):
            table.add_row(*key, *row)
    return tables


def _name(candidate: Candidate) -> str:
    return f"{candidate.mesh} {'with' if candidate.grad_checkpointing else 'without'} checkpointing"


def too_large(candidate: Candidate) -> str:
    """Why a candidate does not fit."""
    kind = max(candidate.memory, key=candidate.memory.__getitem__)
    return (
        f"needs {candidate.total / GiB:.0f} GiB of {candidate.usable / GiB:.0f}, most of it {kind.replace('_', ' ')} "
        f"({candidate.memory[kind] / GiB:.0f} GiB)"
    )


def as_json(planner: Planner, ranked: list[Candidate], impossible: dict[MeshSize, str]) -> dict[str, Any]:
    """The whole plan in bytes and seconds: settings, candidates best first, and impossible meshes."""

    def entry(one: Candidate) -> dict[str, Any]:
        names = ("fits", "total", "step_seconds", "bound")
        derived = {name: getattr(one, name) for name in names}
        reason = None if one.fits else too_large(one)
        return {**dataclasses.asdict(one), **derived, "mesh": vars(one.mesh), "reason": reason}

    return {
        "processes": planner.world,
        "batch_size_per_process": planner.local_batch,
        "precision": planner.precision,
        "optimizer": planner.config.optim.name,
        "hardware": dataclasses.asdict(planner.hardware),
        "parameters": {"total": planner.model.total, "active": planner.model.active},
        "notes": planner.model.notes,
        "candidates": [entry(one) for one in ranked],
        "impossible": [{"mesh": vars(mesh), "reason": reason} for mesh, reason in impossible.items()],
    }
