"""The training command: `python train.py` and `vmoe-train`."""

from __future__ import annotations

import ctypes
import logging
import os
import sys
from collections.abc import Sequence

# Values of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code: 0, 1 for an error, 2 for a wrong setting, 130 for Ctrl-C.

    An error is one sentence; set VMOE_TRACEBACK=1 to see where it comes from.
    """
    keep_freed_memory()
    from rich.console import Console
    from rich.logging import RichHandler

    from vmoe.training.config import ConfigError, load_config

    config = load_config(argv)
    # Only now: these take seconds to import, and a wrong setting or --help need not wait for them.
    from vmoe.data import BadSample, TooManyBadSamples
    from vmoe.printable import escaped
    from vmoe.training.diagnosis import NonFiniteError
    from vmoe.training.loop import train

    console = Console()
    handler = RichHandler(console=console, show_path=False, show_time=False)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])
    try:
        train(config, console)
    except KeyboardInterrupt as stopped:
        text = str(stopped) or "interrupted; the same command continues the run from its last checkpoint"
        print(f"\nvmoe-train: {text}", file=sys.stderr)
        return 130
    # What users can cause is one sentence; all else shows where it broke.
    except (ValueError, OSError, ModuleNotFoundError, NonFiniteError, BadSample, TooManyBadSamples) as error:
        if os.environ.get("VMOE_TRACEBACK"):
            raise
        print(f"vmoe-train: error: {escaped(error)}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    return 0


def keep_freed_memory() -> None:
    """Tells glibc to keep freed memory for the next tensor instead of giving it back to the system.

    On a CPU every large activation is otherwise mapped and unmapped in each layer, and the system clears its pages each
    time: up to half the time of a step. Does nothing where the C library is not glibc, or its environment variables say
    otherwise.
    """
    if not sys.platform.startswith("linux") or "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 2**30)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


if __name__ == "__main__":
    sys.exit(main())
