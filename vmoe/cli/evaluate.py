"""The evaluation command (`eval.py`, `vmoe-eval`): evaluates checkpoints, prints a table, writes JSON."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor

from vmoe.cli.command import exit_code
from vmoe.data import ImageDataset, build_dataset, with_orientation
from vmoe.data.sources.folder import warn_of_text_order
from vmoe.data.sources.imagenet import imagenet_words
from vmoe.distributed.process_group import joined
from vmoe.evaluation.capacity_report import draw_sweep
from vmoe.evaluation.class_names import check_same_classes
from vmoe.evaluation.config import EvaluationConfig
from vmoe.evaluation.confusion import write_class_files
from vmoe.evaluation.loaded_model import LoadedModel, load_model, trained_on_turned, weights_fingerprint
from vmoe.evaluation.results_file import (
    checkpoint_around,
    library_versions,
    make_writable,
    mean_and_spread,
    output_file,
    print_table,
    write_json,
)
from vmoe.evaluation.tasks import TASKS
from vmoe.models.factory import find_weights
from vmoe.models.spec import model_spec
from vmoe.moe.quantize import expert_bytes
from vmoe.utils.allocator import keep_freed_memory
from vmoe.utils.config import ConfigError, parse_config
from vmoe.utils.printable import safe_output
from vmoe.utils.tables import make_console
from vmoe.utils.world import world


@safe_output()
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code, see `exit_code`."""
    keep_freed_memory()
    description = "Evaluate checkpoints: classification, zero-shot, retrieval, few-shot, probes, capacity."
    config = parse_config(EvaluationConfig, argv, prog="vmoe-eval", description=description, folder="eval")
    return exit_code("vmoe-eval", lambda: run(config))


@joined()
def run(config: EvaluationConfig, console: Console | None = None) -> dict[str, Any]:
    """Evaluates as the config says, prints a table and writes the JSON file, whose content it returns.

    ConfigError: the model, the task and the data do not go together. ValueError or BadSample: unreadable files.
    """
    rank, num_processes = world()
    console = console or make_console(quiet=rank > 0)
    if config.data.type is None:
        raise ConfigError("data.type is missing: say what to evaluate on")
    # Finds wrong names before anything is read, and warns of damaged checkpoints once.
    weights = {checkpoint: find_weights(checkpoint) for checkpoint in config.checkpoints}
    config = as_trained(config, [trained_on_turned(file) for file in weights.values()])
    target = output_file(config)
    if checkpoint_around(target.parent) is not None:
        raise ConfigError(f"output {target} lies in a checkpoint, which another file would damage: give another file")
    if rank == 0 and (target.is_dir() or not make_writable(target.parent)):
        raise ConfigError(f"output {target} cannot be written: give another file, as in --output result.json")
    dataset = build_dataset(config.data)
    for checkpoint in config.checkpoints[1:]:  # a wrong one is found before the first is evaluated
        loaded = load_model(checkpoint, "cpu", weights=weights[checkpoint], experts=config.experts)
        check_task(config, loaded, dataset)
    start = time.perf_counter()
    entries, confusions = zip(*(evaluate_checkpoint(config, *one, dataset, console) for one in weights.items()))
    results, spread = mean_and_spread([entry["results"] for entry in entries])
    # First: the metrics are shown even if the file cannot be written.
    print_table(f"{config.task} of {', '.join(config.checkpoints)}", results, spread, console)
    report = {
        "task": config.task,
        "results": results,
        **({"spread": spread} if spread else {}),
        "checkpoints": [*entries],
    }
    if rank == 0:
        with console.status("fingerprint of the data"):  # reads the ends of every file
            data = {"fingerprint": dataset.fingerprint(), "num_samples": len(dataset)}
        report["data"] = data | ({"left_out": dataset.left_out} if dataset.left_out else {})
    report |= {"config": dataclasses.asdict(config), "versions": library_versions(), "processes": num_processes}
    report["seconds"] = round(time.perf_counter() - start, 3)
    if rank == 0:
        files = [output_file(config)]  # now, since another evaluation may have written its file meanwhile
        write_json(report, files[0])
        if config.output is not None:
            files += _write_classes(files[0].with_suffix(""), entries, confusions)
        if config.task == "capacity" and len(entries) == 1:
            files.append(files[0].with_suffix(".png"))
            draw_sweep(entries[0]["details"]["points"], files[-1])
        saved = f"results saved to {', '.join(map(str, files))}"
        console.print(saved, style="dim", highlight=False, markup=False, soft_wrap=True)
    return report


