"""Class names and prompt templates of published zero-shot evaluations: `names/*.json`, ImageNet's are open_clip's."""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from vmoe.utils.config import ConfigError

if TYPE_CHECKING:
    from vmoe.data import ImageDataset

FOLDER = Path(__file__).with_name("names")
IMAGENET = "imagenet"
AS_FILE = "give the names as a file, one per line in the order of the data's classes"
NUMBER_WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]

logger = logging.getLogger("vmoe.evaluation")


class PublishedSet(NamedTuple):
    """The published lists of one data set."""

    names: tuple[str, ...]  # for prompts, in the order of the data set's labels (torchvision's, where it has the set)
    labels: tuple[str, ...]  # the data set's own names of its classes ("AnnualCrop" for "annual crop land")
    aliases: dict[str, list[str]]  # {name: other names that copies of the data set give the class}
    templates: tuple[str, ...]  # prompts with {} for a name
    source: str


def known_sets() -> list[str]:
    """Names of the sets that :func:`prompt_names` knows, sorted."""
    return sorted([IMAGENET, *(file.stem for file in FOLDER.glob("*.json"))])


@cache
def published_set(name: str) -> PublishedSet:
    """The lists of a data set; raises ValueError, which lists the known ones, for an unknown name."""
    if name not in known_sets():
        raise ValueError(f"no class names are known by the name {name!r}; known are {', '.join(known_sets())}")
    if name == IMAGENET:
        import open_clip

        names = tuple(open_clip.IMAGENET_CLASSNAMES)
        templates = tuple(template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES)
        return PublishedSet(names, names, {}, templates, "open_clip")
    content = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    names = tuple(content["names"])
    labels, aliases = tuple(content.get("labels", names)), content.get("aliases", {})
    return PublishedSet(names, labels, aliases, tuple(content["templates"]), content["source"])


def prompt_names(name: str, classes: Sequence[str] | None = None) -> list[str]:
    """Published class names of a data set ("imagenet", "cifar10", ...; see :func:`known_sets`), for prompts.

    `classes` are those of the data, in the order of its labels, which is that of the result; None: the published order.
    Each must be one of the set's labels, names or aliases (of ImageNet: all synsets, all WordNet's words or all names).
    Case, spaces, punctuation and leading zeros do not matter, and "three" is 3. Where none is, the numbers from 0 or
    (with a warning) from 1 are the set's labels. Others are a ValueError.
    """
    published = published_set(name)
    if classes is None:
        return list(published.names)
    if len(classes) != len(published.names):
        raise ValueError(f"class names {name!r} are {len(published.names)}, and the data has {len(classes)} classes")
    if name == IMAGENET:
        return _imagenet_names(classes)
    label_of = {_key(alias): published.names.index(one) for one, many in published.aliases.items() for alias in many}
    for labels in (published.names, published.labels):
        label_of |= {_key(label): index for index, label in enumerate(labels)}
    keys = [_key(one) for one in classes]
    if not any(key in label_of for key in keys):  # numbers from 0 or from 1 are the labels
        first = next((first for first in (0, 1) if set(keys) == set(map(str, range(first, first + len(keys))))), None)
        if first is not None:
            label_of = {str(first + label): label for label in range(len(keys))}
        if first == 1:
            pairs = [f"{one!r} is {published.names[label_of[key]]!r}" for one, key in zip(classes, keys)]
            logger.warning("classes of the data count from 1; with class names %r %s", name, _listed(pairs))
    unknown = [repr(one) for one, key in zip(classes, keys) if key not in label_of]
    found = [label_of.get(key) for key in keys]
    left = [repr(one) for index, one in enumerate(published.names) if index not in found]
    if unknown or left:
        problem = f"of which {_listed(unknown)} are none of the set's" if unknown else "of which two are the same"
        unused = f"and the set's {_listed(left)} are left"
        raise ValueError(f"class names {name!r} do not fit the classes of the data, {problem}, {unused}: {AS_FILE}")
    return [published.names[index] for index in found]


def _listed(texts: Sequence[str]) -> str:
    return ", ".join([*texts[:5], *([f"... ({len(texts)} in all)"] if len(texts) > 5 else [])])


