"""Reads a configuration for `train.py` and `eval.py`: YAML file, then `--key.sub value` overrides, into a dataclass.

jsonargparse does the work (types, nesting, `--help` from docstrings); this file adds what a user meets first: shipped
configs by their bare name, an unknown key named together with the nearest known one, and errors of one sentence.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import itertools
import json
import os
import re
import sys
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, TypeVar

from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser
from yaml import YAMLError

from vmoe.utils.printable import printable
from vmoe.utils.safe_yaml import UnsafeYaml, check_yaml, read_yaml

ConfigT = TypeVar("ConfigT")
_UNIONS = (typing.Union, types.UnionType)


class ConfigError(ValueError):
    """A configuration that cannot be used; the message is one sentence for the user."""


def shipped_config_dirs() -> list[Path]:
    """Folders of the configs that come with vmoe: inside an installed wheel, or beside the package in a checkout."""
    package = Path(__file__).resolve().parents[1]
    candidates = [package / "configs"]
    if (package.parent / "pyproject.toml").is_file():  # a checkout; else this would be some site-packages/configs
        candidates.append(package.parent / "configs")
    return [folder for folder in candidates if folder.is_dir()]


def find_config(name: str, folder: str = "") -> Path:
    """Path of a config file.

    Args:
        name: a path, or the bare name of a shipped config, with or without `.yaml` ("limoe_tiny_emoji"), with its
            subfolder if it lies in one ("finetune/vit_upcycled").
        folder: subfolder of the shipped configs in which a bare name is looked up ("" or "eval").

    Raises:
        ConfigError: there is no such file; the message lists the shipped configs.
    """
    places = [Path(name), *(root / folder / f"{name.removesuffix('.yaml')}.yaml" for root in shipped_config_dirs())]
    for place in places:  # the shipped ones also by their path, "finetune/vit_upcycled"
        if _is_file(place):
            return place
    shipped = {path.stem: path for root in shipped_config_dirs() for path in sorted((root / folder).glob("*.yaml"))}
    bare = name.removesuffix(".yaml")
    if bare in shipped:
        return shipped[bare]
    nearest = difflib.get_close_matches(Path(bare).name, shipped, n=1)
    hint = f"did you mean {nearest[0]!r}? " if nearest else ""
    raise ConfigError(
        f"--config {printable(name)}: no such file; {hint}shipped configs: {', '.join(sorted(shipped)) or 'none'}"
    )


def parse_config(
    config_class: type[ConfigT], argv: Sequence[str] | None, prog: str, description: str, folder: str = ""
) -> ConfigT:
    """Reads the command line as :func:`read_config`; on a mistake prints one sentence and exits with code 2.

    Args:
        config_class: dataclass of the configuration (nested dataclasses are sections).
        argv: arguments without the program's name; None: those of this process.
        prog: the program's name, for messages.
        description: first lines of `--help`.
        folder: subfolder of the shipped configs in which a bare `--config NAME` is looked up.
    """
    try:
        return read_config(config_class, argv, prog=prog, description=description, folder=folder)
    except ConfigError as error:
        print(f"{prog}: error: {printable(error)}", file=sys.stderr)
        raise SystemExit(2) from None


def read_config(
    config_class: type[ConfigT],
    argv: Sequence[str] | None = None,
    *,
    prog: str = "vmoe",
    description: str = "",
    folder: str = "",
) -> ConfigT:
    """Builds a configuration from `--config FILE` (repeatable, later files win) and `--key.sub value` overrides.

    Overrides win over files wherever they stand. Free-form settings must be declared `dict[str, Any]`, not `dict`, so
    that their values are read as YAML (`--model.kwargs.num_experts 4` gives an int).

    Raises:
        ConfigError: unknown key, wrong type, missing file or setting, or a ValueError of a dataclass's own checks.
        SystemExit: code 0 after `--help` or `--print_config`.
    """
    files, overrides = _split_config_files(list(sys.argv[1:] if argv is None else argv))
    files = [find_config(name, folder) for name in files]
    for file in files:
        _check_keys(read_settings_file(file), config_class, where=str(file))
    known = ["config", "help", "print_config", *_known_keys(config_class)]
    for argument, following in zip(overrides, [*overrides[1:], ""]):
        _check_override(argument, following, config_class, known)

    parser = ArgumentParser(prog=prog, description=description, exit_on_error=False)
    parser.add_argument(
        "--config", action=ActionConfigFile, help="YAML file with settings, or the bare name of a shipped config."
    )
    parser.add_class_arguments(config_class)
    try:
        plain, nested = _split_nested(overrides, config_class)
        plain = [f"--config={file}" for file in files] + plain
        settings = parser.parse_args(plain).as_dict()
        for path, depth, arguments in nested:
            parsed = parser.parse_args(plain + arguments).as_dict()
            _set(settings, path, _get(parsed, [*path[:depth], path[-1]]))
        return _build(config_class, settings)
    except ArgumentError as error:
        raise ConfigError(printable(_one_sentence(str(error), config_class))) from None
    except ValueError as error:  # the dataclasses' own checks
        raise ConfigError(printable(error)) from None


def _build(config_class: type[ConfigT], settings: dict[str, Any]) -> ConfigT:
    """The dataclass from nested, already checked settings."""
    values = {}
    for name, annotation in _fields(config_class).items():
        section = _section(annotation)
        value = settings[name]
        values[name] = _build(section, value) if section is not None and value is not None else value
    return config_class(**values)


def _split_config_files(argv: list[str]) -> tuple[list[str], list[str]]:
    """Takes the `--config` arguments out of argv; returns (config names, the other arguments)."""
    names, others = [], []
    arguments = iter(argv)
    for argument in arguments:
        if argument == "--config":
            name = next(arguments, None)
            if name is None or name.startswith("--"):
                raise ConfigError("--config needs a file or the name of a shipped config")
            names.append(name)
        elif argument.startswith("--config="):
            names.append(argument.removeprefix("--config="))
        else:
            others.append(argument)
    return names, others


def _split_nested(overrides: list[str], config_class: type) -> tuple[list[str], list[tuple[list[str], int, list[str]]]]:
    """Takes the overrides that lie two or more keys below a free-form setting out of the others.

    jsonargparse would replace what stands between (`image` for `--model.kwargs.image.num_experts 4`), not add to it.

    Returns:
        (the others, [(path, depth of the free-form setting, arguments that set the last key right below that)]).
    """
    plain, nested, current = [], [], None
    for argument in overrides:
        if argument.startswith("--"):
            key, *value = argument[2:].split("=", 1)
            path = key.split(".")
            depth = _free_form_depth(path, config_class)
            current = plain
            if len(path) > depth + 1:
                current = []
                nested.append((path, depth, current))
                argument = "=".join([f"--{'.'.join([*path[:depth], path[-1]])}", *value])
        (plain if current is None else current).append(argument)
    return plain, nested


def _free_form_depth(path: list[str], config_class: type) -> int:
    """How many names of a path lead to the free-form setting on it; more than there are if there is none."""
    section: type | None = config_class
    for depth, name in enumerate(path, start=1):
        fields = _fields(section) if section is not None else {}
        if name not in fields:
            break
        if _is_free_form(fields[name]):
            return depth
        section = _section(fields[name])
    return len(path) + 1


def _get(tree: dict[str, Any], path: list[str]) -> Any:
    for name in path:
        tree = tree[name]
    return tree


def _set(tree: dict[str, Any], path: list[str], value: Any) -> None:
    for name in path[:-1]:
        if not isinstance(tree.get(name), dict):
            tree[name] = {}
        tree = tree[name]
    tree[path[-1]] = value


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that no file can have
        return False


def read_settings_file(file: Path) -> dict[str, Any]:
    """The settings in a YAML file as they stand there; an empty file has none.

    Raises:
        ConfigError: it cannot be read, or is refused (see :mod:`vmoe.utils.safe_yaml`); the message is one sentence.
    """
    try:
        content = read_yaml(file)
    except UnsafeYaml as error:
        raise ConfigError(str(error)) from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{file}: must hold settings as `key: value`, got a {type(content).__name__}")
    return content


def _check_override(argument: str, following: str, config_class: type, known: list[str]) -> None:
    """Raises ConfigError for an override of an unknown key, or whose value jsonargparse could not stand.

    Args:
        argument, following: two neighbours of the command line; the first may be a value without a key.
        config_class: of the settings.
        known: all dotted keys.
    """
    key, equals, value = argument[2:].partition("=") if argument.startswith("--") else ("", "", argument)
    shown = argument if equals or not key or following.startswith("--") else f"{argument} {following}"
    if any("\ud800" <= character <= "\udfff" for character in shown):  # what a byte that is no UTF-8 comes as
        raise ConfigError(f"command line: {printable(shown[:200])}: not UTF-8; use characters that are")
    try:
        check_yaml(value)  # jsonargparse reads it as YAML
    except UnsafeYaml as error:
        raise ConfigError(f"command line: {printable(argument[:80])}: {error}") from None
    except YAMLError:
        pass  # a plain text, or jsonargparse says what is wrong
    if not argument.startswith("--"):
        return
    _check_option(key.removesuffix("+").removesuffix(".help"), config_class, known)
    section: type | None = config_class
    for name in key.split("."):
        section = _section(_fields(section).get(name)) if section is not None else None
    file = Path(value if equals else following)
    if section is not None and _is_file(file):  # a whole section from a file of its own
        _check_keys(read_settings_file(file), section, where=str(file))


def _section(annotation: Any) -> type | None:
    """The dataclass behind a field's type (`Sub`, `Sub | None`), else None."""
    return next((member for member in _members(annotation) if dataclasses.is_dataclass(member)), None)


