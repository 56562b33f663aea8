"""Checks of files of embeddings, before a command imports PyTorch."""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType

from vmoe.utils.config import ConfigError
from vmoe.utils.optional import import_optional
from vmoe.utils.paths import check_output

INDEX_ENDINGS = (".parquet", ".npz")


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
