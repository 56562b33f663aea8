"""YAML that may come from a stranger: plain values only, of bounded size, and every mistake one kind of error.

PyYAML's safe loader runs nothing, but a few hundred bytes of nested aliases ("billion laughs"), an alias inside its own
anchor, or ten thousand brackets still fill the memory, or end in a RecursionError where the tree is walked later. The
parser's events tell all that before anything is built.
"""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import yaml

from vmoe.utils.printable import is_unprintable, printable

# Far above any real config (which has some hundred values, six deep).
MAX_BYTES, MAX_VALUES, MAX_DEPTH, MAX_TEXT, MAX_BITS = 2**20, 10_000, 32, 20_000, 1024
_TAGS = {None, "!", *(f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null", "seq", "map"))}
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the one in Python takes minutes for a row of brackets


class UnsafeYaml(ValueError):
    """YAML that is refused: what is wrong with it, a few words (with the line if it is known)."""


def read_yaml(file: str | Path) -> Any:
    """The content of a YAML file.

    Raises:
        UnsafeYaml: it cannot be read, is no YAML, or is refused by `check_yaml`; the message names file and line.
    """
    file = Path(file)
    try:
        facts = file.stat()
        if not stat.S_ISREG(facts.st_mode):
            raise UnsafeYaml(f"{file}: not a regular file")
        if facts.st_size > MAX_BYTES:
            raise UnsafeYaml(f"{file}: {facts.st_size} bytes are too many for settings (at most {MAX_BYTES})")
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UnsafeYaml(f"{file}: not valid YAML (not UTF-8 at byte {error.start})") from None
    except (OSError, ValueError) as error:
        if isinstance(error, UnsafeYaml):
            raise
        raise UnsafeYaml(f"{file}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    try:
        check_yaml(text)
        content = yaml.load(text, Loader=_Loader)
        _check_values(content)
        return content
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" line {min(mark.line, text.rstrip().count(chr(10))) + 1}" if mark else ""  # not after the last line
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or error
        raise UnsafeYaml(f"{file}{place}: not valid YAML ({printable(problem)})") from None
    except (ValueError, OverflowError) as error:  # a date such as 2022-99-99, a number of many digits
        place = "" if str(error).startswith("line ") else ":"
        raise UnsafeYaml(f"{file}{place} {printable(error)}") from None


def check_yaml(text: str) -> None:
    """Checks a text before anything is built from it.

    Raises:
        UnsafeYaml: more than MAX_VALUES values (each alias counts as all that it stands for), deeper than MAX_DEPTH, an
            alias inside its own anchor, a tag that is not one of YAML's plain values, or a key that a mapping has
            twice, of which PyYAML would take the last without a word.
        yaml.YAMLError: it is no YAML.
    """
    _check_events(text)
    _check_keys(yaml.compose(text, Loader=_Loader))


def _check_keys(root: yaml.Node | None) -> None:
    """Raises UnsafeYaml for the first key that a mapping has twice."""
    pending = [root]
    seen = set()  # aliases are the nodes that they stand for
    while pending:
        node = pending.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            pending += node.value
        elif isinstance(node, yaml.MappingNode):
            lines: dict[tuple[str, str], int] = {}
            for key, value in node.value:
                pending += [key, value]
                if not isinstance(key, yaml.ScalarNode):
                    continue
                line, name = key.start_mark.line + 1, (key.tag, key.value)
                if name in lines:
                    raise UnsafeYaml(
                        f"line {line}: the key {printable(key.value)!r} is there already, on line {lines[name]}; "
                        "leave one of them out"
                    )
                lines[name] = line


def _check_events(text: str) -> None:
    """Walks through the parser's events, which needs little memory whatever the text holds."""
    sizes: list[int] = [0]  # values in each of the open collections, the document's first
    open_anchors: list[str | None] = []
    anchors: dict[str, int] = {}
    for event in yaml.parse(text, Loader=_Loader):
        line = f"line {event.start_mark.line + 1}"
        if isinstance(event, yaml.AliasEvent):
            if event.anchor in open_anchors:
                raise UnsafeYaml(f"{line}: the alias *{event.anchor} lies inside its own anchor, which has no end")
            sizes[-1] += anchors.get(event.anchor, 1)
        elif isinstance(event, yaml.NodeEvent):
            if event.tag not in _TAGS:
                raise UnsafeYaml(f"{line}: settings are plain values, and the tag {event.tag!r} is none; leave it out")
            if isinstance(event, yaml.ScalarEvent):
                if len(event.value) > MAX_TEXT:
                    raise UnsafeYaml(f"{line}: a value of {len(event.value)} characters (at most {MAX_TEXT})")
                sizes[-1] += 1
                if event.anchor:
                    anchors[event.anchor] = 1
            else:
                sizes.append(1)
                open_anchors.append(event.anchor)
        elif isinstance(event, yaml.CollectionEndEvent):
            size, anchor = sizes.pop(), open_anchors.pop()
            sizes[-1] += size
            if anchor:
                anchors[anchor] = size
        if len(sizes) > MAX_DEPTH:
            raise UnsafeYaml(f"{line}: nested deeper than {MAX_DEPTH}")
        if sum(sizes) > MAX_VALUES:
            raise UnsafeYaml(f"{line}: more than {MAX_VALUES} values")


def _check_values(content: Any) -> None:
    """Numbers and texts that YAML can hold and settings cannot."""
    pending = [content]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            pending += [*value, *value.values()]
        elif isinstance(value, (list, tuple)):
            pending += value
        elif isinstance(value, int) and value.bit_length() > MAX_BITS:
            raise UnsafeYaml(f"a whole number of {value.bit_length()} bits is too large (at most {MAX_BITS})")
        elif isinstance(value, str) and any(is_unprintable(c) and c not in "\t\n" for c in value):
            raise UnsafeYaml(f"the text {printable(value)!r} holds a control character; leave it out")