def _listed_section(annotation: Any) -> type | None:
    """The dataclass of a list's entries (`list[Sub]`, `list[Sub] | None`), else None."""
    for member in (annotation, *typing.get_args(annotation)):
        if typing.get_origin(member) is list:
            return _section(typing.get_args(member)[0])
    return None


def _is_free_form(annotation: Any) -> bool:
    """Whether a field takes any keys below it (`dict[str, Any]`, `dict[str, Any] | None`)."""
    members = (annotation, *typing.get_args(annotation))
    return any(member is dict or typing.get_origin(member) is dict for member in members)


def _fields(config_class: type) -> dict[str, Any]:
    """{name: type} of the settings of a dataclass."""
    hints = typing.get_type_hints(config_class)
    return {field.name: hints[field.name] for field in dataclasses.fields(config_class) if field.init}


def _known_keys(config_class: type, prefix: str = "") -> Iterator[str]:
    """All dotted keys, sections included."""
    for name, annotation in _fields(config_class).items():
        yield prefix + name
        section = _section(annotation)
        if section is not None:
            yield from _known_keys(section, f"{prefix}{name}.")


def _unknown(key: str, known: list[str], where: str) -> ConfigError:
    nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if not nearest:  # right name in the wrong section
        nearest = [other for other in known if other.rpartition(".")[2] == key.rpartition(".")[2]][:1]
    hint = f"the nearest known key is {nearest[0]!r}" if nearest else "`--help` lists all keys"
    return ConfigError(f"{where}: unknown key {key!r}; {hint}")


