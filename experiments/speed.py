"""Measures the training throughput of an experiment's models: `python -m experiments.speed experiments/NAME.yaml`.

Each round trains every run for some steps, one after the other; nothing else should run meanwhile. The results are in
experiments/results/NAME.speed.json, from which the report fills its column images/s. Runs that need another run are
skipped.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.plan import RESULTS, ROOT, Cell, load
from experiments.worker import about_here
from vmoe.evaluation.results_file import write_json
from vmoe.utils.files import read_json


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 1 if a run failed or a setting is wrong."""
    parser = argparse.ArgumentParser(prog="python -m experiments.speed", description=__doc__.splitlines()[0])
    parser.add_argument("experiment", type=Path, help="a YAML of experiments/")
    parser.add_argument("--rounds", type=int, default=3, help="times that each run is trained (%(default)s)")
    parser.add_argument("--steps", type=int, default=60, help="of each time (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch (%(default)s)")
    args = parser.parse_args(argv)
    for name in ("rounds", "steps", "threads"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    try:
        _, cells = load(args.experiment, has_runs=True)
        measure([cell for cell in cells if cell.seed == cells[0].seed and not cell.needs], args)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"experiments.speed: error: {error}", file=sys.stderr)
        return 1
    return 0


def measure(cells: Sequence[Cell], args: argparse.Namespace) -> None:
    """Writes what all runs gave in all rounds."""
    found: dict[str, list[float]] = defaultdict(list)
    for number in range(args.rounds):
        for cell in cells:
            found[cell.run].append(images_per_second(cell, args.steps, args.threads))
            print(f"round {number + 1}, {cell.run}: {found[cell.run][-1]:.0f} images/s", flush=True)
    about = {**about_here("auto"), "threads": args.threads, "steps": args.steps}
    write_json({**about, "images_per_second": found}, speed_file(args.experiment.stem))


def images_per_second(cell: Cell, steps: int, threads: int) -> float:
    """The throughput of a short training run, as its summary says it; RuntimeError: it failed."""
    with tempfile.TemporaryDirectory() as folder:
        *words, _, _ = cell.arguments(Path(folder))  # without --output_dir
        short = {"train.epochs": "null", "train.steps": steps, "train.eval_every": 0, "output_dir": folder}
        words += [word for key, value in short.items() for word in (f"--{key}", str(value))]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        done = subprocess.run(
            [sys.executable, ROOT / "train.py", *words], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"run {cell.run!r} failed: {(done.stderr.strip() or done.stdout.strip())[-2000:]}")
        return round(read_json(Path(folder, "summary.json"), kind=dict)["images_per_second"], 1)


def speed_file(experiment: str) -> Path:
    return RESULTS / f"{experiment}.speed.json"


def read_speed(experiment: str) -> dict[str, Any]:
    """What `measure` wrote of an experiment; without runs if it was not measured."""
    file = speed_file(experiment)
    return read_json(file, kind=dict) if file.is_file() else {"images_per_second": {}}


if __name__ == "__main__":
    sys.exit(main())
