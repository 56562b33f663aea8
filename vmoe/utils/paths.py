"""Checks of the paths that a command is given, before it imports PyTorch, which takes seconds."""

import os
from pathlib import Path
from types import ModuleType

from vmoe.utils.config import ConfigError
from vmoe.utils.files import can_write, local_path
from vmoe.utils.optional import import_optional

INDEX_ENDINGS = (".parquet", ".npz")  # of files of embeddings


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


def check_index(file: str | Path) -> None:
    """ValueError unless there is such a file of embeddings."""
    if not os.path.isfile(file):
        raise ValueError(f"no index at {file}: make one with vmoe-embed")
    if Path(file).suffix not in INDEX_ENDINGS:
        raise ValueError(f"index {file} must end with {' or '.join(INDEX_ENDINGS)}")


def check_new_index(output: str | Path) -> None:
    """ConfigError: a file of embeddings has another ending or cannot be written; pyarrow is missing."""
    check_output(output, *INDEX_ENDINGS)
    if Path(output).suffix == ".parquet":
        import_pyarrow()


def import_pyarrow() -> ModuleType:
    """pyarrow, which is optional; ConfigError: it is missing."""
    instead = ", or take a file that ends with .npz"
    import_optional("pyarrow", "search", "Parquet files need", instead, ConfigError)
    import pyarrow.parquet

    return pyarrow
