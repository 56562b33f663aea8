"""The types of settings: the fields of a dataclass, and the sections among them."""

import dataclasses
import functools
import types
import typing
from typing import Any, Literal


@functools.cache
def fields_of(config_class: type) -> dict[str, Any]:
    """{name: type} of the settings of a dataclass."""
    hints = typing.get_type_hints(config_class)
    return {field.name: hints[field.name] for field in dataclasses.fields(config_class) if field.init}


def members_of(annotation: Any) -> tuple[Any, ...]:
    """The types of a union; of another type itself."""
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return typing.get_args(annotation) if is_union else (annotation,)


def section_of(annotation: Any) -> type | None:
    """The dataclass behind a field's type (`Sub`, `Sub | None`), else None."""
    return next((member for member in members_of(annotation) if dataclasses.is_dataclass(member)), None)


def inside(annotation: Any, name: str) -> Any:
    """The type of a key in a setting: of a section's field, Any in a free-form setting; None: there is no such key."""
    if section := section_of(annotation):
        return fields_of(section).get(name)
    return Any if annotation is Any or dict in map(typing.get_origin, members_of(annotation)) else None


def type_name(annotation: Any) -> str:
    """A setting's type as written in its dataclass, or what it may be."""
    if section := section_of(annotation):
        return f"a section with the keys {', '.join(fields_of(section))}"
    members = members_of(annotation)
    choices = [
        choice for member in members if typing.get_origin(member) is Literal for choice in typing.get_args(member)
    ]
    if choices:  # alone, or with null
        return f"one of {', '.join(map(repr, choices))}" + " or null" * (type(None) in members)
    return annotation.__name__ if type(annotation) is type else str(annotation).replace("typing.", "")
