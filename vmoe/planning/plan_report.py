"""The plan as tables for the terminal and as JSON."""

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any

from rich.console import Console

from vmoe.distributed.mesh import MeshSize
from vmoe.models.flops import count_parameters
from vmoe.planning.hardware import GiB
from vmoe.planning.planner import Candidate, Planner
from vmoe.utils.tables import MetricTable


def show(
    console: Console, planner: Planner, ranked: list[Candidate], impossible: dict[MeshSize, str], top: int
) -> None:
    """Prints the plan: the `top` best of the `ranked` candidates, and why others are left out."""
    line = partial(console.print, highlight=False, markup=False)
    (total, active), times = count_parameters(planner.model), planner.config.train.accumulate_steps
    line(
        f"{total / 1e6:,.1f} M parameters, {active / 1e6:,.1f} M active; batch {planner.config.data.loader.batch_size} "
        f"= {planner.world} processes x {planner.local_batch}{f', accumulated {times} times' if times > 1 else ''}; "
        f"{planner.precision}; {planner.config.optim.name}"
    )
    for note in planner.notes:
        line(f"note: {note}")
    fitting = [one for one in ranked if one.fits]
    if not fitting:
        line(
            f"Nothing fits: the smallest, {too_large(ranked[0])}. Take more or larger GPUs, a smaller batch with "
            "train.accumulate_steps, or another optimizer."
        )
    shown = (fitting or ranked)[:top]
    for table in _tables(shown, planner.hardware.usable):
        console.print(table)
    if len(fitting) > len(shown):
        line(f"{len(fitting) - len(shown)} more fit (--top shows them).")
    if 0 < len(fitting) < len(ranked):
        line(f"{len(ranked) - len(fitting)} do not fit; the nearest, {too_large(ranked[len(fitting)])}.")
    for reason in dict.fromkeys(impossible.values()):
        meshes = [str(mesh) for mesh, own in impossible.items() if own == reason]
        line(f"{len(meshes)} are impossible: {reason} ({meshes[0]}{', ...' if meshes[1:] else ''}).")
    if fitting:
        options = " ".join(f"--parallel.{name} {size}" for name, size in vars(fitting[0].mesh).items())
        line(f"Best: {options} --train.grad_checkpointing {str(fitting[0].grad_checkpointing).lower()}")


def _tables(shown: list[Candidate], usable: float) -> Iterator[MetricTable]:
    """Tables with the columns of kinds that are not zero everywhere."""
    meshes = "Meshes (dp_replicate x dp_shard x ep), best first; ckpt: train.grad_checkpointing"
    memory = f"GiB of one process when most is needed, of {usable / GiB:.1f} usable"
    for title, form, unit, rows in (
        (meshes, ".3g", 1, [{"GiB": one.total / GiB, "s/step": one.step_seconds} for one in shown]),
        (memory, ".2f", GiB, [one.memory for one in shown]),
        ("GB that one process sends in a step", ".2f", 1e9, [one.traffic for one in shown]),
        ("Milliseconds of a step (memory: its bandwidth)", ".3g", 1e-3, [one.seconds for one in shown]),
    ):
        kinds = list(dict.fromkeys(kind for row in rows for kind, value in row.items() if value))
        table = MetricTable(title, ["mesh", "ckpt", *kinds], keys=2)
        for one, row in zip(shown, rows):
            name = " x ".join(map(str, vars(one.mesh).values()))
            cells = (f"{row.get(kind, 0) / unit:{form}}" for kind in kinds)
            table.add_row(name, "yes" if one.grad_checkpointing else "no", *cells)
        if kinds:
            yield table


def too_large(candidate: Candidate) -> str:
    """Why a candidate does not fit."""
    kind = max(candidate.memory, key=candidate.memory.__getitem__)
    return (
        f"{candidate.mesh} {'with' if candidate.grad_checkpointing else 'without'} checkpointing, needs "
        f"{candidate.total / GiB:.0f} GiB of {candidate.usable / GiB:.0f}, most of it {kind} "
        f"({candidate.memory[kind] / GiB:.0f} GiB)"
    )


def as_json(planner: Planner, ranked: list[Candidate], impossible: dict[MeshSize, str]) -> dict[str, Any]:
    """The whole plan in bytes and seconds: candidates best first, and impossible meshes."""
    derived = ("fits", "total", "step_seconds")
    return {
        "processes": planner.world,
        "precision": planner.precision,
        "hardware": vars(planner.hardware),
        "candidates": [dataclasses.asdict(one) | {name: getattr(one, name) for name in derived} for one in ranked],
        "impossible": {str(mesh): reason for mesh, reason in impossible.items()},
    }
