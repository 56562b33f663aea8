"""What a run says of itself before its first step: device, data, length, model, and which weights were loaded."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from vmoe.training.config import Config
from vmoe.training.distill import without_projection
from vmoe.training.objectives import Task
from vmoe.utils.world import world


def start_lines(
    config: Config, task: Task, model: nn.Module, profile: dict[str, Any], device: torch.device, precision: str
) -> Iterator[str]:
    """The lines; `config` has its train.steps, and `profile` is that of `model_profile`."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    processes = f", {world()[1]} processes" if world()[1] > 1 else ""
    yield f"device: {device}{f' ({name})' if name else ''}, {precision}{processes}"
    sets = {"images to train on": (config.data.train, task.train_data)}
    sets |= {"to evaluate on": (config.data.val, task.val_data)}
    parts = [f"{len(data):,} {key} ({source.type})" for key, (source, data) in sets.items() if data is not None]
    classes = task.class_names if config.task == "classification" else task.val_data and task.val_data.classes
    yield f"data: {', '.join(parts)}{f', {len(classes)} classes' if classes else ''}"
    train, sizes = config.train, config.data.loader.batch_sizes.values()
    size = " to ".join(map(str, sorted({min(sizes), max(sizes)})))
    images = f"{size}" if train.accumulate_steps == 1 else f"{train.accumulate_steps} x {size}"
    epochs = f" ({train.epochs:g} {'epoch' if train.epochs == 1 else 'epochs'})" if train.epochs else ""
    yield f"steps: {train.steps:,}{epochs} of {images} images"
    with without_projection(model):
        trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    frozen = "" if trainable == profile["parameters_total"] else f", {trainable / 1e6:.2f} M trained"
    total, active = (profile[f"parameters_{kind}"] / 1e6 for kind in ("total", "active"))
    yield f"model: {task.name}, {total:.2f} M parameters, {active:.2f} M active per token{frozen}"
    if task.superclasses is not None:
        yield task.superclasses.describe()
    yield f"weights: {'; '.join(_weights(model)) or config.model.pretrained or 'new'}"
    if far := dict(getattr(model, "upcycle_differences", {})):
        whole = far.pop("output", None)
        layers = f"outputs of layers differ by {min(far.values()):.1%} to {max(far.values()):.1%}"
        ending = "" if whole is None else f", of the model by {whole:.1%}"
        yield f"clusters: {layers} from the dense model's on their examples{ending}"


def _weights(model: nn.Module) -> Iterator[str]:
    """What `load_weights` noted on a model or on its parts."""
    for name, module in model.named_modules():
        loaded = getattr(module, "vmoe_loaded", None)
        if loaded is None:
            continue
        number = f"{loaded['tensors']} tensors" if loaded["new"] else f"all {loaded['tensors']} tensors"
        text = f"{f'{name}: ' if name else ''}{number} of {loaded['source']}"
        for key, what in (("new", "new"), ("resized", "resized to the new image size")):
            text += f", {what}: {', '.join(loaded[key])}" if loaded[key] else ""
        yield text
