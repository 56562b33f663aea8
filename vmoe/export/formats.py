"""The formats of exported files, and what is checked before a model is read."""

from __future__ import annotations

from pathlib import Path

from vmoe.utils.config import ConfigError
from vmoe.utils.paths import check_output

FORMATS = {"safetensors": ".safetensors", "hub": "", "pt2": ".pt2", "onnx": ".onnx"}  # suffix of the file; "": a folder
OPTIONS = {"part": ("pt2", "onnx"), "compile": ("pt2",), "license": ("hub",)}  # the formats that take them


def check_export(output: str | Path, format: str, **options: object) -> None:
    """ConfigError: no such format, an option that it does not take, or an output that cannot be written, has another
    suffix than the format's, or lies in a checkpoint."""
    if format not in FORMATS:
        raise ConfigError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    for option, value in options.items():
        if value and format not in OPTIONS[option]:
            raise ConfigError(f"{option} is for {' and '.join(OPTIONS[option])}, not for {format}; leave it out")
    if FORMATS[format]:
        check_output(output, FORMATS[format])
    from vmoe.models.manifest import is_checkpoint  # imports PyTorch, as all of vmoe.models

    for folder in Path(output).resolve().parents:
        if is_checkpoint(folder):
            problem = f"lies in the checkpoint {folder}, which another file would damage"
            raise ConfigError(f"output {output} {problem}; give another folder")
