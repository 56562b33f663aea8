"""The records of finished runs: one line of JSON each in experiments/results, from which the report is made."""

from __future__ import annotations

import fcntl
import itertools
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from experiments.plan import RESULTS, Cell, Experiment, digest
from vmoe.utils.config import ConfigError
from vmoe.utils.files import parse_json, read_json, read_text

JOB, MEASURED = "job.json", "measured.json"  # in a run's folder: what the worker is to do, and what it found
Record = dict[str, Any]
Records = dict[tuple[str, int], Record]  # by run and seed
DIGITS = 6
MAX_BYTES = 2**28


def records_file(experiment: Experiment, name: str, output: Path) -> Path:
    """The file of an experiment's records."""
    return (output if experiment.draft else RESULTS) / f"{name}.jsonl"


def read_records(file: Path) -> Records:
    """The last record of each run and seed; ValueError: the file is damaged."""
    records: Records = {}
    for number, line in enumerate(read_text(file, MAX_BYTES).splitlines() if file.is_file() else [], start=1):
        try:
            record = parse_json(line)
            if not all(isinstance(record[key], dict) for key in ("metrics", "settings", "evaluations")):
                raise TypeError
            records[record["run"], record["seed"]] = record
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{file} line {number}: not the record of a run") from None
    return records


def write_record(file: Path, record: Record) -> None:
    """Adds a record, which replaces an earlier one; several processes may do so at once."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "a", encoding="utf-8") as lines:
        fcntl.flock(lines, fcntl.LOCK_EX)
        lines.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")


def inputs(record: Record) -> dict[str, str]:
    """{setting: fingerprint} of the data and weights that a record was made from; older ones lack data.train."""
    return {**({"data.val": record["images"]["data"]} if "images" in record else {}), **record.get("inputs", {})}


def check_settings(cell: Cell, before: dict[str, Any], where: str, file: Path) -> None:
    """ConfigError: a run was made, or begun, with other settings than its experiment has now."""
    for key in {**before, **cell.settings}:
        old, new = before.get(key, "the default"), cell.settings.get(key, "the default")
        if old != new:
            raise ConfigError(
                f"{cell.name}: {key} was {old!r} and is {new!r} now, since {file} or {cell.base} changed; nothing was "
                f"touched. Undo the change, copy the experiment to another name, or remove {where}"
            )


def check_evaluations(cell: Cell, record: Record, where: str, file: Path) -> None:
    """ConfigError: an evaluation in a record was made with other settings."""
    for name, one in cell.evaluations.items():
        if record["evaluations"].get(name, one["digest"]) != one["digest"]:
            raise ConfigError(
                f"{cell.name}: evaluate.{name} was made with other settings than it has in {file} now; launch it where "
                f"the run's folder is to make it again, undo the change, or remove {where}"
            )


def check_inputs(cells: Iterable[Cell], records: Records, where: Path) -> None:
    """ConfigError: runs with the same settings of their data or weights were made from different ones."""
    first: dict[str, tuple[str, str]] = {}
    for cell in cells:
        record = records.get((cell.run, cell.seed))
        for key, found in inputs(record).items() if record else ():
            if key in cell.references:  # each seed has its own
                continue
            own = {name: value for name, value in cell.overrides.items() if f"{name}.".startswith(f"{key}.")}
            other, before = first.setdefault(digest([key, own]), (cell.name, found))
            if found != before:
                raise ConfigError(
                    f"{cell.name}: {key} is not what {other} had (fingerprints {found[:8]} and {before[:8]}), so they "
                    f"cannot be compared; remove the line of one of them in {where} and make it again"
                )


def make_record(cell: Cell, folder: Path) -> Record:
    """The record of a finished run, from the files in its folder."""
    summary, measured = _read(folder / "summary.json"), _read(folder / MEASURED)
    metrics = {key: value for key, value in summary.items() if isinstance(value, int | float) and key != "seed"}
    metrics |= summary["evaluation"] | training_metrics(folder / "metrics.jsonl")
    for name, found in measured["evaluations"].items():
        prefix = "" if name == "val" else f"{name}/"
        metrics |= {f"{prefix}{key}": value for key, value in found["results"].items()}
    metrics = {key: _rounded(value) for key, value in metrics.items() if math.isfinite(value)}
    images = {key: measured["evaluations"].get("val", {}).get(key) for key in ("data", "correct")}
    others = {name: found for name, found in measured["evaluations"].items() if name != "val"}
    evaluated = {f"evaluate.{name}": found.get("data") for name, found in others.items()}
    return {
        "run": cell.run,
        "seed": cell.seed,
        "settings": cell.settings,
        "metrics": metrics,
        "evaluations": {name: found["digest"] for name, found in measured["evaluations"].items()},
        "inputs": {**measured["inputs"], **{key: data for key, data in evaluated.items() if data is not None}},
        **({"images": images} if images["correct"] else {}),
        **{key: measured[key] for key in ("device", "threads", "torch", "commit", "changed")},
        "date": datetime.fromtimestamp((folder / "summary.json").stat().st_mtime, UTC).strftime("%Y-%m-%d"),
    }


def _read(file: Path) -> dict[str, Any]:
    try:
        return read_json(file, MAX_BYTES, dict)
    except ValueError as error:
        raise ValueError(f"{file}: {error}; remove the folder to make the run again") from None


def _rounded(value: float) -> float:
    return value if isinstance(value, int) else float(f"{value:.{DIGITS}g}")


def training_metrics(file: Path) -> dict[str, float]:
    """Metrics from a run's metrics.jsonl.

    "train_loss" is the mean loss of the task over the last tenth of the logged steps. The metrics of the routing are
    those of the last one, with the mean over the layers of those that each layer has, and "routing/collapsed_layers":
    an expert gets no token, or more than half of all.
    """
    lines = [parse_json(line) for line in read_text(file, MAX_BYTES).splitlines()] if file.is_file() else []
    steps = [{key: value for key, value in line.items() if value is not None} for line in lines if "task_loss" in line]
    if not steps:
        return {}
    losses = [step["task_loss"] for step in steps[-math.ceil(len(steps) / 10) :] if "task_loss" in step]
    found = {"train_loss": statistics.fmean(losses)} if losses else {}
    layers: dict[str, dict[str, float]] = defaultdict(dict)
    for key, value in steps[-1].items():
        first, layer, *rest = key.split("/") if key.startswith("routing/") else [""] * 2
        if rest:
            layers[layer]["/".join((first, *rest))] = value
        elif first:
            found[key] = value
    for key in dict.fromkeys(itertools.chain(*layers.values())):
        found.setdefault(key, statistics.fmean(layer[key] for layer in layers.values() if key in layer))
    if layers:
        idle, largest = "routing/experts_without_tokens", "routing/largest_share"
        collapsed = [layer.get(idle, 0) > 0 or layer.get(largest, 0) > 0.5 for layer in layers.values()]
        found["routing/collapsed_layers"] = sum(collapsed)
    return found
