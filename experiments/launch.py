"""Makes the runs of an experiment: `python -m experiments.launch experiments/NAME.yaml`; again to continue.

What is finished is not made again. Each finished run leaves a record in experiments/results, from which
`python -m experiments.report` makes docs/results.md.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from yaml import YAMLError

from experiments.plan import OUTPUT, ROOT, Cell, Experiment, load, matches, result_settings
from experiments.records import (
    JOB,
    Records,
    check_evaluations,
    check_inputs,
    check_settings,
    make_record,
    read_records,
    records_file,
    write_record,
)
from vmoe.data.workers import cpu_cores
from vmoe.training.config import Config
from vmoe.utils.config import ConfigError, read_config
from vmoe.utils.files import atomic_file, read_json
from vmoe.utils.safe_yaml import parse_yaml

LAST_LINES = 12  # of a failed run's log


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 1 if a run failed, 2 for a mistake, 130 if it was stopped."""
    args = parse_arguments(argv)
    try:
        experiment, cells = load(args.experiment)
        sweep = Sweep(experiment, cells, args)
        sweep.check_unchanged()
        if args.list:
            return sweep.show()
        return sweep.submit() if args.slurm is not None else sweep.run()
    except (ValueError, OSError) as error:
        print(f"experiments.launch: error: {error}", file=sys.stderr)
        return 2


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m experiments.launch", description=__doc__.splitlines()[0])
    parser.add_argument("experiment", type=Path, help="a YAML of experiments/, see experiments/README.md")
    parser.add_argument("--output_dir", type=Path, default=OUTPUT, help="folder of the runs (runs/experiments)")
    parser.add_argument("--only", metavar="GLOB", help="runs whose NAME or NAME-seedN matches, with * and ?")
    parser.add_argument("--list", action="store_true", help="only show the runs, their state and command")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side (%(default)s)")
    parser.add_argument("--threads", type=int, help="PyTorch's threads of each run; default: the cores over --jobs")
    parser.add_argument(
        "--slurm",
        nargs="*",
        metavar="KEY=VALUE",
        help="submit each run as a job by submitit, with its parameters, such as slurm_partition=gpu timeout_min=60",
    )
    args = parser.parse_args(argv)
    for name in ("jobs", "threads"):
        if (value := getattr(args, name)) is not None and value < 1:
            parser.error(f"--{name} must be at least 1, got {value}")
    return args


