"""The exit code and the error message of the commands."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from vmoe.utils.config import ConfigError
from vmoe.utils.printable import escaped


def exit_code(prog: str, run: Callable[[], object], raise_unexpected: bool = False) -> int:
    """Runs a command; returns its exit code: 0, 1 for an error, 2 for a wrong setting, 130 for Ctrl-C or SIGTERM.

    A planned stop (SIGUSR1, train.max_minutes) gives 0. An error is one sentence on standard error; it is raised with
    VMOE_TRACEBACK=1, and with `raise_unexpected` if users cannot cause it. Of several processes, each prints its own
    errors, with its number; what all find alike is printed once.
    """
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    try:
        run()
    except KeyboardInterrupt as stopped:
        if rank == 0:
            print(f"\n{prog}: {str(stopped) or 'interrupted'}", file=sys.stderr)
        return 0 if getattr(stopped, "planned", False) else 130
    except Exception as error:
        wrong_setting = isinstance(error, ConfigError)
        # All processes find a wrong setting alike, maybe before PyTorch is imported.
        expected, lost, reports = (True, False, rank == 0) if wrong_setting else _judged(error, rank)
        if os.environ.get("VMOE_TRACEBACK") or (raise_unexpected and not expected):
            raise
        if reports:
            who = "" if wrong_setting or processes < 2 else f"process {rank} of {processes}: "
            hint = "" if expected else " (VMOE_TRACEBACK=1 shows where)"
            print(f"{prog}: {who}error: {escaped(error) or type(error).__name__}{hint}", file=sys.stderr)
        if lost:  # threads that wait for it (a checkpoint being written, NCCL) would hold up an exit
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)
        return 2 if wrong_setting else 1
    return 0


def _judged(error: Exception, rank: int) -> tuple[bool, bool, bool]:
    """Whether users can cause an error (anything else is a fault of the program), whether another process is lost, and
    whether this process reports it."""
    from vmoe.data.images import BadSample

    known = (ValueError, OSError, ModuleNotFoundError, BadSample)
    if "torch" not in sys.modules:  # it would take seconds to import; the other errors come from modules that need it
        return isinstance(error, known), False, True
    from vmoe.data import TooManyBadSamples
    from vmoe.distributed.process_group import LostProcessError, must_report
    from vmoe.training.diagnosis import NonFiniteError

    lost = isinstance(error, LostProcessError)
    known += (TooManyBadSamples, NonFiniteError)
    return lost or isinstance(error, known), lost, not error.reported if lost else must_report(error, rank)
