"""Kills a run with SIGKILL again and again, and looks whether it still ends as if nothing had happened.

    python -m tests.chaos.chaos --kills 30                        # one process
    python -m tests.chaos.chaos --kills 10 --processes 2          # torchrun's agent starts them again

Trains a tiny V-MoE (router noise, drop path, moving average, data workers) once undisturbed, and once killed at moments
that `--seed` draws: a random time after the start, while a checkpoint is written, or during an evaluation. Each time
the same command is started again. At the end the weights, their average and the optimizer must be the same bit by bit,
and metrics.jsonl must have each step once, with the same figures. Prints where each kill hit; exit code 1 if anything
differs.

With `--processes`, one worker at a time is killed, and torchrun's agent stops the others and starts all of them again.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from tests.forked import Fork, Forks
from vmoe.models.manifest import list_checkpoints
from vmoe.training.logger import read_metrics

from .tiny import arguments, make_images, write_config

CLOCKS = ("images_per_second", "data_wait_share")
LONGEST = 240.0  # seconds without a step, a checkpoint or an end: it hangs


@dataclass
class Kill:
    """A SIGKILL: what it aimed at, and what it hit."""

    aim: str
    hit: str
    step: int


class Chaos:
    """A run that is killed.

    Args:
        forks: starts the commands.
        folder: for the data, both runs and what they print.
        settings: of the run, besides those of `tiny.CONFIG`.
        processes: of the job.
        seed: of the moments.
    """

    def __init__(self, forks: Forks, folder: Path, settings: dict[str, Any], processes: int = 1, seed: int = 0) -> None:
        self.forks, self.folder, self.settings, self.processes = forks, folder, settings, processes
        self.config = write_config(folder / "config.yaml", make_images(folder / "images"))
        self.random = random.Random(seed)
        self.kills: list[Kill] = []
        self.seconds = 0.0  # of the undisturbed run

    def undisturbed(self) -> Path:
        """Trains without a kill; returns the run's folder."""
        run, began = self.folder / "undisturbed", time.monotonic()
        self._expect_success(self._start(run, 0), run)
        self.seconds = time.monotonic() - began
        return run

    def disturbed(self, kills: int) -> Path:
        """Trains with so many kills; returns the run's folder."""
        run = self.folder / "disturbed"
        if self.processes > 1:
            return self._kill_workers(run, kills)
        for number in range(kills):
            process = self._start(run, 0)
            self._kill(process, run, kills - number)
        self._expect_success(self._start(run, 0), run)
        return run

    def _start(self, run: Path, restarts: int) -> Fork:
        torchrun = None
        if self.processes > 1:
            torchrun = {"min_nodes": 1, "max_nodes": 1, "nproc_per_node": self.processes, "max_restarts": restarts}
            torchrun |= {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "run_id": run.name}
        self._forget(run)
        env = {"PIDS": str(self.folder), "EVALUATING": str(self.folder / "evaluating")}
        return self.forks.start(arguments(self.config, run, **self.settings), self._output(run), torchrun, **env)

    def _output(self, run: Path) -> Path:
        return self.folder / f"{run.name}.txt"

    def _expect_success(self, process: Fork, run: Path) -> None:
        if process.wait(1800) != 0:
            raise AssertionError(f"exit code {process.code}; it printed\n{self._output(run).read_text()[-3000:]}")

    def _kill(self, process: Fork, run: Path, left: int) -> None:
        """Waits for one of the moments, then kills."""
        aim = self._wait(run, left, lambda: process.poll() is not None)
        self.kills.append(Kill(aim, self._where(run), steps_done(run)))
        process.signal(signal.SIGKILL)
        if process.wait() != -signal.SIGKILL:
            raise AssertionError(f"it ended before the kill; it printed\n{self._output(run).read_text()[-3000:]}")

    def _kill_workers(self, run: Path, kills: int) -> Path:
        agent = self._start(run, kills)
        for number in range(kills):
            began, victim = time.monotonic(), self.random.randrange(self.processes)
            while not (pid := self._worker(victim)):
                assert agent.poll() is None, self._output(run).read_text()[-3000:]
                assert time.monotonic() - began < LONGEST, "the workers were not started again"
                time.sleep(0.01)
            aim = self._wait(run, kills - number, lambda: agent.poll() is not None)
            self.kills.append(Kill(aim, self._where(run), steps_done(run)))
            os.kill(pid, signal.SIGKILL)
            self._forget(run)
        self._expect_success(agent, run)
        return run

    def _worker(self, rank: int) -> int | None:
        """The id of a worker once all of them are there."""
        files = [self.folder / f"pid.{each}" for each in range(self.processes)]
        if not all(file.exists() and file.read_text() for file in files):
            return None
        return int(files[rank].read_text())

    def _wait(self, run: Path, left: int, ended: Any) -> str:
        """Until the next kill; returns what it aims at.

        So that the kills spread over the run and do not end it: at most a share of the steps that are left.
        """
        aim = self.random.choices(["any time", "saving", "evaluating"], [0.5, 0.35, 0.15])[0]
        began, first = time.monotonic(), steps_done(run)
        target = first + self.random.uniform(0, 2) * max(0, self.settings["train__steps"] - first) / (left + 1)
        delay = self.random.uniform(0, 0.03)
        starting = aim == "any time" and self.random.random() < 0.2
        if starting:
            time.sleep(self.random.uniform(0, 1.0))
        while not starting and not ended():
            if time.monotonic() - began > LONGEST:
                raise AssertionError(f"no progress; it printed\n{self._output(run).read_text()[-3000:]}")
            late = steps_done(run) >= target + 60  # no such moment came
            if late or (steps_done(run) >= target and (aim == "any time" or self._where(run) == aim)):
                break
            time.sleep(0.0005)
        time.sleep(delay if aim == "any time" else delay * self.random.random())
        return aim

    def _where(self, run: Path) -> str:
        """What the run is doing."""
        if (self.folder / "evaluating").exists():
            return "evaluating"
        if any((run / "checkpoints").glob("*.unfinished")):
            return "saving"
        return "starting" if _written(run) == self._before else "training"

    def _forget(self, run: Path) -> None:
        """What processes that were killed left behind."""
        for name in ("evaluating", *(f"pid.{rank}" for rank in range(self.processes))):
            (self.folder / name).unlink(missing_ok=True)
        self._before = _written(run)


