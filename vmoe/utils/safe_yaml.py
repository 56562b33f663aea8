"""YAML files of settings, read with bounds on size and content, since they may be hostile."""

import re
from pathlib import Path
from typing import Any, ClassVar

import yaml

from vmoe.utils.files import read_text
from vmoe.utils.printable import is_unprintable, printable

# Far above any real config (which has some hundred values, six deep).
MAX_YAML_BYTES, MAX_VALUES, MAX_DEPTH, MAX_TEXT, MAX_DIGITS = 2**20, 10_000, 32, 20_000, 300


class UnsafeYaml(yaml.MarkedYAMLError):
    """YAML that is refused although it is valid."""


class SettingsLoader(yaml.SafeLoader):
    """Plain values only: no aliases, tags or duplicate keys, bounded in number, depth and length. "1e-3" is a number,
    "2026-01-01" a text."""

    yaml_implicit_resolvers: ClassVar[dict] = {
        letter: [pair for pair in pairs if not pair[0].endswith((":timestamp", ":float"))]
        for letter, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    values = depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        self.values += 1
        self.depth += 1
        if isinstance(event, yaml.AliasEvent) and event.anchor in self.anchors:  # PyYAML refuses any other alias
            self._refuse(event, f"the alias *{event.anchor} is not allowed; write the value itself")
        if getattr(event, "tag", None) is not None:
            self._refuse(event, f"settings are plain values, and the tag {event.tag!r} is none; leave it out")
        if self.depth > MAX_DEPTH:
            self._refuse(event, f"nested deeper than {MAX_DEPTH}")
        if self.values > MAX_VALUES:
            self._refuse(event, f"more than {MAX_VALUES} values")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def compose_scalar_node(self, anchor: str | None) -> yaml.ScalarNode:
        node = super().compose_scalar_node(anchor)
        limit = MAX_DIGITS if node.tag.endswith((":int", ":float")) else MAX_TEXT
        if len(node.value) > limit:
            self._refuse(node, f"a value of {len(node.value)} characters is too large (at most {limit})")
        if any(is_unprintable(character) and character not in "\t\n" for character in node.value):
            self._refuse(node, f"the text {printable(node.value)!r} holds a control character; leave it out")
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        first: dict[tuple[str, str], yaml.Node] = {}
        for key, _ in node.value:
            if (other := first.setdefault((key.tag, str(key.value)), key)) is not key:
                there = f"is there already, on line {other.start_mark.line + 1}; leave one out"
                self._refuse(key, f"the key {printable(key.value)!r} {there}")
        return super().construct_mapping(node, deep)

    @staticmethod
    def _refuse(where: yaml.Event | yaml.Node, problem: str) -> None:
        raise UnsafeYaml(problem=problem, problem_mark=where.start_mark)


SettingsLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"[-+]?((\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+|\d[\d_]*\.[\d_]*|\.\d[\d_]*|\.(inf|Inf|INF))$|\.(nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)


def parse_yaml(text: str) -> Any:
    """What a YAML text of settings holds; raises UnsafeYaml, or YAMLError or ValueError if it is no YAML."""
    return yaml.load(text, Loader=SettingsLoader)


def read_yaml(file: str | Path) -> Any:
    """The content of a YAML file; ValueError, with file and line: it cannot be read, is no YAML, or is refused."""
    try:
        return parse_yaml(read_text(file, MAX_YAML_BYTES))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        problem = printable(getattr(error, "problem", None) or getattr(error, "reason", None) or error)
        problem = problem if isinstance(error, UnsafeYaml) else f"not valid YAML ({problem})"
        raise ValueError(f"{file}{line}: {problem}") from None
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error.strerror or error})") from None
    except ValueError as error:
        raise ValueError(f"{file}: {printable(error)}") from None
