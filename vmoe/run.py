"""Run a script or module after importing vmoe: its names are then in timm's registry, in scripts that do not import it.

Use: python -m vmoe.run SCRIPT [arguments], or python -m vmoe.run -m MODULE [arguments].
"""

import os
import runpy
import sys
from importlib.util import find_spec

import vmoe  # noqa: F401  (registers the models)

USAGE = "use: python -m vmoe.run SCRIPT [arguments], or python -m vmoe.run -m MODULE [arguments]"


def main(argv: list[str] | None = None) -> None:
    """`argv`: without the command's own name; the script or module sees what follows `python` in it."""
    given = sys.argv[1:] if argv is None else argv
    as_module = given[:1] == ["-m"]
    given = given[as_module:]
    if not given or given[0].startswith("-"):
        sys.exit(USAGE)
    target = given[0]
    if not (_is_module(target) if as_module else os.path.exists(target)):
        sys.exit(f"there is no {'module' if as_module else 'script'} {target}; {USAGE}")
    sys.argv = given
    if as_module:
        runpy.run_module(target, run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = os.path.dirname(os.path.abspath(target))  # as Python itself does
        runpy.run_path(target, run_name="__main__")


def _is_module(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # of its package
        return False


if __name__ == "__main__":
    main()
