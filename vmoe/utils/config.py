"""Reads a command's configuration: YAML files, then `--key.sub value` overrides, into a dataclass.

A mistake is one sentence with what to write instead. `config_help.py` writes `--help`.
"""

import dataclasses
import difflib
import functools
import itertools
import json
import math
import os
import sys
import typing
from collections.abc import Iterator, Mapping, Sequence
from numbers import Integral, Real
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

from yaml import YAMLError

from vmoe.utils.config_help import format_help, list_settings
from vmoe.utils.config_types import fields_of, inside, members_of, section_of, type_name
from vmoe.utils.printable import printable
from vmoe.utils.safe_yaml import UnsafeYaml, parse_yaml, read_yaml

ConfigT = TypeVar("ConfigT")
HELP = frozenset(("--help", "-h"))


class ConfigError(ValueError):
    """A configuration that cannot be used, in one sentence."""


def shipped_config_dirs() -> list[Path]:
    """Folders of the configs that come with vmoe: inside an installed wheel, or beside the package in a checkout."""
    package = Path(__file__).resolve().parents[1]
    in_checkout = (package.parent / "pyproject.toml").is_file()  # else this would be some site-packages/configs
    candidates = [package / "configs", *([package.parent / "configs"] if in_checkout else [])]
    return [folder for folder in candidates if folder.is_dir()]


def find_config(name: str, folder: str = "") -> Path:
    """A config file by its path, or by the name of a shipped config in `folder`, such as "finetune/vit_upcycled"."""
    bare, folders = name.removesuffix(".yaml"), [root / folder for root in shipped_config_dirs()]
    for path in (Path(name), *(one / f"{bare}.yaml" for one in folders)):
        if os.path.isfile(path):  # unlike Path.is_file, false for a name that no file can have
            return path
    found = {path.relative_to(one).with_suffix("") for one in folders for path in one.rglob("*.yaml")}
    shipped = sorted(path.as_posix() for path in found if folder or path.parts[0] != "eval")
    by_stem = {Path(each).name: each for each in shipped}
    nearest = difflib.get_close_matches(bare, shipped, n=1)
    nearest = nearest or [by_stem[stem] for stem in difflib.get_close_matches(Path(bare).name, by_stem, n=1)]
    hint = f"did you mean {nearest[0]!r}? " if nearest else ""
    raise ConfigError(f"--config {printable(name)}: no such file; {hint}shipped configs: {', '.join(shipped)}")


def parse_config(
    config_class: type[ConfigT], argv: Sequence[str] | None, prog: str, description: str, folder: str = ""
) -> ConfigT:
    """As :func:`read_config`, but knows `--help`, and prints a mistake as one sentence and exits with code 2.

    `--help` takes the name of a section, or "all"; `--help=all` is the same.
    """
    argv = sys.argv[1:] if argv is None else argv
    argv = [part for word in argv for part in (word.split("=", 1) if word.startswith("--help=") else [word])]
    try:
        if not HELP.isdisjoint(argv):
            _print_help(config_class, argv, prog, description)
        return read_config(config_class, argv, folder)
    except ConfigError as error:
        print(f"{prog}: error: {printable(error)}", file=sys.stderr)
        raise SystemExit(2) from None


def read_config(config_class: type[ConfigT], argv: Sequence[str], folder: str = "") -> ConfigT:
    """Builds a configuration from `--config FILE` (later files win) and `--key.sub value` overrides, which win.

    Dataclasses inside `config_class` are sections; free-form settings must be declared `dict[str, Any]`. ConfigError:
    unknown key, wrong type, missing file or setting, or a ValueError of a dataclass's own checks.
    """
    arguments = list(_key_values(argv))
    files = [find_config(name, folder) for key, name in arguments if key == "config"]
    trees = [(str(file), read_settings_file(file), 0) for file in files]
    overrides = [pair for pair in arguments if pair[0] != "config"]
    trees += [("command line", _tree_of(key, text, config_class), key.count(".") + 1) for key, text in overrides]
    settings: dict[str, Any] = {}
    for where, tree, depth in trees:
        try:
            _merge(settings, _converted_section(tree, config_class), config_class, depth)
        except ConfigError as error:
            raise ConfigError(printable(f"{where}: {error}")) from None
    try:
        return _build(config_class, settings)
    except ConfigError as error:  # also of the dataclasses' own checks
        raise ConfigError(printable(error)) from None


