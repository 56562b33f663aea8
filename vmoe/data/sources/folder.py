"""Image folders: one folder per class, labels as in torchvision."""

import functools
import logging
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from timm.data import ImageNetInfo

from vmoe.data.config import SourceConfig
from vmoe.data.dataset import ImageFiles
from vmoe.data.images import file_errors
from vmoe.data.sources.folder_layout import TreeReader
from vmoe.utils.files import read_json, read_text
from vmoe.utils.printable import escaped, is_unprintable

logger = logging.getLogger("vmoe.data")


class ImageFolder(ImageFiles):
    """One folder per class; labels are the positions of the sorted folder names, as in torchvision.

    Unlike in torchvision, nothing but images may lie in the class folders, and nothing but class folders (and the file
    of class names) beside them.
    """

    def __init__(self, source: SourceConfig) -> None:
        class_names = None if source.class_names is None else Path(source.class_names)
        beside = [] if class_names is None else [class_names.name]
        tree = TreeReader(source.path, "CLASS/IMAGE, such as cat/1.jpg")
        self.folders, names, labels = tree.class_tree(allowed=beside)
        super().__init__(source.path, names, labels)
        words = synset_words(self.folders)
        self.synsets = self.folders if words else None
        if class_names is None:
            self.classes = words or list(map(escaped, self.folders))
        else:
            self.classes = read_class_names(class_names, self.folders)


_imagenet = functools.cache(ImageNetInfo)  # timm reads large files


def synset_words(folders: Sequence[str]) -> list[str] | None:
    """WordNet's words for ImageNet synsets, or None if a folder's name is not one."""
    info = _imagenet("imagenet-22k")
    if not {*info.label_names(), *_imagenet("imagenet-1k").label_names()}.issuperset(folders):
        return None
    names = [info.label_name_to_description(folder) for folder in folders]
    # "crane" is a bird and a machine; where the words are the same, WordNet's explanation tells them apart.
    return [
        info.label_name_to_description(folder, detailed=True) if names.count(name) > 1 else name
        for folder, name in zip(folders, names)
    ]


def read_class_names(file: Path, folders: list[str] | None = None) -> list[str]:
    """Names of classes from a .txt (a name per line) or .json (list, or {folder: name}) file.

    They are of the class folders in their order; without folders they must be a list. ValueError: the file cannot be
    read, does not fit the folders, or has an empty name or one twice.
    """
    where = f"class_names {file}"
    with file_errors(where):
        names = read_json(file) if file.suffix.lower() == ".json" else read_text(file).splitlines()
        if isinstance(names, dict) and folders is not None:
            if missing := [folder for folder in folders if folder not in names]:
                raise ValueError(f"has no name for {len(missing)} class folders, as {missing[0]!r}")
            names = [names[folder] for folder in folders]
        elif folders is not None:
            warn_of_text_order(folders, where)
        if not isinstance(names, list) or not names:
            raise ValueError("must list the names of the classes, the name of class 0 first")
        if folders is not None and len(names) != len(folders):
            raise ValueError(f"has {len(names)} names, but there are {len(folders)} class folders")
        names = [str(name) for name in names]
        for label, name in enumerate(names):
            if not name.strip() or any(map(is_unprintable, name)):
                raise ValueError(f"the name of class {label} is empty or holds a control character, {name!r}")
        if repeated := [name for name, count in Counter(names).items() if count > 1]:
            raise ValueError(f"{repeated[0]!r} is given twice; names of classes must differ")
    return names


def warn_of_text_order(classes: Sequence[str], what: str) -> None:
    """Logs which label is which class where classes that differ only by a number are sorted as text: 0, 1, 10, 11, 2.

    `what` is paired with them by its order, and may be in the order of the numbers.
    """

    def numbers(name: str) -> list[tuple[int, str]]:
        digits = [part.lstrip("0") for part in re.findall("[0-9]+", name)]
        return [(len(part), part) for part in digits]

    numbered = len({re.sub("[0-9]+", "", name) for name in classes}) == 1
    if numbered and list(classes) == sorted(classes) != sorted(classes, key=numbers):
        pairs = [f"{label} is {name!r}" for label, name in enumerate(classes[:5])]
        logger.warning(
            "the data's classes are sorted as text, as in torchvision: label %s, ...; check that %s has the same order",
            escaped(", ".join(pairs)), escaped(what),
        )  # fmt: skip