def _check_keys(settings: dict[str, Any], config_class: type, where: str) -> None:
    """Raises ConfigError on the first key of a YAML tree that the dataclass does not have."""
    known = list(_known_keys(config_class))

    def walk(tree: dict[str, Any], section: type, prefix: str) -> None:
        fields = _fields(section)
        for name, value in tree.items():
            if name not in fields:
                raise _unknown(f"{prefix}{name}", known, where)
            subsection = _section(fields[name])
            if subsection is None:
                for number, entry in enumerate(value if isinstance(value, list) else []):
                    if isinstance(entry, dict) and (listed := _listed_section(fields[name])) is not None:
                        walk(entry, listed, f"{prefix}{name}[{number}].")
                continue
            if isinstance(value, dict):
                walk(value, subsection, f"{prefix}{name}.")
            elif value is not None or fields[name] is subsection:
                raise ConfigError(f"{where}: {prefix}{name} must be {_type_name(fields[name])}, got {printable(value)}")

    walk(settings, config_class, "")


def _check_option(key: str, config_class: type, known: list[str]) -> None:
    """Raises ConfigError if `--key` is not a setting (keys below a free-form one are not checked)."""
    if key in known:
        return
    path = key.split(".")
    if _free_form_depth(path, config_class) > len(path):
        raise _unknown(key, known, "command line")


def _one_sentence(message: str, config_class: type) -> str:
    """Turns jsonargparse's multi-line message into `key must be TYPE, got VALUE; REMEDY`."""
    text = " ".join(message.split())
    if "arguments are required:" in text:
        names = text.partition("arguments are required:")[2].strip()
        first = names.split(",")[0].strip()
        return f"missing setting {names}: give it in the config file or as --{first} VALUE"
    key = re.match(r'Parser key "([^"]+)":', text)
    value = re.search(r"(?:Got|Given) value: (.*?)(?: - Expected|$)", text)
    if key is None or value is None:
        return text
    name = key[1]
    inner = re.search(r'(\w+)": Expected', text[key.end() :])  # a setting of an optional section
    if inner is not None:
        name = f"{name}.{inner[1]}"
    return _wrong_type(config_class, name, _literal(value[1]), value[1])