def read_settings_file(file: Path) -> dict[str, Any]:
    """The settings in a YAML file; ConfigError: unreadable, or refused by `SettingsLoader`."""
    try:
        content = read_yaml(file)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if content is not None and not isinstance(content, dict):
        raise ConfigError(f"{file}: must hold settings as `key: value`, got a {type(content).__name__}")
    return content or {}


def check_types(settings: Any, prefix: str = "") -> None:
    """ConfigError if a value of a dataclass, or of its sections, is not of its setting's type."""
    _converted_section(settings, type(settings), prefix)


def check_numbers(settings: Any, bounds: Mapping[str, Any], prefix: str = "") -> None:
    """ConfigError unless settings are within {name: least} or {name: (least, largest, what null does)}.

    A least of None is above 0; without a largest (None) a number is finite. None is no number, and is not checked. A
    list has some numbers, each once.
    """
    for name, bound in bounds.items():
        least, largest, null = bound if isinstance(bound, tuple) else (bound, None, "")
        value = attrgetter(name)(settings)
        values = value if isinstance(value, (list, tuple)) else [value]
        numbers = [one for one in values if one is not None]
        above = all(one > 0 if least is None else one >= least for one in numbers)
        below = all(one < math.inf if largest is None else one <= largest for one in numbers)
        if not (above and below) or not values or len(set(values)) < len(values):
            low, once = "> 0" if least is None else f">= {least}", ", each once" if values is value else ""
            high = f" and <= {largest}" if largest is not None else " and finite" if least is None or not below else ""
            raise ConfigError(f"{prefix}{name} must be {low}{high}{once}, got {value}{null}")


def _print_help(config_class: type, argv: Sequence[str], prog: str, description: str) -> NoReturn:
    words = [*argv, ""]
    topic = words[next(index for index, word in enumerate(words) if word in HELP) + 1]
    try:
        print(format_help(config_class, prog, description, "" if topic.startswith("--") else topic), end="")
    except ValueError as error:
        raise ConfigError(str(error)) from None
    raise SystemExit(0)


