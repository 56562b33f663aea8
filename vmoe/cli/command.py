"""How the commands (`vmoe-eval`, `vmoe-inspect`, `vmoe-classify`, `vmoe-demo`) end: an exit code and one sentence."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from vmoe.data import BadSample
from vmoe.distributed.process_group import LostProcessError, tells
from vmoe.utils.config import ConfigError
from vmoe.utils.printable import escaped


def exit_code(prog: str, run: Callable[[], object]) -> int:
    """Runs a command; returns its exit code: 0, 1 for an error, 2 for a wrong setting, 130 for Ctrl-C.

    An error is one sentence on standard error; with VMOE_TRACEBACK=1 it is raised. Where it is not one that users can
    cause, the sentence says so.

    Args:
        prog: name of the command.
        run: all of it.
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
        # What all processes find, one of them says; and a process that stopped the others has told why.
        if tells(error, int(os.environ.get("RANK", 0))) and not getattr(error, "told", False):
            plain = isinstance(error, (ValueError, BadSample, ModuleNotFoundError, LostProcessError))
            hint = "" if plain else " (VMOE_TRACEBACK=1 shows where)"
            print(f"{prog}: error: {escaped(error) or type(error).__name__}{hint}", file=sys.stderr)
        return 2 if wrong_setting else 1
    return 0
