"""The evaluation command (`eval.py`, `vmoe-eval`): evaluates checkpoints, prints a table, writes JSON."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from vmoe.cli.command import exit_code
from vmoe.evaluation.config import EvaluationConfig
from vmoe.utils.allocator import keep_freed_memory
from vmoe.utils.config import ConfigError, parse_config
from vmoe.utils.files import can_write
from vmoe.utils.paths import check_checkpoint
from vmoe.utils.tables import make_console

if TYPE_CHECKING:
    from vmoe.data import ImageDataset
    from vmoe.evaluation.results_file import Outcome

# Of the tables that belong to a given output.
CLASS_FILES = ("_per_class.csv", "_confusion.csv", "_confusion.png", "_samples.csv")
TABLES = {"classification": CLASS_FILES, "zero_shot": CLASS_FILES, "adversarial": CLASS_FILES[-1:]}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code, see `exit_code`."""
    keep_freed_memory()
    description = "Evaluate checkpoints: classification, zero-shot, retrieval, few-shot, probes, capacity, attacks."
    config = parse_config(EvaluationConfig, argv, prog="vmoe-eval", description=description, folder="eval")
    return exit_code("vmoe-eval", lambda: run(config))


def run(config: EvaluationConfig, console: Console | None = None) -> dict[str, Any]:
    """Evaluates as the config says, prints a table and writes the JSON file, whose content it returns.

    ConfigError: the model, the task and the data do not go together. ValueError or BadSample: unreadable files.
    """
    if config.data.type is None:
        raise ConfigError("data.type is missing: say what to evaluate on")
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:  # of several processes, the others would wait for one that fails here
        for checkpoint in config.checkpoints:
            check_checkpoint(checkpoint)
        if config.output is not None:
            _check_files(config, Path(config.output))
    from vmoe.distributed.process_group import joined

    with joined():
        return _run(config, console)


def _run(config: EvaluationConfig, console: Console | None) -> dict[str, Any]:
    from vmoe.data import build_dataset
    from vmoe.evaluation import results_file
    from vmoe.evaluation.loaded_model import load_model, trained_on_turned
    from vmoe.evaluation.tasks import check_task
    from vmoe.models.factory import find_weights
    from vmoe.utils.world import world

    rank, num_processes = world()
    console = console or make_console(quiet=rank > 0)
    # Finds wrong names before anything is read, and warns of damaged checkpoints once.
    weights = {checkpoint: find_weights(checkpoint) for checkpoint in config.checkpoints}
    config = as_trained(config, [trained_on_turned(file) for file in weights.values()])
    target = results_file.output_file(config)
    if results_file.checkpoint_around(target.parent) is not None:
        raise ConfigError(f"output {target} lies in a checkpoint, which another file would damage: give another file")
    if rank == 0:
        _check_files(config, target)
    dataset = build_dataset(config.data, "data")
    for checkpoint in config.checkpoints[1:]:  # a wrong one is found before the first is evaluated
        loaded = load_model(
            checkpoint, "cpu", weights=weights[checkpoint], experts=config.experts, loader=config.loader
        )
        check_task(config, loaded, dataset)
    start = time.perf_counter()
    together = [weights] if config.ensemble else [{checkpoint: file} for checkpoint, file in weights.items()]
    entries, outcomes = zip(*(evaluate_checkpoint(config, each, dataset, console) for each in together))
    results, spread = results_file.mean_and_spread([entry["results"] for entry in entries])
    # First: the metrics are shown even if the file cannot be written.
    results_file.print_table(f"{config.task} of {', '.join(config.checkpoints)}", results, spread, console)
    report = {"task": config.task, "results": results, **({"spread": spread} if spread else {})}
    report["checkpoints"] = [*entries]
    if rank == 0:
        with console.status("fingerprint of the data"):  # reads the ends of every file
            data = {"fingerprint": dataset.fingerprint(), "num_samples": len(dataset)}
        report["data"] = data | ({"left_out": dataset.left_out} if dataset.left_out else {})
    report |= {"config": dataclasses.asdict(config), "versions": results_file.library_versions()}
    report |= {"processes": num_processes, "seconds": round(time.perf_counter() - start, 3)}
    if rank == 0:
        saved = f"results saved to {', '.join(map(str, _write(config, report, outcomes, dataset)))}"
        console.print(saved, style="dim", highlight=False, markup=False, soft_wrap=True)
    return report