def _key_values(argv: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(key, value) of each `--key value` and `--key=value`."""
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


def _tree_of(key: str, text: str, config_class: type) -> dict[str, Any]:
    """One command-line argument as a file would have it."""
    shown = printable(f"command line: --{key} {text}"[:300])
    if any("\ud800" <= character <= "\udfff" for character in key + text):  # what a byte that is no UTF-8 comes as
        raise ConfigError(f"{shown}: not UTF-8; use characters that are")
    names = key.split(".")
    annotation = functools.reduce(inside, names, config_class)
    if annotation is None:
        raise ConfigError(f"command line: {_unknown(key, config_class)}")
    try:
        value = parse_yaml(text)
    except UnsafeYaml as error:
        raise ConfigError(f"{shown}: {error.problem}") from None
    except (YAMLError, ValueError):
        value = text
    kinds = {typing.get_origin(member) or member for member in members_of(annotation)}
    if str in kinds and type(value) not in kinds - {str}:
        value = text  # as the shell gives it
    return functools.reduce(lambda tree, name: {name: tree}, reversed(names), value)


def _merge(settings: dict[str, Any], update: dict[str, Any], config_class: type | None, depth: int) -> None:
    """Puts `update` over the settings: sections, and dictionaries of the first levels, by key; other values whole."""
    for name, value in update.items():
        section = section_of(inside(config_class, name))
        if isinstance(value, dict) and isinstance(settings.get(name), dict) and (section or depth > 1):
            _merge(settings[name], value, section, depth - 1)
        else:
            settings[name] = value


def _build(config_class: type[ConfigT], settings: dict[str, Any], section: str = "") -> ConfigT:
    """The dataclass from nested settings that are converted already; names its `section` in a ValueError of its own."""
    required = [one.name for one in dataclasses.fields(config_class) if one.default is one.default_factory]
    if missing := [name for name in required if name not in settings]:
        remedy = f"give it in the config file or as --{missing[0]} VALUE"
        raise ConfigError(f"missing setting {', '.join(missing)}: {remedy}")
    values = dict(settings)
    for name, annotation in fields_of(config_class).items():
        if section_of(annotation) and isinstance(values.get(name), dict):
            values[name] = _build(section_of(annotation), values[name], f"{section}.{name}" if section else name)
    try:
        return config_class(**values)
    except ValueError as error:
        if not section or str(error).startswith(f"{section}."):
            raise ConfigError(str(error)) from error
        about_field = str(error).split(" ")[0] in fields_of(config_class)  # "hflip must be ..."
        raise ConfigError(f"{section}{'.' if about_field else ': '}{error}") from error


def _unknown(key: str, config_class: type, prefix: str = "") -> str:
    known = [one.key for one in list_settings(config_class, prefix)]
    nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if not nearest:  # right name in the wrong section
        nearest = [other for other in known if other.rpartition(".")[2] == key.rpartition(".")[2]][:1]
    hint = f"the nearest known key is {nearest[0]!r}" if nearest else "`--help` lists all keys"
    return f"unknown key {printable(key)!r}; {hint}"


_INSTANCES = {int: Integral, float: Real, str: (str, os.PathLike), dict: Mapping}


def _converted_section(settings: Any, config_class: type, prefix: str = "") -> dict[str, Any]:
    """Settings (a dictionary, or the dataclass itself) with values as their types have them; raises ConfigError."""
    fields = fields_of(config_class)
    if not isinstance(settings, dict):
        settings = {name: getattr(settings, name) for name in fields}
    for name in settings:
        if name not in fields:
            raise ConfigError(_unknown(f"{prefix}{name}", config_class, prefix))
    return {name: _converted(f"{prefix}{name}", value, fields[name]) for name, value in settings.items()}


def _converted(name: str, value: Any, annotation: Any) -> Any:
    """A value as its type has it: sections with converted values, a list as tuple, an integer as float."""
    for member in members_of(annotation):
        kind, entries = typing.get_origin(member) or member, typing.get_args(member)
        if dataclasses.is_dataclass(kind):
            if isinstance(value, (dict, kind)):
                return _converted_section(value, kind, f"{name}.")
        elif kind in (list, tuple):
            if isinstance(value, (list, tuple)) and (kind is list or len(value) == len(entries)):
                pairs = zip(value, itertools.cycle(entries))
                return kind(_converted(f"{name}[{number}]", *pair) for number, pair in enumerate(pairs))
        elif kind in (Any, Literal):
            if kind is Any or value in entries:
                return value
        elif isinstance(value, _INSTANCES.get(kind, kind)) and (kind is bool or not isinstance(value, bool)):
            return float(value) if kind is float and isinstance(value, int) else value
    shown = f"{name} must be {type_name(annotation)}, got {printable(repr(value))}"
    remedy = _remedy(name, members_of(annotation), value)
    raise ConfigError(f"{shown}; {printable(remedy)}" if remedy else shown)


def _remedy(name: str, members: tuple[Any, ...], value: Any) -> str:
    """What to write instead of a value that is of none of a setting's types; "" if that is not known."""
    kinds = {typing.get_origin(member) or member: typing.get_args(member) for member in members}
    is_list = isinstance(value, (list, tuple))
    if value is None:
        return "leave it out for its default"
    if tuple in kinds:
        return f"write a list of {len(kinds[tuple])} values"
    if is_list and list not in kinds and dict not in kinds:
        several = "give one path; several data sets are a mixture, and shards may be joined by '::'"
        return several if name.endswith("path") else "give one value, not a list"
    if list in kinds and not is_list:
        entry = json.dumps(str(value)) if kinds[list][0] is str else value
        return "write a list of sections" if section_of(kinds[list][0]) else f"write a list, as in [{entry}]"
    if dict in kinds:
        return "write settings, as in {key: value}"
    if type(None) in kinds and str(value).lower() in ("none", "off", "no", "false", "never", ""):
        return "write null for none"
    is_number = isinstance(value, str) and value.replace(".", "", 1).isdecimal()
    return "leave the quotation marks out" if is_number and {int, float} & kinds.keys() else ""