def _written(run: Path) -> int | None:
    """When metrics.jsonl was written last (ns); a continued run writes it before its first step."""
    file = run / "metrics.jsonl"
    return file.stat().st_mtime_ns if file.exists() else None


def steps_done(run: Path) -> int:
    """The last step in metrics.jsonl."""
    entries = read_metrics(run / "metrics.jsonl")
    return entries[-1]["step"] if entries else 0


def differences(one: Path, other: Path) -> list[str]:
    """What is not the same in two finished runs."""
    found = []
    last = [list_checkpoints(run)[-1] for run in (one, other)]
    if last[0].name != last[1].name:
        return [f"one run ends with {last[0].name}, the other with {last[1].name}"]
    for name in ("model", "ema", "optimizer"):
        tensors = [load_file(checkpoint / f"{name}.safetensors") for checkpoint in last]
        if tensors[0].keys() != tensors[1].keys():
            found.append(f"{name}: other names")
            continue
        found += [
            f"{name}: {key}"
            for key, tensor in tensors[0].items()
            if tensor.numpy().tobytes() != tensors[1][key].numpy().tobytes()
        ]
    trainers = [json.loads((checkpoint / "trainer.json").read_text()) for checkpoint in last]
    for each in trainers:
        del each["trainer"]["progress"]["seconds"]
    if trainers[0] != trainers[1]:
        found.append("trainer.json")
    lines = [read_metrics(run / "metrics.jsonl") for run in (one, other)]
    lines = [[{k: v for k, v in entry.items() if k not in CLOCKS} for entry in entries] for entries in lines]
    if [entry["step"] for entry in lines[1]] != list(range(1, len(lines[1]) + 1)):
        found.append("metrics.jsonl: not each step once")
    if lines[0] != lines[1]:
        found.append("metrics.jsonl: other figures")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description="Kills a run again and again; see the top of the file.")
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    settings = {
        "train__steps": given.steps,
        "train__checkpoint_every": 3,
        "train__eval_every": 10,
        "data__loader__num_workers": 1 if given.processes == 1 else 0,
        "parallel__timeout": 120,
    }
    with tempfile.TemporaryDirectory() as folder, Forks() as forks:
        chaos = Chaos(forks, Path(folder), settings, given.processes, given.seed)
        undisturbed = chaos.undisturbed()
        print(f"undisturbed: {given.steps} steps in {chaos.seconds:.0f} s", flush=True)
        disturbed = chaos.disturbed(given.kills)
        print(f"{'kill':>4}  {'aim':<10}  {'hit':<10}  after step")
        for number, kill in enumerate(chaos.kills, 1):
            print(f"{number:>4}  {kill.aim:<10}  {kill.hit:<10}  {kill.step}")
        hits = ", ".join(f"{count} {where}" for where, count in Counter(kill.hit for kill in chaos.kills).items())
        problems = differences(undisturbed, disturbed)
        print(f"{len(chaos.kills)} kills ({hits}), all continued")
        print("\n".join(f"DIFFERS {problem}" for problem in problems) or "weights, average, optimizer: bit-identical")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
