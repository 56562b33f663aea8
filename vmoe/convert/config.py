"""The reference's config dictionaries, read key by key: what a key means here, and an error for what has no meaning."""

import ast
from collections.abc import Mapping
from typing import Any

_UNSET = object()


class ConfigError(ValueError):
    """A config that cannot be converted; one sentence that names the key, its value and the remedy."""


class Section:
    """One dictionary of a config; every key must be taken, so that none is silently ignored.

    Args:
        values: a dictionary, or something like ml_collections' ConfigDict.
        path: its own key, for errors.
    """

    def __init__(self, values: Any, path: str = "") -> None:
        self.path = path
        if not isinstance(values, Mapping) and hasattr(values, "to_dict"):
            values = values.to_dict()
        if not isinstance(values, Mapping):
            raise ConfigError(f"{self.key('')} must be a dictionary, got {values!r}")
        self.values = dict(values)
        self.taken: set[str] = set()

    def key(self, name: str) -> str:
        """The whole name of a key, as in "encoder.moe.layers"."""
        return ".".join(part for part in (self.path, name) if part) or "the config"

    def take(self, name: str, default: Any = _UNSET) -> Any:
        """A key's value; an error if it is not there and has no default."""
        self.taken.add(name)
        value = self.values.get(name, default)
        if value is _UNSET:
            raise ConfigError(f"the config has no {self.key(name)}, which the reference needs")
        return value

    def section(self, name: str) -> "Section":
        """A dictionary inside this one; empty if it is not there or None."""
        return Section(self.take(name, None) or {}, self.key(name))

    def number(self, name: str, default: Any = _UNSET, kind: type = int, optional: bool = False) -> Any:
        """A whole number (or, with `kind=float`, any)."""
        value = self.take(name, default)
        if value is None and optional:
            return None
        good = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not good or (kind is int and value != int(value)):
            raise self.wrong(name, value, "a number" if kind is float else "a whole number")
        return kind(value)

    def choice(self, name: str, default: Any, allowed: tuple) -> Any:
        """One of several values."""
        value = self.take(name, default)
        if value not in allowed:
            raise self.wrong(name, value, f"one of {allowed}")
        return value

    def ignore(self, *names: str) -> None:
        """Keys that change nothing of what a converted model computes."""
        self.taken |= set(names)

    def wrong(self, name: str, value: Any, wanted: str) -> ConfigError:
        """The error for a value that cannot be converted."""
        return ConfigError(f"{self.key(name)} = {value!r} cannot be converted: it must be {wanted}")

    def finish(self) -> None:
        """Raises ConfigError if a key was not taken."""
        left = sorted(self.values.keys() - self.taken)
        if left:
            values = ", ".join(f"{self.key(name)} = {self.values[name]!r}" for name in left)
            raise ConfigError(
                f"these keys of the config are not known to the converter: {values}; leave them out if the model's "
                "outputs do not depend on them"
            )

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
            expression = ast.parse(text, mode="eval").body
            if isinstance(expression, ast.Call):
                if expression.args:
                    raise ValueError("positional arguments")
                given = {keyword.arg: ast.literal_eval(keyword.value) for keyword in expression.keywords}
                self.values = {**given, **self.values}
                expression = expression.func
            module, _, cls = ast.unparse(expression).rpartition(".")
        except (SyntaxError, ValueError, TypeError) as error:
            raise self.wrong(name, text, f"one of {sorted(classes)}, arguments by name") from error
        if cls not in classes or module not in ("", classes[cls]):
            raise self.wrong(name, text, f"one of {sorted(classes)}")
        return cls
