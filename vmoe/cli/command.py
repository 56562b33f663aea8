"""The exit code and the error message of the commands."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from vmoe.data import BadSample
from vmoe.distributed.process_group import LostProcessError, must_report
from vmoe.utils.config import ConfigError
from vmoe.utils.printable import escaped


def exit_code(prog: str, run: Callable[[], object]) -> int:
    """Runs a command; returns its exit code: 0, 1 for an error, 2 for a wrong setting, 130 for Ctrl-C.

    An error is one sentence on standard error; with VMOE_TRACEBACK=1 it is raised. The sentence says so if it is not an
    error that users can cause.
    """
    try:
        run()
    except KeyboardInterrupt:
        print(f"\n{prog}: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if os.environ.get("VMOE_TRACEBACK"):
            raise
        wrong_setting = isinstance(error, ConfigError)
        # One process reports what all of them find, and none reports again what it reported when it stopped the others.
        if must_report(error, int(os.environ.get("RANK", 0))) and not getattr(error, "reported", False):
            plain = isinstance(error, (ValueError, BadSample, ModuleNotFoundError, LostProcessError))
            hint = "" if plain else " (VMOE_TRACEBACK=1 shows where)"
            print(f"{prog}: error: {escaped(error) or type(error).__name__}{hint}", file=sys.stderr)
        return 2 if wrong_setting else 1
    return 0
