"""Checkpoints of a run: written whole or not at all, read without unpickling anything.

    checkpoints/step_000450/model.safetensors    weights, with what is needed to build the model
                            ema.safetensors      their moving average, if the run keeps one
                            trainer.pt           optimizer, step, random seeds, place in the data, gradient scaler

A folder that is still being written has another name: a process that dies leaves nothing that looks like a checkpoint.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vmoe.models.factory import load_weights, save_pretrained

MODEL, EMA, TRAINER = "model.safetensors", "ema.safetensors", "trainer.pt"
_UNFINISHED = ".unfinished"


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or does not fit; the message is one sentence for the user."""


def list_checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run's folder, oldest step first."""
    folders = (run / "checkpoints").glob("step_*")
    return sorted((f for f in folders if re.fullmatch(r"step_\d+", f.name) and f.is_dir()), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The number of optimizer steps behind a checkpoint's folder."""
    return int(checkpoint.name.removeprefix("step_"))


def save_checkpoint(
    run: Path,
    step: int,
    model: nn.Module,
    ema: nn.Module | None,
    trainer: dict[str, Any],
    extra: dict[str, Any],
    keep_last: int,
) -> Path:
    """Writes a checkpoint, then removes those older than the last `keep_last`.

    Args:
        run: the run's folder.
        step: optimizer steps done.
        model: the trained weights.
        ema: their moving average, or None.
        trainer: tensors and plain Python values only, which is all that `read_trainer` can read.
        extra: JSON-able, kept beside the weights (class names).
        keep_last: checkpoints to keep, at least 1.

    Returns:
        The checkpoint's folder.
    """
    parent = run / "checkpoints"
    parent.mkdir(parents=True, exist_ok=True)
    remove_unfinished(run)
    final = parent / f"step_{step:06d}"
    if final.exists():  # Ctrl-C right after the step was saved
        return final
    unfinished = parent / f"{final.name}{_UNFINISHED}"
    unfinished.mkdir()
    save_pretrained(model, unfinished / MODEL, extra=extra)
    if ema is not None:
        save_pretrained(ema, unfinished / EMA, extra=extra)
    torch.save(trainer, unfinished / TRAINER)
    for file in unfinished.iterdir():
        _sync(file)
    _sync(unfinished)
    os.replace(unfinished, final)
    _sync(parent)
    for old in list_checkpoints(run)[:-keep_last]:
        shutil.rmtree(old)
    return final


def remove_unfinished(run: Path) -> None:
    """Removes what a process that died while saving left behind."""
    for folder in (run / "checkpoints").glob(f"step_*{_UNFINISHED}"):
        shutil.rmtree(folder)


def load_checkpoint(checkpoint: Path, model: nn.Module, ema: nn.Module | None) -> dict[str, Any]:
    """Loads weights in place and returns the trainer's state, as given to `save_checkpoint`.

    Raises:
        CheckpointError: a file is missing or damaged.
        ValueError: the weights do not fit the model; the message lists tensors and shapes.
    """
    load_weights(model, checkpoint / MODEL)
    if ema is not None:
        load_weights(ema, checkpoint / EMA)
    file = checkpoint / TRAINER
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(
            f"{file} cannot be read ({type(error).__name__}); remove {checkpoint} to continue from the one before"
        ) from error


def _sync(path: Path) -> None:
    """Makes sure that a file or folder is on the disk; what does not support it is left to the system."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if path.is_file():
            raise
    finally:
        os.close(descriptor)
