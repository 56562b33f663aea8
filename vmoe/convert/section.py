"""The reference's config dictionaries, read key by key."""

import math
import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

_UNSET = object()


class ConfigError(ValueError):
    """A config that cannot be converted; one sentence that names the key, its value and the remedy."""


class Kind(NamedTuple):
    """What a value must be, in English, and a function that converts it or raises."""

    description: str
    convert: Callable[[Any], Any]


def _number(description: str, kind: type, low: float, high: float = sys.float_info.max) -> Kind:
    def convert(value: Any) -> Any:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not (number and low <= value <= high and value == kind(value)):
            raise ValueError
        return kind(value)

    return Kind(description, convert)


def _pair(value: Any) -> tuple[int, int]:
    rows, columns = value if isinstance(value, (list, tuple)) else (value, value)
    return SIZE.convert(rows), SIZE.convert(columns)


SIZE = _number("a whole number >= 1", int, 1, 2**31 - 1)
COUNT = _number("a whole number >= 0", int, 0, 2**31 - 1)
NUMBER = _number("a finite number", float, -sys.float_info.max)
NOT_NEGATIVE = _number("a finite number >= 0", float, 0)
POSITIVE = _number("a number > 0", float, math.ulp(0))
RATE = _number("a finite number >= 0 and < 1", float, 0, math.nextafter(1, 0))
FLAG = Kind("true or false", {0: False, 1: True}.__getitem__)
PAIR = Kind("a whole number >= 1, or two of them", _pair)


class Section:
    """One dictionary of a config, or ml_collections' ConfigDict; every key must be taken, so that none is ignored.

    `path` is its own key, for errors.
    """

    def __init__(self, values: Any, path: str = "") -> None:
        self.path = path
        values = values.to_dict() if hasattr(values, "to_dict") else values
        if not isinstance(values, Mapping):
            raise ConfigError(f"{path or 'the config'} must be a dictionary, got {values!r:.200}")
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
        """A key's value of this kind; None only where that is the default, or where it is `optional`."""
        value = self.take(name, default)
        if value is None and (optional or default is None):
            return None
        try:
            return kind.convert(value)
        except (TypeError, ValueError, LookupError):
            raise self.wrong(name, value, kind.description) from None

    def choice(self, name: str, default: str, allowed: Collection[str]) -> Any:
        """One of several names, or what it means if `allowed` is a dictionary."""
        meanings = allowed if isinstance(allowed, Mapping) else dict(zip(allowed, allowed))
        return self.get(name, Kind(f"one of {tuple(allowed)}", meanings.__getitem__), default)

    def class_name(self, default: str, classes: Mapping[str, str]) -> str:
        """The class that this section's "name", such as "SoftRouter" or "package.module.SoftRouter", means.

        `classes` is {class: the module that the reference has it in}.
        """
        given = self.take("name", default)
        module, _, name = str(given).rpartition(".")
        if name not in classes or module not in ("", classes[name]):
            raise self.wrong("name", given, f"one of {sorted(classes)}, with its arguments as keys beside it")
        return name

    def wrong(self, name: str, value: Any, wanted: str) -> ConfigError:
        """The error for a value that cannot be converted."""
        return ConfigError(f"{self.key(name)} = {value!r:.200} cannot be converted: it must be {wanted}")

    def finish(self, *ignored: str) -> None:
        """A ConfigError for a key that was neither taken nor is one of those that change nothing of a forward pass."""
        if left := sorted(self.values.keys() - self.taken - {*ignored, "deterministic"}, key=str):
            values = ", ".join(f"{self.key(name)} = {self.values[name]!r:.200}" for name in left)
            raise ConfigError(
                f"these keys of the config are not known to the converter: {values}; leave them out if the model's "
                "outputs do not depend on them"
            )
