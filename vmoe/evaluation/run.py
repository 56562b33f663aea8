"""The evaluation command (`eval.py`, `vmoe-eval`): loads a checkpoint, measures it, prints a table, writes JSON."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from vmoe.config_io import ConfigError, parse_config
from vmoe.data import BadSample, ImageDataset, build_dataset, build_transform, eval_loader
from vmoe.evaluation.classification import evaluate_classification
from vmoe.evaluation.config import EvaluationConfig
from vmoe.evaluation.inference import pick_device
from vmoe.evaluation.retrieval import evaluate_retrieval, identify_images
from vmoe.evaluation.zero_shot import evaluate_zero_shot, read_lines
from vmoe.models.factory import (
    create_model,
    find_weights,
    get_tokenizer,
    is_contrastive,
    model_spec,
    preprocess_config,
    read_pretrained_metadata,
)

LIBRARIES = ("vmoe", "torchvision", "timm", "open_clip_torch", "numpy", "pillow")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code: 0, 1 for an error, 2 for a wrong setting, 130 for Ctrl-C.

    An error is one sentence; set VMOE_TRACEBACK=1 to see where it comes from.
    """
    config = parse_config(
        EvaluationConfig,
        argv,
        prog="vmoe-eval",
        description="Evaluate a checkpoint: classification, zero-shot or retrieval.",
        folder="eval",
    )
    try:
        run(config)
    except KeyboardInterrupt:
        print("\nvmoe-eval: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if os.environ.get("VMOE_TRACEBACK"):
            raise
        hint = "" if isinstance(error, (ConfigError, BadSample)) else " (VMOE_TRACEBACK=1 shows where)"
        print(f"vmoe-eval: error: {error or type(error).__name__}{hint}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    return 0


def run(config: EvaluationConfig, console: Console | None = None) -> dict[str, Any]:
    """Evaluates as the config says, prints a table and writes the JSON file.

    Args:
        config: the settings.
        console: where to print; None: standard output.

    Returns:
        What the JSON file holds: "results" (see the evaluate functions), "config", "model", "versions",
        "skipped" (paths of samples that were left out), "seconds".

    Raises:
        ConfigError: the model, the task and the data do not go together.
        BadSample: an unreadable picture or empty caption, unless `loader.on_bad` is "skip".
        ValueError: unreadable checkpoint, data, class names or templates.
    """
    console = console or Console()
    if config.data.type is None:
        raise ConfigError("data.type is missing: say what to evaluate on")
    device = pick_device(config.device)
    dataset = build_dataset(config.data)
    file = find_weights(config.checkpoint)
    model = create_model(None, pretrained=file).to(device).eval()
    if is_contrastive(model) == (config.task == "classification"):
        kind = "an image-text model" if is_contrastive(model) else "a classifier"
        fitting = "zero_shot or retrieval" if is_contrastive(model) else "classification"
        raise ConfigError(f"task {config.task!r} does not fit {config.checkpoint}, which holds {kind}: use {fitting}")
    if config.task == "classification":
        check_same_classes(
            read_pretrained_metadata(file)["extra"].get("class_names"), dataset.classes, config.checkpoint
        )
    if config.task == "retrieval" and not dataset.has_captions:
        raise ConfigError(f"task 'retrieval' needs captions, and data of type {config.data.type!r} has none")
    if config.task != "retrieval" and dataset.classes is None:
        raise ConfigError(f"task {config.task!r} needs labels, and data of type {config.data.type!r} has none")
    tokenizer = get_tokenizer(model) if is_contrastive(model) else None
    transform = build_transform(preprocess_config(model), None)
    loader = eval_loader(dataset, transform, tokenizer if config.task == "retrieval" else None, config.loader)
    batches = _Progress(loader, config.task, console)

    start = time.perf_counter()
    results = _evaluate(config, model, tokenizer, dataset, batches, device)
    report = {
        "task": config.task,
        "results": results,
        "skipped": list(loader.skipped_paths),
        "seconds": round(time.perf_counter() - start, 3),
        "config": dataclasses.asdict(config),
        "weights": str(file),
        "model": model_spec(model),
        "versions": library_versions(),
    }
    _print_table(results, config, console)  # first: the figures are there even if the file cannot be written
    target = output_file(config)
    _write_json(report, target)
    console.print(f"written to {target}", style="dim", highlight=False, markup=False, soft_wrap=True)
    return report


def _evaluate(
    config: EvaluationConfig, model: nn.Module, tokenizer, dataset: ImageDataset, batches, device: torch.device
) -> dict[str, float | int]:
    where = {"device": device, "precision": config.precision}
    if config.task == "retrieval":
        return evaluate_retrieval(model, batches, image_ids=identify_images(dataset), **where)
    if config.task == "classification":
        return evaluate_classification(model, batches, num_classes=len(dataset.classes), **where)
    names = dataset.classes
    if config.class_names is not None:
        names = read_lines(config.class_names)
        if len(names) != len(dataset.classes):
            raise ConfigError(
                f"class_names {config.class_names} has {len(names)} names, and the data {len(dataset.classes)} classes"
            )
    return evaluate_zero_shot(model, tokenizer, batches, names, config.templates, **where)


def check_same_classes(trained: list[str] | None, data: list[str] | None, checkpoint: str) -> None:
    """Labels are positions in a list: a classifier and its data must have the same list.

    Raises:
        ConfigError: names the first difference.
    """
    if trained is None or data is None:
        return
    if len(trained) != len(data):
        only = [name for name in data if name not in trained] or [name for name in trained if name not in data]
        raise ConfigError(
            f"{checkpoint} was trained on {len(trained)} classes, and the data has {len(data)}"
            + (f"; only one of them has {', '.join(map(repr, only[:5]))}" if only else "")
        )
    for index, (ours, theirs) in enumerate(zip(trained, data)):
        if ours != theirs:
            raise ConfigError(f"class {index} is {ours!r} in {checkpoint} and {theirs!r} in the data; they must agree")


class _Progress:
    """A loader that shows a progress bar while it is read."""

    def __init__(self, loader, description: str, console: Console) -> None:
        self.loader, self.description, self.console = loader, description, console

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        yield from track(self.loader, self.description, total=len(self.loader), console=self.console, transient=True)

    @property
    def num_skipped(self) -> int:
        return self.loader.num_skipped


def output_file(config: EvaluationConfig) -> Path:
    """Where the result goes: `output`, or a name from task and data beside the checkpoint."""
    if config.output is not None:
        return Path(config.output)
    checkpoint = Path(config.checkpoint)
    parts = ["evaluation", config.task, config.data.type]
    if config.data.type in ("emoji", "emoji_groups", "torchvision"):
        parts.append(config.data.split)
    elif config.data.path is not None:
        parts.append(Path(config.data.path).stem)
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    return folder / f"{'_'.join(parts)}.json"


def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide the figures; "source" for one that is not installed."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for name in LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:  # vmoe run from a checkout
            versions[name] = "source"
    return versions


def _write_json(report: dict[str, Any], file: Path) -> None:
    """Writes the file whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.partial")
    temporary.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, file)


def _print_table(results: dict[str, float | int], config: EvaluationConfig, console: Console) -> None:
    console.print(f"{config.task} of {config.checkpoint}", highlight=False, markup=False, soft_wrap=True)
    table = Table()
    table.add_column("measure")
    table.add_column("value", justify="right")
    for name, value in results.items():
        table.add_row(name, f"{value:.4f}" if isinstance(value, float) else str(value))
    console.print(table)
