"""The reference's config dictionaries, read key by key: an error for every key or value that has no meaning here."""

import ast
import sys
from collections.abc import Mapping
from typing import Any

_UNSET = object()
MAX_CALL = 1000  # characters of a class with arguments


class ConfigError(ValueError):
    """A config that cannot be converted; one sentence that names the key, its value and the remedy."""


def _is_number(value: Any, kind: type) -> bool:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    largest = 2**31 - 1 if kind is int else sys.float_info.max  # also refuses infinity and NaN
    return abs(value) <= largest and (kind is float or value == int(value))


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

    def number(
        self,
        name: str,
        default: Any = _UNSET,
        kind: type = int,
        minimum: float | None = None,
        optional: bool = False,
    ) -> Any:
        """A whole number (or, with `kind=float`, any finite one) from `minimum` on; None if optional or the default."""
        value = self.take(name, default)
        if value is None and (optional or default is None):
            return None
        if not _is_number(value, kind) or (minimum is not None and value < minimum):
            wanted = "a finite number" if kind is float else "a whole number"
            raise self.wrong(name, value, wanted if minimum is None else f"{wanted} >= {minimum}")
        return kind(value)

    def positive(self, name: str, default: float) -> float:
        """A finite number > 0."""
        value = self.number(name, default, float)
        if value <= 0:
            raise self.wrong(name, value, "a number > 0")
        return value

    def rate(self, name: str, default: float) -> float:
        """A probability of dropout."""
        value = self.take(name, default)
        if not _is_number(value, float) or not 0 <= value < 1:
            raise self.wrong(name, value, "a finite number >= 0 and < 1")
        return float(value)

    def pair(self, name: str, default: Any = _UNSET) -> tuple[int, int] | None:
        """Height and width: one whole number >= 1, or two of them; None if that is the default."""
        value = self.take(name, default)
        if value is None and default is None:
            return None
        sides = value if isinstance(value, (list, tuple)) else (value, value)
        if len(sides) != 2 or not all(_is_number(side, int) and side >= 1 for side in sides):
            raise self.wrong(name, value, "a whole number >= 1, or two of them")
        return int(sides[0]), int(sides[1])

    def flag(self, name: str, default: Any = _UNSET) -> Any:
        """True or False (or 1 or 0); None is the default, if there is one."""
        value = self.take(name, default)
        if value is None and default is not _UNSET:
            return default
        if not isinstance(value, int) or value not in (0, 1):
            raise self.wrong(name, value, "true or false")
        return bool(value)

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