class Sweep:
    """The runs of an experiment, which of them are to be made, and making them."""

    def __init__(self, experiment: Experiment, cells: list[Cell], args: argparse.Namespace) -> None:
        self.experiment, self.args, self.output = experiment, args, args.output_dir.resolve()
        self.records_file = records_file(experiment, cells[0].experiment, self.output)
        self.all_cells = cells
        self.cells = [cell for cell in cells if args.only is None or matches(args.only, cell.run, cell.name)]
        if not self.cells:
            names = ", ".join(cell.name for cell in cells)
            raise ConfigError(f"--only {args.only}: matches none of {names}")
        self.running: dict[subprocess.Popen, tuple[Cell, float]] = {}  # and when it began
        self.failed: list[Cell] = []
        self.stopping: list[subprocess.Popen] = []  # to stop
        self.signals = 0  # Ctrl-C and SIGTERM so far

    @property
    def records(self) -> Records:
        return read_records(self.records_file)

    def check_unchanged(self) -> None:
        """ConfigError: a run was made, or begun, with other settings, or from other data."""
        records, file = self.records, self.args.experiment
        cells = list(self.cells)
        for cell in cells:
            cells += [parent for parent in cell.needs if parent not in cells]
            folder, line = cell.folder(self.output), f"its line in {self.records_file}"
            if (record := records.get((cell.run, cell.seed))) is not None:
                check_settings(cell, record["settings"], line, file)
                if not (folder / "summary.json").is_file():
                    check_evaluations(cell, record, line, file)
            if (folder / "config.yaml").is_file():
                check_settings(cell, self.begun_settings(cell, folder), f"its folder {folder}", file)
        check_inputs(self.all_cells, records, self.records_file)

    @staticmethod
    def begun_settings(cell: Cell, folder: Path) -> dict[str, Any]:
        """The settings with which the run in a folder began."""
        job = read_json(folder / JOB, kind=dict) if (folder / JOB).is_file() else {}
        if "settings" in job:
            return job["settings"]
        before = result_settings(read_config(Config, ["--config", str(folder / "config.yaml")]))  # of an older version
        return before | {key: cell.settings[key] for key in cell.references}  # there it is a path

    def pending(self) -> list[Cell]:
        """The runs to make, each after those that it needs."""
        records, pending = self.records, []

        def add(cell: Cell) -> None:
            for parent in cell.needs:
                if not (parent.folder(self.output) / "summary.json").is_file():
                    add(parent)
            if cell not in pending:
                pending.append(cell)

        for cell in self.cells:
            record = records.get((cell.run, cell.seed))
            made = record["evaluations"] if record else {}
            missing = [name for name, one in cell.evaluations.items() if made.get(name) != one["digest"]]
            if record is not None and missing and not (cell.folder(self.output) / "summary.json").is_file():
                print(
                    f"{cell.name}: its record lacks the evaluation {', '.join(missing)}, and its folder is not here; "
                    f"remove its line in {self.records_file} to make it again"
                )
            elif record is None or missing:
                add(cell)
        return pending

    def show(self) -> int:
        """Lists the runs."""
        records, pending = self.records, self.pending()
        for cell in self.cells:
            begun = (cell.folder(self.output) / "config.yaml").is_file()
            state = "finished" if cell not in pending else "begun" if begun else "to do"
            if cell in pending and (cell.run, cell.seed) in records:
                state = "to evaluate"
            print(f"{cell.name}: {state}\n    {cell.command()}")
        return 0

    def run(self) -> int:
        """Makes the runs on this machine; returns the exit code."""
        waiting = self.pending()
        print(f"{len(waiting)} of {len(self.cells)} runs to make", flush=True)
        previous = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            while self.running or (waiting and not self.signals):
                self._fill(waiting)
                for process, (cell, began) in list(self.running.items()):
                    if (code := process.poll()) is not None:
                        del self.running[process]
                        self._finish(cell, code, time.monotonic() - began)
                    elif self.signals and process not in self.stopping:
                        process.terminate()
                        self.stopping.append(process)
                    elif self.signals > 1:
                        os.killpg(process.pid, signal.SIGKILL)
                time.sleep(0.05)
        finally:
            for process in self.running:  # after an error here, such as a full disk
                process.terminate()
            for number, handler in previous.items():
                signal.signal(number, handler)
        if self.signals:
            print("stopped; the same command continues", file=sys.stderr)
            return 130
        if self.failed:
            names = ", ".join(cell.name for cell in self.failed)
            print(f"{len(self.failed)} runs are not finished: {names}", file=sys.stderr)
        return 1 if self.failed else 0

    def _fill(self, waiting: list[Cell]) -> None:
        """Starts runs that have what they need, until `jobs` are running."""
        while not self.signals and len(self.running) < self.args.jobs and (cell := self._next(waiting)):
            try:
                process = self.start(cell)
            except BlockingIOError:
                print(f"{cell.name}: is being made by another launcher", file=sys.stderr, flush=True)
                self.failed.append(cell)
                continue
            print(f"{cell.name}: started, see {cell.folder(self.output) / 'log.txt'}", flush=True)
            self.running[process] = (cell, time.monotonic())

    def _next(self, waiting: list[Cell]) -> Cell | None:
        """Takes the next run that has what it needs; those whose needs failed are left out."""
        under_way = [*waiting, *(cell for cell, _ in self.running.values())]
        for cell in list(waiting):
            lost = [parent.name for parent in cell.needs if parent in self.failed]
            if lost:
                print(f"{cell.name}: not made, since it needs {lost[0]}", file=sys.stderr)
                waiting.remove(cell)
                self.failed.append(cell)
            elif not any(parent in under_way for parent in cell.needs):
                waiting.remove(cell)
                return cell
        return None

    def start(self, cell: Cell) -> subprocess.Popen:
        """Starts a run in a process of its own, which gets no Ctrl-C from the terminal, but a signal from here.

        BlockingIOError: one goes on in the folder already; it holds the lock of the log, as its output.
        """
        folder = cell.folder(self.output)
        folder.mkdir(parents=True, exist_ok=True)
        count = self.args.threads or (max(1, cpu_cores() // self.args.jobs) if self.args.jobs > 1 else None)
        threads = {} if count is None else {"OMP_NUM_THREADS": str(count)}
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, **threads, "PYTHONPATH": path}
        with open(folder / "log.txt", "ab") as log:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.write_job(cell, folder)
            return subprocess.Popen(
                self.worker(folder), cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
            )

    def write_job(self, cell: Cell, folder: Path) -> None:
        """Makes a run's folder, with what its worker is to do."""
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(folder / JOB) as temporary:
            job = {"train": cell.arguments(self.output), "evaluate": cell.evaluations_in(self.output)}
            job["settings"] = cell.settings
            temporary.write_text(json.dumps(job, indent=1) + "\n", encoding="utf-8")

    @staticmethod
    def worker(folder: Path) -> list[str]:
        """The command that makes a run in its folder."""
        return [sys.executable, "-m", "experiments.worker", str(folder)]

    def _stop(self, *_: Any) -> None:
        """Lets each run save a checkpoint and end; at a second signal they end at once."""
        self.signals += 1
        if self.signals == 1:
            print("\nstopping after this step of each run; Ctrl-C again stops at once", file=sys.stderr, flush=True)

    def _finish(self, cell: Cell, code: int, seconds: float) -> None:
        """Writes the record of a run that ended, or shows why there is none."""
        folder = cell.folder(self.output)
        if code == 0 and (folder / "summary.json").is_file():
            record = make_record(cell, folder)
            write_record(self.records_file, record)
            shown = ", ".join(f"{name} {record['metrics'].get(name, 'missing')}" for name in self.experiment.metrics)
            print(f"{cell.name}: finished, {shown}, {seconds:.0f} s", flush=True)
        elif not self.signals:
            self.failed.append(cell)
            lines = (folder / "log.txt").read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:]
            ended = f"failed with exit code {code}" if code else "stopped before its last step; launch it again"
            text = "\n".join([f"{cell.name}: {ended}", *(f"    | {line}" for line in lines)])
            print(text, file=sys.stderr, flush=True)

    def submit(self) -> int:
        """Submits the runs to SLURM by submitit: each job is this command for one run."""
        try:
            import submitit
        except ModuleNotFoundError:
            raise ConfigError("--slurm needs submitit: from a checkout pip install -e '.[slurm]'") from None
        try:
            parameters = {key: parse_yaml(value) for key, value in (word.split("=", 1) for word in self.args.slurm)}
        except (ValueError, YAMLError):
            raise ConfigError(f"--slurm: write KEY=VALUE, got {' '.join(self.args.slurm)}") from None
        cluster, jobs = parameters.pop("cluster", "slurm"), {}
        for cell in self.pending():
            after = [jobs[parent.name] for parent in cell.needs if parent.name in jobs]
            needs = {"slurm_additional_parameters": {"dependency": f"afterok:{':'.join(after)}"}} if after else {}
            words = ["--output_dir", str(self.output), "--only", cell.name]
            command = [sys.executable, "-m", "experiments.launch", str(self.args.experiment.resolve()), *words]
            try:
                executor = submitit.AutoExecutor(folder=self.output / "slurm", cluster=cluster)
                executor.update_parameters(name=cell.name, **parameters, **needs)
                jobs[cell.name] = executor.submit(subprocess.run, command, check=True, cwd=ROOT).job_id
            except (RuntimeError, NameError, TypeError) as error:  # no SLURM here, or no such parameter
                raise ConfigError(f"--slurm: {error}") from None
            print(f"{cell.name}: job {jobs[cell.name]}")
        return 0


if __name__ == "__main__":
    sys.exit(main())
