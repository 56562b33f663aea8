"""Reads a configuration for `train.py` and `eval.py`: YAML files, then `--key.sub value` overrides, into a dataclass.

jsonargparse converts the values to their types and writes `--help`; this file adds what a user meets first: shipped
configs by their bare name, the nearest known key for an unknown one, and errors of one sentence.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import json
import os
import sys
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, TypeVar

from jsonargparse import ArgumentError, ArgumentParser, set_loader
from yaml import YAMLError

from vmoe.utils.files import UnsafeYaml, parse_yaml, read_yaml
from vmoe.utils.printable import printable

ConfigT = TypeVar("ConfigT")
_UNIONS = (typing.Union, types.UnionType)
set_loader("settings", parse_yaml, exceptions=(YAMLError, ValueError))  # how jsonargparse reads a text as a value


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
    bare = name.removesuffix(".yaml")
    for path in (Path(name), *(root / folder / f"{bare}.yaml" for root in shipped_config_dirs())):
        if os.path.isfile(path):  # unlike Path.is_file, false for a name that no file can have
            return path
    shipped = {path.stem for root in shipped_config_dirs() for path in (root / folder).glob("*.yaml")}
    nearest = difflib.get_close_matches(Path(bare).name, sorted(shipped), n=1)
    hint = f"did you mean {nearest[0]!r}? " if nearest else ""
    raise ConfigError(
        f"--config {printable(name)}: no such file; {hint}shipped configs: {', '.join(sorted(shipped)) or 'none'}"
    )


def parse_config(
    config_class: type[ConfigT], argv: Sequence[str] | None, prog: str, description: str, folder: str = ""
) -> ConfigT:
    """As :func:`read_config`, but prints a mistake as one sentence and exits with code 2."""
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

    Args:
        config_class: dataclass of the configuration (nested dataclasses are sections).
        argv: arguments without the program's name; None: those of this process.
        prog, description: for `--help`.
        folder: subfolder of the shipped configs in which a bare `--config NAME` is looked up.

    Raises:
        ConfigError: unknown key, wrong type, missing file or setting, or a ValueError of a dataclass's own checks.
        SystemExit: code 0 after `--help`.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = ArgumentParser(prog=prog, description=description, exit_on_error=False, parser_mode="settings")
    parser.add_argument("--config", help="YAML file with settings, or the bare name of a shipped config.")
    parser.add_class_arguments(config_class)
    if "--help" in argv or "-h" in argv:
        parser.parse_args(["--help"])
    arguments = list(_key_values(argv))
    settings: dict[str, Any] = {}
    for name in (value for key, value in arguments if key == "config"):
        file = find_config(name, folder)
        content = read_settings_file(file)
        _check_keys(content, config_class, where=str(file))
        _merge(settings, content, config_class)
    for key, text in arguments:
        if key != "config":
            _override(settings, key, text, config_class)
    try:
        return _build(config_class, parser.parse_object(settings).as_dict())
    except ArgumentError as error:
        raise ConfigError(printable(_one_sentence(error, settings, config_class))) from None
    except ValueError as error:  # the dataclasses' own checks
        raise ConfigError(printable(error)) from None


def read_settings_file(file: Path) -> dict[str, Any]:
    """The settings in a YAML file as they stand there; an empty file has none.

    Raises:
        ConfigError: it cannot be read, or is refused (see :class:`vmoe.utils.files.SettingsLoader`).
    """
    try:
        content = read_yaml(file)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if content is not None and not isinstance(content, dict):
        raise ConfigError(f"{file}: must hold settings as `key: value`, got a {type(content).__name__}")
    return content or {}


def check_types(settings: Any, prefix: str = "") -> None:
    """Checks the types of settings that were made in Python, as those of a file or a command line are checked.

    Args:
        settings: a dataclass of settings; those in its sections are checked too.
        prefix: of their names in the message, such as "features.".

    Raises:
        ConfigError: the first value that is not of its setting's type.
    """
    for name, annotation, value in _walk(vars(settings), type(settings), prefix):
        if annotation is not None and not _fits(value, annotation):
            raise ConfigError(_wrong_type(name, annotation, value, repr(value)))


# --- from arguments and files to a tree of settings ------------------------------------------------------------------


def _key_values(argv: list[str]) -> Iterator[tuple[str, str]]:
    """("key.sub", "value") of each `--key.sub value` and `--key.sub=value`."""
    arguments = iter(argv)
    for argument in arguments:
        if not argument.startswith("--"):
            raise ConfigError(f"unrecognized arguments: {printable(argument[:200])}")
        key, equals, value = argument[2:].partition("=")
        if not equals:
            value = next(arguments, "--")
            if value.startswith("--"):
                raise ConfigError(f"--{printable(key[:200])} needs a value")
        yield key, value


def _override(settings: dict[str, Any], key: str, text: str, config_class: type) -> None:
    """Sets the value of one command-line argument in the tree of settings."""
    shown = printable(f"command line: --{key} {text}"[:300])
    if any("\ud800" <= character <= "\udfff" for character in key + text):  # what a byte that is no UTF-8 comes as
        raise ConfigError(f"{shown}: not UTF-8; use characters that are")
    try:
        value = parse_yaml(text)
    except UnsafeYaml as error:
        raise ConfigError(f"{shown}: {error.problem}") from None
    except (YAMLError, ValueError):
        value = text
    *sections, last = key.split(".")
    tree = {last: value}
    for name in reversed(sections):
        tree = {name: tree}
    _check_keys(tree, config_class, where="command line")
    annotation: Any = config_class
    for name in (*sections, last):  # None below a free-form setting
        section = _section(annotation)
        if section is None and annotation is not None and dict not in map(typing.get_origin, _members(annotation)):
            raise _unknown(key, config_class, "command line")
        annotation = _fields(section).get(name) if section is not None else None
    if _section(annotation) is not None:
        _merge(settings, tree, config_class)
        return
    for name in sections:
        if not isinstance(settings.get(name), dict):
            settings[name] = {}
        settings = settings[name]
    # jsonargparse reads a text as the setting's type; a dictionary may get further keys by later arguments.
    settings[last] = value if annotation is None or isinstance(value, dict) else text


def _parsed(text: str) -> Any:
    """The number, list, ... that a text stands for in YAML; the text itself if it stands for none."""
    try:
        return parse_yaml(text)
    except (YAMLError, ValueError):
        return text


def _merge(settings: dict[str, Any], update: dict[str, Any], config_class: type) -> None:
    """Puts `update` over the settings, section by section; other values are replaced."""
    for name, value in update.items():
        section = _section(_fields(config_class)[name])
        if section is not None and isinstance(value, dict) and isinstance(settings.get(name), dict):
            _merge(settings[name], value, section)
        else:
            settings[name] = value


def _build(config_class: type[ConfigT], settings: dict[str, Any]) -> ConfigT:
    """The dataclass from nested, already checked settings."""
    values = {}
    for name, annotation in _fields(config_class).items():
        section = _section(annotation)
        value = settings[name]
        values[name] = _build(section, value) if section is not None and value is not None else value
    return config_class(**values)


def _check_keys(settings: dict[str, Any], config_class: type, where: str) -> None:
    """Raises ConfigError on the first key that the dataclass does not have, and on a section that is none."""
    for name, annotation, value in _walk(settings, config_class):
        if annotation is None:
            raise _unknown(name, config_class, where)
        if _section(annotation) is not None and not _fits(value, annotation):
            raise ConfigError(f"{where}: {_wrong_type(name, annotation, value, str(value))}")


def _unknown(key: str, config_class: type, where: str) -> ConfigError:
    """The error for an unknown key, with the nearest known one."""
    known = list(_known_keys(config_class))
    nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if not nearest:  # right name in the wrong section
        nearest = [other for other in known if other.rpartition(".")[2] == key.rpartition(".")[2]][:1]
    hint = f"the nearest known key is {nearest[0]!r}" if nearest else "`--help` lists all keys"
    return ConfigError(f"{where}: unknown key {printable(key)!r}; {hint}")


def _known_keys(config_class: type, prefix: str = "") -> Iterator[str]:
    """All dotted keys, sections included."""
    for name, annotation in _fields(config_class).items():
        yield prefix + name
        section = _section(annotation)
        if section is not None:
            yield from _known_keys(section, f"{prefix}{name}.")


# --- types -----------------------------------------------------------------------------------------------------------


def _fields(config_class: type) -> dict[str, Any]:
    """{name: type} of the settings of a dataclass."""
    hints = typing.get_type_hints(config_class)
    return {field.name: hints[field.name] for field in dataclasses.fields(config_class) if field.init}


def _members(annotation: Any) -> tuple[Any, ...]:
    """The types of a union; of another type itself."""
    return typing.get_args(annotation) if typing.get_origin(annotation) in _UNIONS else (annotation,)


def _section(annotation: Any) -> type | None:
    """The dataclass behind a field's type (`Sub`, `Sub | None`), else None."""
    return next((member for member in _members(annotation) if dataclasses.is_dataclass(member)), None)


