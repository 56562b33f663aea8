"""Files: written atomically, and read with bounds on size and content, since they may be hostile."""

from __future__ import annotations

import json
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import yaml

from vmoe.utils.printable import is_unprintable, printable

# Far above any real config (which has some hundred values, six deep).
MAX_YAML_BYTES, MAX_VALUES, MAX_DEPTH, MAX_TEXT, MAX_DIGITS = 2**20, 10_000, 32, 20_000, 300

HUB_SOURCES = ("hf-hub:", "local-dir:")  # as timm and open_clip spell them


def local_path(checkpoint: str) -> Path:
    """A checkpoint's path, beside which its results belong; of a repository its name in the current folder."""
    kind, _, name = checkpoint.partition(":") if checkpoint.startswith(HUB_SOURCES) else ("", "", checkpoint)
    return Path(name.rpartition("/")[2] if kind == "hf-hub" else name)


def is_writable(folder: Path) -> bool:
    """Whether files can be written in a folder, or it can be made; makes nothing."""
    for each in (folder.absolute(), *folder.absolute().parents):
        try:
            return stat.S_ISDIR(each.stat().st_mode) and os.access(each, os.W_OK | os.X_OK)
        except FileNotFoundError:
            if each.is_symlink():  # to nothing
                return False
        except (OSError, ValueError):  # below a file, or a name that no file can have
            return False
    return False


def can_write(file: Path) -> bool:
    """Whether a file can be written, or written over; missing folders above it count as made."""
    try:
        return not stat.S_ISDIR(file.stat().st_mode) and is_writable(file.absolute().parent)
    except FileNotFoundError:
        return is_writable(file.absolute().parent)
    except (OSError, ValueError):
        return False


@contextmanager
def atomic_file(file: Path) -> Iterator[Path]:
    """A temporary file, which replaces `file` when the block ends without an error. Several processes may write the
    same file, the last one stays; the permissions are those of a new file (umask)."""
    temporary = file.with_name(f".{file.stem}.{secrets.token_hex(6)}{file.suffix}")
    try:
        temporary.touch()
        mode = stat.S_IMODE(temporary.stat().st_mode)
        yield temporary
        os.chmod(temporary, mode)  # some libraries make a new file that is the user's alone
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def read_text(file: str | Path, max_bytes: int = 16 * 2**20) -> str:
    """The content of a UTF-8 file. ValueError, without its name: not UTF-8, no regular file, or over `max_bytes`."""
    facts = Path(file).stat()
    if not (stat.S_ISREG(facts.st_mode) or stat.S_ISDIR(facts.st_mode)):  # a folder is an OSError below
        raise ValueError("not a regular file")
    if facts.st_size > max_bytes:
        raise ValueError(f"{facts.st_size} bytes, more than the limit of {max_bytes}")
    try:
        return Path(file).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from None


def parse_json(text: str | bytes) -> Any:
    """What a JSON text holds; ValueError, in a few words: it is no JSON, or nested too deep."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON at line {error.lineno}, column {error.colno} ({error.msg})") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise ValueError("nested too deep") from None
    except ValueError:  # Python converts no integer of more than some thousand digits
        raise ValueError("a whole number of thousands of digits") from None


def read_json(file: str | Path, max_bytes: int = 16 * 2**20, kind: type = object) -> Any:
    """The content of a JSON file; ValueError: not of `kind`, list or dict, or as of `read_text` and `parse_json`."""
    content = parse_json(read_text(file, max_bytes))
    if not isinstance(content, kind):
        raise ValueError(f"must be a JSON {'object' if kind is dict else 'list'}")
    return content


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