def check_types(settings: Any, prefix: str = "") -> None:
    """Checks the types of settings that were made in Python, as those of a file or a command line are checked.

    Args:
        settings: a dataclass of settings; those in its sections are checked too.
        prefix: of their names in the message, such as "features.".

    Raises:
        ConfigError: the first value that is not of its setting's type.
    """
    for name, annotation in _fields(type(settings)).items():
        value = getattr(settings, name)
        if not _fits(value, annotation):
            raise ConfigError(f"{prefix}{_wrong_type(type(settings), name, value, repr(value))}")
        if dataclasses.is_dataclass(value):
            check_types(value, f"{prefix}{name}.")


def _members(annotation: Any) -> tuple[Any, ...]:
    """The types of a union; of another type itself."""
    return typing.get_args(annotation) if typing.get_origin(annotation) in _UNIONS else (annotation,)


def _fits(value: Any, annotation: Any) -> bool:
    """Whether a value is of a setting's type; a path serves as text, an integer as float, a tuple as list."""
    if typing.get_origin(annotation) in _UNIONS:
        return any(_fits(value, member) for member in typing.get_args(annotation))
    kind, entries = typing.get_origin(annotation) or annotation, typing.get_args(annotation)
    if kind in (list, tuple):
        same_length = kind is list or len(value) == len(entries) if isinstance(value, (list, tuple)) else False
        return same_length and all(_fits(each, entry) for each, entry in zip(value, itertools.cycle(entries)))
    if kind is Literal:
        return any(value == entry for entry in entries)
    if kind is Any or dataclasses.is_dataclass(kind):  # sources of a mixture may be dictionaries
        return kind is Any or isinstance(value, (kind, dict))
    number = {int: Integral, float: Real}.get(kind)
    if number is not None:
        return isinstance(value, number) and not isinstance(value, bool)
    return isinstance(value, {str: (str, os.PathLike), dict: Mapping}.get(kind, kind))


def _wrong_type(config_class: type, name: str, value: Any, shown: str) -> str:
    """The message for a value of another type than its setting's, with what to write instead where that is known."""
    annotation = _annotation(config_class, name)
    remedy = _remedy(_members(annotation), value)
    if name.endswith("path") and isinstance(value, (list, tuple)):
        remedy = "give one path; several data sets are a mixture, and shards may be joined by '::'"
    return f"{name} must be {_type_name(annotation)}, got {printable(shown)}{remedy and f'; {printable(remedy)}'}"


def _remedy(members: tuple[Any, ...], value: Any) -> str:
    """What to write instead of a value that is of none of a setting's types; "" if that is not known."""
    if value is None:
        return "leave it out for its default"
    for member in members:
        kind, entries = typing.get_origin(member) or member, typing.get_args(member)
        if kind is tuple:
            return f"write a list of {len(entries)} values"
        if kind is list and _section(entries[0]) is not None:
            return "write a list of sections"
        if kind is list and not isinstance(value, (list, tuple)):
            return f"write a list, as in {json.dumps([str(value)]) if entries[0] is str else f'[{value}]'}"
        if kind is dict and not isinstance(value, dict):
            return "write settings, as in {key: value}"
    if isinstance(value, (list, tuple)):
        return "give one value, not a list" if not any(typing.get_origin(member) is list for member in members) else ""
    if type(None) in members and str(value).lower() in ("none", "off", "no", "false", "never", ""):
        return "write null for none"
    if int in members and isinstance(value, float) and value.is_integer():
        return f"write {int(value)}"
    if bool in members:
        return "write true or false"
    return "leave the quotation marks out" if isinstance(value, str) and _is_number(value) else ""


def _is_number(text: str) -> bool:
    try:
        return float(text) is not None
    except ValueError:
        return False


def _literal(text: str) -> Any:
    """The list, number, ... that a text stands for; the text itself if it stands for none."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text
    return text if isinstance(value, tuple) else value  # 0.9,0.95


def _annotation(config_class: type, key: str) -> Any:
    """The type of a setting, by its dotted name."""
    section: Any = config_class
    *sections, last = key.split(".")
    for name in sections:
        section = _section(_fields(section)[name])
    return _fields(section)[last]


def _type_name(annotation: Any) -> str:
    """A setting's type as written in its dataclass."""
    subsection = _section(annotation)
    if subsection is not None:
        return f"a section with the keys {', '.join(_fields(subsection))}"
    if isinstance(annotation, type) and not typing.get_args(annotation):
        return annotation.__name__
    return str(annotation).replace("typing.", "")
