"""The training command: `python train.py` and `vmoe-train`."""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stderr

from vmoe.cli.command import exit_code
from vmoe.training.config import load_config
from vmoe.utils.allocator import keep_freed_memory
from vmoe.utils.tables import make_console

# PyTorch warns of each lost connection with a C++ stack; it reads this when it is imported.
if not os.environ.get("VMOE_TRACEBACK"):
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code, see `exit_code`. After a stop the same command continues the run."""
    keep_freed_memory()
    # The first process of each machine reports mistakes in the settings: each machine may have another file.
    with redirect_stderr(io.StringIO()) if int(os.environ.get("LOCAL_RANK", 0)) else nullcontext():
        config = load_config(argv)
    from rich.logging import RichHandler

    from vmoe.training.trainer import train

    console = make_console()
    handler = RichHandler(console=console, show_path=False, show_time=False)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])
    return exit_code("vmoe-train", lambda: train(config, console), raise_unexpected=True)