def evaluate_checkpoint(
    config: EvaluationConfig, checkpoint: str, file: Path, dataset: ImageDataset, console: Console
) -> tuple[dict[str, Any], Tensor | None]:
    """What the report says of one checkpoint, whose weights are in `file`, and its confusion matrix, if it has one."""
    loaded = load_model(checkpoint, config.device, config.precision, dataset.crop_pct, file, config.experts)
    check_task(config, loaded, dataset)
    outcome = TASKS[config.task](config, loaded, dataset, console)
    entry = {
        "checkpoint": checkpoint,
        "weights": str(file),
        "sha256": weights_fingerprint(file),
        "model": model_spec(loaded.model),
        "expert_bytes": expert_bytes(loaded.model),
        "results": outcome.results,
        "details": outcome.details,
    }
    return entry, outcome.confusion_CC


def _write_classes(stem: Path, entries: Sequence[dict[str, Any]], confusions: Sequence[Tensor | None]) -> list[Path]:
    """Writes the tables of the classes; those of several checkpoints have numbers."""
    files = []
    for number, (entry, confusion_CC) in enumerate(zip(entries, confusions, strict=True), start=1):
        if confusion_CC is not None:
            name = f"{stem.name}_{number}" if len(entries) > 1 else stem.name
            files += write_class_files(stem.with_name(name), entry["details"]["per_class"], confusion_CC)
    return files


def as_trained(config: EvaluationConfig, turned: list[bool]) -> EvaluationConfig:
    """The settings, with EXIF orientation applied if the checkpoints' trainings did so."""
    if not any(turned):
        return config
    if not all(turned) and config.data.exif_orientation is None:
        raise ConfigError("some of the checkpoints were trained with exif_orientation: set data.exif_orientation")
    return replace(config, data=with_orientation(config.data), train_data=with_orientation(config.train_data))


def check_task(config: EvaluationConfig, loaded: LoadedModel, dataset: ImageDataset) -> None:
    """ConfigError unless task, model and data go together."""
    task, kind, contrastive = config.task, config.data.type, loaded.tokenizer is not None
    needed = {"classification": False, "zero_shot": True, "retrieval": True}.get(task, contrastive)
    if contrastive != needed:
        holds = "an image-text model: use zero_shot or retrieval" if contrastive else "a classifier: use classification"
        raise ConfigError(f"task {task!r} does not fit {loaded.checkpoint}, which holds {holds}")
    if task == "retrieval" and not dataset.has_captions:
        raise ConfigError(f"task 'retrieval' needs captions, and data of type {kind!r} has none")
    if task != "retrieval" and dataset.classes is None:
        raise ConfigError(f"task {task!r} needs labels, and data of type {kind!r} has none")
    if task in ("classification", "capacity") and not contrastive:
        data, classes, ours = "the data", dataset.classes, loaded.class_names
        if dataset.class_columns is not None:  # several outputs may stand for a class
            data, classes = f"ImageNet-1k, whose outputs data of type {kind!r} needs,", list(imagenet_words())
        if ours is not None:
            check_same_classes(loaded.checkpoint, ours, data, classes)
        elif dataset.class_columns is not None and loaded.model.num_classes != len(classes):
            raise ConfigError(f"{loaded.checkpoint} has {loaded.model.num_classes} classes and {data} {len(classes)}")
        else:
            warn_of_text_order(classes, f"{loaded.checkpoint}, which holds no class names,")
