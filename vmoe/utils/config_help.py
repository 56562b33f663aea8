"""The `--help` of a command whose settings are dataclasses: short, of one section, or of all settings.

The words are those of the dataclasses' docstrings.
"""

import argparse
import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any, Literal, NamedTuple, get_args, get_origin

from docstring_parser import parse

from vmoe.utils.config_types import fields_of, section_of, type_name


class Setting(NamedTuple):
    """A setting of a command."""

    key: str  # "train.steps"
    annotation: Any
    default: str  # "" if the setting is required
    words: str  # what it does

    @property
    def section(self) -> str:
        return self.key.rpartition(".")[0]


def list_settings(config_class: type, prefix: str = "") -> Iterator[Setting]:
    """All settings of a dataclass and its sections, in their order; a section comes before its settings."""
    described = parse(config_class.__doc__ or "").params
    words = {one.arg_name: " ".join((one.description or "").split()) for one in described}
    for field in dataclasses.fields(config_class):
        annotation = fields_of(config_class).get(field.name)
        if annotation is None:
            continue
        made = field.default_factory is not dataclasses.MISSING
        default = field.default_factory() if made else field.default
        shown = "" if default is dataclasses.MISSING else "null" if default is None else repr(default)
        key = prefix + field.name
        yield Setting(key, annotation, shown, words.get(field.name, ""))
        if section := section_of(annotation):
            yield from list_settings(section, f"{key}.")


def format_help(config_class: type, prog: str, description: str, topic: str = "") -> str:
    """The text for a topic: "" for a page of everything, "all", or a section; ValueError: there is no such section.

    A dataclass without sections has one text, with all of its settings.
    """
    listed = list(list_settings(config_class))
    sections = {one.key: one for one in listed if section_of(one.annotation)}
    if topic not in ("", "all", *sections):
        raise ValueError(f"no section is called {topic!r}: --help takes all, {', '.join(sections)}")
    inside = {key: [one for one in listed if one.section == key and one.key not in sections] for key in ["", *sections]}
    usage = f"{prog} [--config FILE] [--SETTING VALUE ...]"
    narrow = partial(argparse.HelpFormatter, max_help_position=20)
    parser = argparse.ArgumentParser(prog, usage, description, add_help=False, formatter_class=narrow)
    short = not topic and bool(sections)
    if topic in ("", "all"):
        own = parser.add_argument_group("settings")
        words = "YAML file with settings, or the bare name of a shipped config; later ones win."
        own.add_argument("--config", metavar="FILE", help=words)
        for one in inside[""]:
            _add(own, one, short)
    if short:
        _add_sections(parser, {key: inside[key] for key in sections if inside[key]})
        example = list(sections)[-1]
        parser.epilog = f"--help SECTION describes its settings, as in --help {example}; --help all lists all."
    for key, section in sections.items():
        if inside[key] and topic and (topic == "all" or f"{key}.".startswith(f"{topic}.")):
            about = section.words or parse(section_of(section.annotation).__doc__ or "").short_description
            group = parser.add_argument_group(key, about)
            for one in inside[key]:
                _add(group, one)
    return parser.format_help()


def _add(group: argparse._ArgumentGroup, setting: Setting, short: bool = False) -> None:
    words = setting.words.replace("%", "%%")
    metavar, required = setting.key.rpartition(".")[2].upper(), "required" if setting.default == "" else ""
    if short:  # the first sentence
        if get_origin(setting.annotation) is Literal:
            metavar = "{" + ",".join(map(str, get_args(setting.annotation))) + "}"
        words = words.partition(". ")[0].partition("; ")[0].rstrip(".") + (f" ({required})" if required else "")
    else:
        default = required or f"default: {setting.default}"
        words += f" (type: {type_name(setting.annotation)}, {default})".replace("%", "%%")
    group.add_argument(f"--{setting.key}", metavar=metavar, help=words)


def _add_sections(parser: argparse.ArgumentParser, sections: dict[str, list[Setting]]) -> None:
    """A line for each section with the names of its settings; sections with the same settings share one."""
    sharing: dict[str, list[str]] = {}
    for section, inside in sections.items():
        sharing.setdefault(", ".join(one.key.rpartition(".")[2] for one in inside), []).append(section)
    group = parser.add_argument_group("sections, with their settings (--SECTION.SETTING VALUE)")
    for names, sharers in sharing.items():
        group.add_argument(sharers[0], metavar=", ".join(sharers), help=names)
