"""Reads folders strictly: anything but an image or a class folder is an error that names it."""

import logging
import os
from collections.abc import Collection, Sequence
from pathlib import Path

from vmoe.data.images import IMAGE_SUFFIXES, file_errors
from vmoe.utils.printable import escaped

logger = logging.getLogger("vmoe.data")

JUNK = frozenset({"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "__macosx", "@eadir"})
MAX_SHOWN = 3  # of many names in a message


def is_junk(name: str) -> bool:
    """Whether a file or folder is hidden (`.DS_Store`, `._cat.jpg`) or an operating system's own, and is skipped."""
    return name.startswith(".") or name.lower() in JUNK


class TreeReader:
    """Lists the folders and images of a data set; every mistake is a ValueError.

    `layout` is a line that errors show: the expected path of an image below the root.
    """

    def __init__(self, root: str | Path, layout: str) -> None:
        self.root = Path(root)
        self.layout = layout
        self.junk: set[str] = set()
        if not self.root.is_dir():
            what = "a file, and a folder is needed" if self.root.is_file() else "no such folder"
            raise ValueError(f"{root}: {what}")

    def entries(self, folder: str = "") -> tuple[list[str], list[str]]:
        """(names of folders, names of files) in a folder of the tree, each sorted."""
        folders, files = [], []
        with file_errors(self.root / folder, "; check its permissions"), os.scandir(self.root / folder) as scan:
            for entry in scan:
                if is_junk(entry.name):
                    self.junk.add(entry.path)
                else:
                    (folders if entry.is_dir() else files).append(entry.name)
        return sorted(folders), sorted(files)

    def folders(
        self,
        folder: str = "",
        known: Collection[str] | None = None,
        wanted: Collection[str] = (),
        allowed: Collection[str] = (),
    ) -> list[str]:
        """Sorted names of a folder's folders: none but the `known` ones, all `wanted` ones, no files but `allowed`."""
        folders, files = self.entries(folder)
        files = [name for name in files if name not in allowed]
        unknown = sorted(set(folders).difference(known)) if known is not None else []
        missing = sorted(set(wanted).difference(folders))
        if not folders:
            problem = "holds no folders" + (f", only {_names(files, 'file')}" if files else "")
        elif files:
            problem = f"holds {_names(files, 'file')} beside its folders; move or remove"
        elif unknown:
            problem = f"holds {_names(unknown, 'folder')}, not of this data set"
        elif missing:
            problem = f"{len(missing)} of {len(wanted)} folders are missing, {_first(missing)}"
        else:
            return folders
        raise self.error(problem, folder)

    def images(self, folder: str = "", allowed: Collection[str] = ()) -> list[str]:
        """Sorted names of the images in a folder where nothing else (but files in `allowed`) may be."""
        folders, files = self.entries(folder)
        files = [name for name in files if name not in allowed]
        others = [name for name in files if not name.lower().endswith(IMAGE_SUFFIXES)]
        if folders:
            raise self.error(f"holds {_names(folders, 'folder')}, and only images may be there", folder)
        if others:
            suffixes = ", ".join(IMAGE_SUFFIXES)
            raise self.error(f"holds {_names(others, 'file')}, no image ({suffixes}); move or remove", folder)
        if not files:
            raise self.error("holds no image; there must be one folder of images per class", folder)
        return files

    def class_images(self, folders: Sequence[str], inside: str = "") -> tuple[list[str], list[int]]:
        """(names of the images of all class folders, labels); a label is the position of the folder in `folders`."""
        names, labels = [], []
        for label, folder in enumerate(folders):
            images = self.images(f"{inside}/{folder}" if inside else folder)
            names += [f"{folder}/{image}" for image in images]
            labels += [label] * len(images)
        return names, labels

    def class_tree(
        self, classes: Sequence[str] | None = None, allowed: Collection[str] = (), inside: str = ""
    ) -> tuple[list[str], list[str], list[int]]:
        """(class folders, names of their images, labels) of a folder that holds one folder of images per class.

        `classes` are the wanted folders in the order of their labels; None: any, sorted.
        """
        try:
            folders = self.folders(inside, known=classes, wanted=classes or (), allowed=allowed)
            folders = folders if classes is None else list(classes)
            return folders, *self.class_images(folders, inside)
        finally:
            self.warn_of_junk()

    def error(self, problem: str, folder: str = "") -> ValueError:
        """An error about a folder of the tree that shows what is in it, and what is expected."""
        folders, files = self.entries(folder)
        found = _first([*(f"{name}/" for name in folders), *files]) or "nothing"
        expected = f"expected {self.layout} (see docs/evaluation.md)"
        return ValueError(f"{self.root / folder}: {problem}; found {found}; {expected}")

    def warn_of_junk(self) -> None:
        """Logs what was skipped since the last call."""
        if self.junk:
            names = escaped(_names(sorted(self.junk), "path"))
            logger.warning("skipped, hidden or an operating system's own: %s", names)
        self.junk = set()


def _names(names: list[str], kind: str) -> str:
    """`file a.txt`; `2 files (a.txt, b.txt)`; `9 files (as a.txt, b.txt, c.txt)`."""
    return f"{kind} {names[0]}" if len(names) == 1 else f"{len(names):,} {kind}s ({_first(names)})"


def _first(names: list[str]) -> str:
    shown = ", ".join(names[:MAX_SHOWN])
    return f"as {shown}" if len(names) > MAX_SHOWN else shown
