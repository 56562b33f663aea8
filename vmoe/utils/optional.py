"""Optional packages, which the extras of `pyproject.toml` install."""

from importlib import import_module
from types import ModuleType


def import_optional(
    name: str, extra: str, needs: str, instead: str = "", error: type[Exception] = ModuleNotFoundError
) -> ModuleType:
    """A module of an optional package; one that is missing is an `error` of one sentence.

    The sentence begins with `needs`, as "the demo needs", and ends with the command that installs the extra, and what
    to do `instead`.
    """
    try:
        return import_module(name)
    except ModuleNotFoundError as missing:
        remedy = f"pip install -e '.[{extra}]' in a checkout{instead}"
        raise error(f"{needs} the package {missing.name}: {remedy}") from None