def warn_of_order(names: Sequence[str], classes: Sequence[str]) -> None:
    """Warns if a class of the data has the name of another (numbers may mean other things), or is sorted as text."""
    from vmoe.data.sources.folder import warn_of_text_order

    given_to = {_key(name): index for index, name in enumerate(names)}
    keys = [_key(one) for one in classes]
    if any(given_to.get(key, index) != index and not key.isdecimal() for index, key in enumerate(keys)):
        pairs = [f"{one!r} is called {name!r}" for one, name in zip(classes, names) if one != name]
        logger.warning("class_names are in another order than the data's classes: %s", _listed(pairs))
    warn_of_text_order(classes, "class_names")


def check_same_classes(first: str, ours: Sequence[str], second: str, theirs: Sequence[str]) -> None:
    """ConfigError unless `first` and `second` have the same list of classes: labels are positions in it."""
    if len(ours) != len(theirs):
        only = [repr(name) for name in [*ours, *theirs] if (name in ours) != (name in theirs)]
        named = f"; only one of them has {_listed(only)}" if only else ""
        raise ConfigError(f"{first} has {len(ours)} classes and {second} {len(theirs)}; they must agree{named}")
    for index, (one, other) in enumerate(zip(ours, theirs)):
        if one != other:
            raise ConfigError(f"class {index} is {one!r} in {first} and {other!r} in {second}; they must agree")


def class_columns(
    model: str, outputs: int, names: list[str] | None, data: str, dataset: ImageDataset
) -> list[list[int]] | None:
    """For each class of a data set the outputs of a classifier that stand for it; None: they are its classes.

    `model` and `data` are for messages, `names` those of the classifier's classes, if its file holds them. A classifier
    of 1,000 classes with ImageNet's names, or with none, is asked for the outputs that the data set says, or for those
    of its classes if all are ImageNet's: by their synsets, or else by names that are synsets or WordNet's words for
    them. ConfigError: the classifier has other classes than the data.
    """
    from vmoe.data.sources.imagenet import imagenet_synsets, imagenet_words

    classes, columns, lists = dataset.classes, dataset.class_columns, (imagenet_synsets(), imagenet_words())
    if names == classes:
        return None
    if outputs == len(lists[0]) and (names is None or tuple(names) in lists):
        column_of = {name: column for each in lists for column, name in enumerate(each)}
        if columns is None and column_of.keys() >= {*(known := dataset.synsets or classes)}:
            columns = [[column_of[name]] for name in known]
        if columns is not None:
            return columns
    if columns is not None:
        data, classes = f"ImageNet-1k, whose outputs {data} needs,", list(lists[1])
    if names is not None:
        check_same_classes(model, names, data, classes)
    elif outputs != len(classes):
        raise ConfigError(f"{model} has {outputs} classes and {data} {len(classes)}; they must agree")
    return None


def is_published(names: Sequence[str]) -> bool:
    """Whether a list holds exactly the names of a published one, in any order (see `prompt_names`)."""
    return any(sorted(names) == sorted(published_set(name).names) for name in known_sets())


def _imagenet_names(classes: Sequence[str]) -> list[str]:
    """open_clip's names in the order of 1,000 classes that one of the known lists must name; others would be wrong."""
    from vmoe.data.sources.imagenet import imagenet_synsets, imagenet_words

    names = published_set(IMAGENET).names
    keys = [_key(one) for one in classes]
    known = [[_key(one) for one in each] for each in (imagenet_words(), imagenet_synsets(), names)]
    for known_keys in known:
        if Counter(keys) == Counter(known_keys):  # the two pairs that are equal in open_clip's list have equal names
            name_of = dict(zip(known_keys, names))
            return [name_of[key] for key in keys]
    strange = [repr(one) for one, key in zip(classes, keys) if not any(key in known_keys for known_keys in known)]
    lists = "ImageNet's synsets, WordNet's words for them and open_clip's names"
    problem = f"{_listed(strange)} are none of" if strange else "the classes of the data repeat some or mix"
    remedy = f"use the data set's own type (as imagenet_v2), or {AS_FILE}"
    raise ValueError(f"class names 'imagenet': {problem} {lists}: {remedy}")


def _key(label: str) -> str:
    key = re.sub(r"[\W_]", "", label.casefold())
    if key in NUMBER_WORDS:
        return str(NUMBER_WORDS.index(key))
    return (key.lstrip("0") or "0") if key.isdecimal() else key