def _check_files(config: EvaluationConfig, target: Path) -> None:
    """ConfigError: the JSON file, or one that belongs to it, cannot be written, or a file of another kind is there."""
    if target.suffix != ".json" and target.is_file():
        raise ConfigError(f"output {target} is there and no .json file: give another file, as in --output result.json")
    for file in (target, *itertools.chain(*_other_files(config, target))):
        if not can_write(file):
            of = "" if file == target else f": {file}, which belongs to it,"
            raise ConfigError(f"output {target}{of} cannot be written: give another file, as in --output result.json")


def _other_files(config: EvaluationConfig, target: Path) -> list[list[Path]]:
    """What belongs to the JSON file, of each of its entries: the tables of a given output, or the plot of one sweep.

    Their names begin with its name without ".json"; those of several checkpoints have numbers.
    """
    count = 1 if config.ensemble else len(config.checkpoints)
    endings = TABLES.get(config.task, ()) if config.output is not None else ()
    if config.task == "capacity" and count == 1:
        endings = (".png",)
    starts = [target.name.removesuffix(".json") + (f"_{number + 1}" if count > 1 else "") for number in range(count)]
    return [[target.parent / (start + ending) for ending in endings] for start in starts]


def _write(
    config: EvaluationConfig, report: dict[str, Any], outcomes: Sequence[Outcome], dataset: ImageDataset
) -> list[Path]:
    """Writes the JSON file and what belongs to it; returns the files."""
    from vmoe.evaluation.capacity_report import draw_sweep
    from vmoe.evaluation.confusion import write_class_files, write_samples
    from vmoe.evaluation.results_file import output_file, write_json

    target, entries = output_file(config), report["checkpoints"]  # another evaluation may have written meanwhile
    write_json(report, target)
    files = [target]
    for entry, outcome, own in zip(entries, outcomes, _other_files(config, target), strict=True):
        if config.task == "capacity" and own:
            draw_sweep(entry["details"]["points"], *own)
            files += own
        elif own:
            *of_classes, of_samples = own
            if outcome.confusion_CC is not None:
                files += write_class_files(of_classes, entry["details"]["per_class"], outcome.confusion_CC)
            files.append(write_samples(of_samples, outcome.samples, dataset.name_of))
    return files


def evaluate_checkpoint(
    config: EvaluationConfig, weights: dict[str, Path], dataset: ImageDataset, console: Console
) -> tuple[dict[str, Any], Outcome]:
    """What the report says of a checkpoint, given with its weights, or of several as an ensemble (then lists), and the
    outcome of the task."""
    from vmoe.evaluation.loaded_model import as_ensemble, load_model, weights_fingerprint
    from vmoe.evaluation.tasks import TASKS, check_task
    from vmoe.models.spec import model_spec
    from vmoe.moe.quantize import expert_bytes

    how, more = (config.device, config.precision, dataset.crop_pct), (config.experts, config.loader)
    members = [load_model(checkpoint, *how, file, *more) for checkpoint, file in weights.items()]
    for loaded in members:
        check_task(config, loaded, dataset)
    outcome = TASKS[config.task](config, as_ensemble(members) if config.ensemble else loaded, dataset, console)
    about = {
        "checkpoint": list(weights),
        "weights": [str(file) for file in weights.values()],
        "sha256": [weights_fingerprint(file) for file in weights.values()],
        # An infinite factor is None, no limit: JSON has no infinity.
        "model": [json.loads(json.dumps(model_spec(each.model)), parse_constant=lambda _: None) for each in members],
        "expert_bytes": [expert_bytes(each.model) for each in members],
    }
    entry = about if config.ensemble else {name: value for name, (value,) in about.items()}
    return {**entry, "results": outcome.results, "details": outcome.details}, outcome


def as_trained(config: EvaluationConfig, turned: list[bool]) -> EvaluationConfig:
    """The settings, with EXIF orientation applied if the checkpoints' trainings did so."""
    if not any(turned):
        return config
    from vmoe.data import with_orientation

    if not all(turned) and config.data.exif_orientation is None:
        raise ConfigError("some of the checkpoints were trained with exif_orientation: set data.exif_orientation")
    return replace(config, data=with_orientation(config.data), train_data=with_orientation(config.train_data))
