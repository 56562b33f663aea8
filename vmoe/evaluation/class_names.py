"""Class names and prompt templates of published zero-shot evaluations, by the name of the data set.

The lists lie in `names/`, one JSON file per set, with their sources; ImageNet's are open_clip's own.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).with_name("names")
IMAGENET = "imagenet"
AS_FILE = "give the names as a file, one per line in the order of the data's classes"


class PublishedSet(NamedTuple):
    """What is published of one data set.

    Attributes:
        names: what stands in the prompts, in the order of the data set's labels (torchvision's, where it has the set).
        labels: what the data set calls its classes, in the same order ("AnnualCrop" for "annual crop land").
        templates: prompts with {} in the place of a name.
        source: where the lists come from.
    """

    names: tuple[str, ...]
    labels: tuple[str, ...]
    templates: tuple[str, ...]
    source: str


def known_sets() -> list[str]:
    """Names of the sets that :func:`prompt_names` knows, sorted."""
    return sorted([IMAGENET, *(file.stem for file in FOLDER.glob("*.json"))])


@cache
def published_set(name: str) -> PublishedSet:
    """The lists of a data set.

    Raises:
        ValueError: an unknown name; the message lists the known ones.
    """
    if name not in known_sets():
        raise ValueError(f"no class names are known by the name {name!r}; known are {', '.join(known_sets())}")
    if name == IMAGENET:
        import open_clip

        names = tuple(open_clip.IMAGENET_CLASSNAMES)
        templates = tuple(template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES)
        return PublishedSet(names, names, templates, "open_clip")
    content = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    names = tuple(content["names"])
    return PublishedSet(names, tuple(content.get("labels", names)), tuple(content["templates"]), content["source"])


def prompt_names(name: str, classes: Sequence[str] | None = None) -> list[str]:
    """Published class names of a data set, for prompts.

    Args:
        name: "imagenet", "cifar10", ...; see :func:`known_sets`.
        classes: the classes of the data at hand. If these are the set's own labels or names, in whatever order (some
            copies of a set are sorted otherwise than torchvision's), the names come in their order. Case, spaces and
            punctuation do not matter. Numbers from 0 are the set's labels. ImageNet's classes must be its synsets,
            WordNet's words for them or open_clip's names; other sets' classes may be called otherwise, and then are
            in the published order. None: in the published order.

    Raises:
        ValueError: an unknown name, or the data has another number of classes, some of the set's labels in other
            places and not all of them, numbers that are sorted as texts, or classes that are none of ImageNet's.
    """
    published = published_set(name)
    if classes is None:
        return list(published.names)
    if len(classes) != len(published.names):
        raise ValueError(f"class names {name!r} are {len(published.names)}, and the data has {len(classes)} classes")
    if name == IMAGENET:
        return _imagenet_names(classes)
    place = {_key(label): index for labels in (published.names, published.labels) for index, label in enumerate(labels)}
    found = [place.get(_key(one)) for one in classes]
    if None not in found and len(set(found)) == len(found):
        return [published.names[index] for index in found]
    for index, (one, other) in enumerate(zip(classes, found)):
        if other is not None and other != index:
            strange = next((name for name, match in zip(classes, found) if match is None), one)
            raise ValueError(
                f"class {index} of the data is {one!r}, which is class {other} of {name!r}, and {strange!r} is none of "
                f"them: {AS_FILE}"
            )
    if all(one.isdecimal() for one in classes):
        numbers = [int(one) for one in classes]
        if sorted(numbers) == list(range(len(numbers))):
            return [published.names[number] for number in numbers]
        if numbers != sorted(numbers):
            raise ValueError(
                f"classes of the data are the numbers {', '.join(classes[:3])}, ..., sorted as texts, and do not count "
                f"from 0; the published order of {name!r} does not fit them: {AS_FILE}"
            )
    return list(published.names)


def prompt_templates(name: str) -> list[str]:
    """Published prompt templates of a data set, {} in the place of the class name.

    Raises:
        ValueError: an unknown name; the message lists the known ones.
    """
    return list(published_set(name).templates)


def is_published(names: Sequence[str]) -> bool:
    """Whether a list holds exactly the names of a published one, in whatever order (see `prompt_names`)."""
    return any(sorted(names) == sorted(published_set(name).names) for name in known_sets())


def _imagenet_names(classes: Sequence[str]) -> list[str]:
    """open_clip's names in the order of 1,000 classes that one of the known lists must name.

    Any other thousand classes, or these in an order of their own, would give figures that look plausible and are wrong.
    """
    from vmoe.data.imagenet import imagenet_synsets, imagenet_words

    names = published_set(IMAGENET).names
    keys = [_key(one) for one in classes]
    for known in (imagenet_words(), imagenet_synsets(), names):
        known_keys = [_key(one) for one in known]
        if Counter(keys) == Counter(known_keys):  # the two pairs that are equal in open_clip's list have equal names
            name_of = dict(zip(known_keys, names))
            return [name_of[key] for key in keys]
    all_known = {_key(one) for known in (imagenet_words(), imagenet_synsets(), names) for one in known}
    place = next((place for place, key in enumerate(keys) if key not in all_known), None)
    problem = (
        "the classes of the data mix ImageNet's synsets, WordNet's words and open_clip's names, or repeat some"
        if place is None
        else f"class {place} of the data, {classes[place]!r}, is none of ImageNet's synsets, of WordNet's words for "
        "them or of open_clip's names"
    )
    raise ValueError(
        f"class names 'imagenet': {problem}: use the data set's own type (as imagenet or imagenet_v2), or {AS_FILE}"
    )


def _key(label: str) -> str:
    return re.sub(r"[\W_]", "", label.casefold())
