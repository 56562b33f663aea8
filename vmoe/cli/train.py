"""The training command: `python train.py` and `vmoe-train`."""

from __future__ import annotations

import io
import logging
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stderr

from vmoe.utils.allocator import keep_freed_memory
from vmoe.utils.printable import escaped, safe_output
from vmoe.utils.tables import make_console


@safe_output()
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code.

    An error is one sentence; VMOE_TRACEBACK=1 shows where it comes from. Of several processes, each prints its own
    errors, with its number; what all find alike is printed once.

    Returns:
        0: done, or stopped by SIGUSR1 or at the end of train.max_minutes (the same command continues); 1: an error, or
        another process was lost; 2: a wrong setting; 130: Ctrl-C or SIGTERM.
    """
    keep_freed_memory()
    from rich.logging import RichHandler

    from vmoe.training.config import load_config

    rank = int(os.environ.get("RANK", 0))
    # The first process of each machine reports mistakes in the settings: each machine may have another file.
    with redirect_stderr(io.StringIO()) if int(os.environ.get("LOCAL_RANK", 0)) else nullcontext():
        config = load_config(argv)
    # Only now: it takes seconds to import, and a wrong setting or --help need not wait for it.
    from vmoe.training.trainer import train

    console = make_console()
    handler = RichHandler(console=console, show_path=False, show_time=False)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])
    try:
        train(config, console)
    except KeyboardInterrupt as stopped:
        text = str(stopped) or "interrupted; the same command continues the run from its last checkpoint"
        if rank == 0:
            print(f"\nvmoe-train: {text}", file=sys.stderr)
        return 0 if getattr(stopped, "planned", False) else 130
    except Exception as error:
        return _report(error, rank)
    return 0


def _report(error: Exception, rank: int) -> int:
    """Prints what users can cause as one sentence, and returns the exit code; all else is raised again."""
    from vmoe.data import BadSample, TooManyBadSamples
    from vmoe.distributed.heartbeat import speaker
    from vmoe.distributed.process_group import LostProcessError, must_report
    from vmoe.training.diagnosis import NonFiniteError
    from vmoe.utils.config import ConfigError

    lost, wrong_setting = isinstance(error, LostProcessError), isinstance(error, ConfigError)
    expected = (ValueError, OSError, ModuleNotFoundError, NonFiniteError, BadSample, TooManyBadSamples)
    if os.environ.get("VMOE_TRACEBACK") or not (lost or isinstance(error, expected)):
        raise error
    if not error.reported if lost else must_report(error, rank):
        prefix = "" if wrong_setting else speaker(rank, int(os.environ.get("WORLD_SIZE", 1)))
        print(f"vmoe-train: {prefix}error: {escaped(error)}", file=sys.stderr)
    if lost:  # threads that wait for it (a checkpoint being written, NCCL) would hold up an exit
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
    return 2 if wrong_setting else 1


if __name__ == "__main__":
    sys.exit(main())
