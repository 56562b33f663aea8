"""The reference's config dictionaries, read key by key: an error for every key or value that has no meaning here."""

import ast
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

_UNSET = object()
MAX_CALL = 1000  # characters of a class with arguments


class ConfigError(ValueError):
    """A config that cannot be converted; one sentence that names the key, its value and the remedy."""


class Kind(NamedTuple):
    """What a value must be: the words for it, whether a value is that, and how it is used."""

    words: str
    fits: Callable[[Any], bool]
    convert: Callable[[Any], Any]


def _finite(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and abs(value) <= sys.float_info.max  # also refuses infinity and NaN


def _whole(value: Any, minimum: int) -> bool:
    return _finite(value) and minimum <= value <= 2**31 - 1 and value == int(value)


def _sides(value: Any) -> tuple:
    return tuple(value) if isinstance(value, (list, tuple)) else (value, value)


SIZE = Kind("a whole number >= 1", lambda value: _whole(value, 1), int)
COUNT = Kind("a whole number >= 0", lambda value: _whole(value, 0), int)
NUMBER = Kind("a finite number", _finite, float)
NOT_NEGATIVE = Kind("a finite number >= 0", lambda value: _finite(value) and value >= 0, float)
POSITIVE = Kind("a number > 0", lambda value: _finite(value) and value > 0, float)
RATE = Kind("a finite number >= 0 and < 1", lambda value: _finite(value) and 0 <= value < 1, float)
FLAG = Kind("true or false", lambda value: isinstance(value, int) and value in (0, 1), bool)
PAIR = Kind(
    "a whole number >= 1, or two of them",
    lambda value: len(_sides(value)) == 2 and all(_whole(side, 1) for side in _sides(value)),
    lambda value: tuple(int(side) for side in _sides(value)),
)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + "..."


class Section:
    """One dictionary of a config; every key must be taken, so that none is silently ignored.

    Args:
        values: a dictionary, or something like ml_collections' ConfigDict.
        path: its own key, for errors.
    """

    def __init__(self, values: Any, path: str = "") -> None:
        self.path = path
        values = values.to_dict() if hasattr(values, "to_dict") else values
        if not isinstance(values, Mapping):
            raise ConfigError(f"{path or 'the config'} must be a dictionary, got {_shown(values)}")
        self.values = dict(values)
        self.taken: set[str] = set()

    def key(self, name: str) -> str:
        """The full name of a key, as in "encoder.moe.layers"."""
        return f"{self.path}.{name}" if self.path else name

    def take(self, name: str, default: Any = _UNSET) -> Any:
        """A key's value; an error if it is not there and has no default."""
        self.taken.add(name)
        value = self.values.get(name, default)
        if value is _UNSET:
            raise ConfigError(f"the config has no {self.key(name)}, which the reference needs")
        return value

    def section(self, name: str) -> "Section":
        """A dictionary inside this one; empty if it is not there or None."""
        values = self.take(name, None)
        return Section({} if values is None else values, self.key(name))

    def get(self, name: str, kind: Kind, default: Any = _UNSET, optional: bool = False) -> Any:
        """A key's value of this kind. None is the default, if there is one, and stays None where it is `optional`."""
        value = self.take(name, default)
        if value is None and (optional or default is not _UNSET):
            return None if optional else default
        if not kind.fits(value):
            raise self.wrong(name, value, kind.words)
        return kind.convert(value)

    def choice(self, name: str, default: Any, allowed: tuple) -> Any:
        """One of several values."""
        value = self.take(name, default)
        if value not in allowed:
            raise self.wrong(name, value, f"one of {allowed}")
        return value

    def call(self, name: str, default: str, classes: Mapping[str, str]) -> str:
        """The class that a name such as "SoftRouter", "package.module.SoftRouter" or "SoftRouter(num_slots=3)" means.

        Arguments in the name become keys of this section; those given beside it win, as in the reference.

        Args:
            name: the key that holds the name.
            default: the class if there is none.
            classes: {class: the module that the reference has it in}.
        """
        text = self.take(name, default)
        try:
            if len(text) > MAX_CALL:
                raise ValueError("too long")
            expression = ast.parse(text, mode="eval").body
            if isinstance(expression, ast.Call):
                if expression.args or any(keyword.arg is None for keyword in expression.keywords):
                    raise ValueError("arguments without a name")
                given = {keyword.arg: ast.literal_eval(keyword.value) for keyword in expression.keywords}
                self.values = {**given, **self.values}
                expression = expression.func
            module, _, cls = ast.unparse(expression).rpartition(".")
        except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:
            raise self.wrong(name, text, f"one of {sorted(classes)}, arguments by name") from error
        if cls not in classes or module not in ("", classes[cls]):
            raise self.wrong(name, text, f"one of {sorted(classes)}")
        return cls

    def wrong(self, name: str, value: Any, wanted: str) -> ConfigError:
        """The error for a value that cannot be converted."""
        return ConfigError(f"{self.key(name)} = {_shown(value)} cannot be converted: it must be {wanted}")

    def finish(self, *ignored: str) -> None:
        """Raises ConfigError if a key was neither taken nor is one of those that change nothing of a forward pass."""
        left = sorted(self.values.keys() - self.taken - {*ignored, "deterministic"})
        if left:
            values = ", ".join(f"{self.key(name)} = {_shown(self.values[name])}" for name in left)
            raise ConfigError(
                f"these keys of the config are not known to the converter: {values}; leave them out if the model's "
                "outputs do not depend on them"
            )
