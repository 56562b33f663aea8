"""Checks of the paths that a command is given, before it imports PyTorch, which takes seconds."""

from __future__ import annotations

import os
from pathlib import Path

from vmoe.utils.config import ConfigError
from vmoe.utils.files import can_write, local_path


def check_checkpoint(checkpoint: str) -> None:
    """ValueError unless a checkpoint is there, or is to be downloaded."""
    if not checkpoint.startswith("hf-hub:") and not os.path.exists(path := local_path(checkpoint)):
        raise ValueError(f"no weights at {path}: it does not exist; give a .safetensors file, a checkpoint or a run")


def check_output(output: str | Path, *endings: str) -> None:
    """ConfigError: a file to write, or to replace, has another ending than its content's, or cannot be written."""
    if Path(output).suffix not in endings:
        raise ConfigError(f"output {output} must end with {' or '.join(endings)}")
    if not can_write(Path(output)):
        raise ConfigError(f"output {output} cannot be written: give a file in a folder that can be")