def _listed_section(annotation: Any) -> type | None:
    """The dataclass of a list's entries (`list[Sub]`, `list[Sub] | None`), else None."""
    lists = (member for member in _members(annotation) if typing.get_origin(member) is list)
    return next((_section(typing.get_args(member)[0]) for member in lists), None)


def _walk(values: Mapping[str, Any], config_class: type, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted name, type, value) of each setting in a tree; the type is None if there is no such setting."""
    fields = _fields(config_class)
    for name, value in values.items():
        annotation = fields.get(name)
        section, listed = _section(annotation), _listed_section(annotation)
        if section is not None and isinstance(value, (dict, section)):
            yield from _walk(value if isinstance(value, dict) else vars(value), section, f"{prefix}{name}.")
            continue
        yield f"{prefix}{name}", annotation, value
        for number, entry in enumerate(value if listed is not None and isinstance(value, list) else []):
            if isinstance(entry, dict):
                yield from _walk(entry, listed, f"{prefix}{name}[{number}].")


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


# --- errors ----------------------------------------------------------------------------------------------------------


def _one_sentence(error: ArgumentError, settings: dict[str, Any], config_class: type) -> str:
    """`key must be TYPE, got VALUE; REMEDY` instead of jsonargparse's message of several lines."""
    text = " ".join(str(error).split())
    names = text.partition("arguments are required:")[2].strip()
    if names:
        first = names.split(",")[0].strip()
        return f"missing setting {names}: give it in the config file or as --{first} VALUE"
    for name, annotation, value in _walk(settings, config_class):
        meant = _parsed(value) if isinstance(value, str) else value
        if not _fits(meant, annotation):
            return _wrong_type(name, annotation, meant, str(value))
    return text


def _wrong_type(name: str, annotation: Any, value: Any, shown: str) -> str:
    """The message for a value of another type than its setting's, with what to write instead where that is known."""
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
    return "leave the quotation marks out" if isinstance(value, str) and _fits(_parsed(value), float) else ""


def _type_name(annotation: Any) -> str:
    """A setting's type as written in its dataclass."""
    subsection = _section(annotation)
    if subsection is not None:
        return f"a section with the keys {', '.join(_fields(subsection))}"
    if isinstance(annotation, type) and not typing.get_args(annotation):
        return annotation.__name__
    return str(annotation).replace("typing.", "")
