"""Reads folders strictly: anything but an image or a class folder is an error that names it.

Only hidden files and folders (their name starts with a dot) and the few that operating systems leave behind are
skipped, with a warning; see `is_junk`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterable, Sequence
from itertools import zip_longest
from pathlib import Path

from vmoe.data.images import IMAGE_SUFFIXES
from vmoe.utils.printable import escaped

logger = logging.getLogger("vmoe.data")

JUNK = frozenset({"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "__macosx", "@eadir"})
MAX_SHOWN = 3  # of many names in a message, or of a folder's entries in a drawing


def is_junk(name: str) -> bool:
    """Whether a file or folder of this name is hidden (`.DS_Store`, `._cat.jpg`) or an operating system's own."""
    return name.startswith(".") or name.lower() in JUNK


class TreeReader:
    """Lists the folders and images of a data set.

    Every mistake is a ValueError that shows the expected `layout`, drawn in a few lines, beside the one found.
    """

    def __init__(self, root: str | Path, layout: str) -> None:
        self.root = Path(root)
        self.layout = layout
        self.junk: set[str] = set()
        if not self.root.is_dir():
            what = "a file, and a folder is needed" if self.root.is_file() else "no such folder"
            raise ValueError(f"{root}: {what}; check the data source's path")

    def entries(self, folder: str = "") -> tuple[list[str], list[str]]:
        """(names of folders, names of files) in a folder of the tree, each sorted."""
        folders, files = [], []
        try:
            with os.scandir(self.root / folder) as scan:
                for entry in scan:
                    if is_junk(entry.name):
                        self.junk.add(entry.path)
                    else:
                        (folders if entry.is_dir() else files).append(entry.name)
        except OSError as error:
            where = self.root / folder
            raise ValueError(f"{where}: cannot be read ({error.strerror}); check its permissions") from None
        return sorted(folders), sorted(files)

    def folders(
        self,
        folder: str = "",
        known: Collection[str] | None = None,
        kind: str = "class",
        remedy: str = "",
        allowed: Collection[str] = (),
    ) -> list[str]:
        """Sorted names of a folder's folders, where nothing else (but files in `allowed`) may be.

        They must be among the `known` ones; `kind` is what they are called in messages, `remedy` closes one of those.
        """
        folders, files = self.entries(folder)
        where = f"in {folder}/, " if folder else ""
        files = [name for name in files if name not in allowed]
        if files and folders:
            lie = "lies" if len(files) == 1 else "lie"
            raise self.error(f"{where}beside the {kind} folders {lie} {_names(files, 'file')}; move or remove", folder)
        if not folders:
            holds = _names(files, "file") + f", and no {kind} folder" if files else f"no {kind} folder"
            rule = "; there must be one folder of images per class" if kind == "class" else ""
            raise self.error(f"{where}there is {holds}{rule}", folder)
        unknown = sorted(set(folders).difference(known)) if known is not None else []
        if unknown:
            verb = "is" if len(unknown) == 1 else "are"
            problem = f"{_names(unknown, 'folder')} {verb} not among the {kind} folders of this data set{remedy}"
            raise self.error(where + problem, folder)
        return folders

    def check_complete(self, found: Iterable[str], wanted: Collection[str], folder: str = "", remedy: str = "") -> None:
        """Raises ValueError unless all wanted class folders are there; the message names some that are not."""
        missing = sorted(set(wanted) - set(found))
        if missing:
            where = f" in {folder}/" if folder else ""
            problem = f"{len(missing)} of {len(wanted)} classes are missing{where}, {_first(missing)}{remedy}"
            raise self.error(problem, folder)

    def images(self, folder: str, allowed: Collection[str] = ()) -> list[str]:
        """Sorted names of the images in a folder where nothing else (but files in `allowed`) may be."""
        folders, files = self.entries(folder)
        if folders:
            where = f"{folder}/" if folder else "it"
            raise self.error(f"{where} holds {_names(folders, 'folder')}, and only images may be there", folder)
        files = [name for name in files if name not in allowed]
        others = [name for name in files if not name.lower().endswith(IMAGE_SUFFIXES)]
        if others:
            raise ValueError(
                f"{self.root / folder / others[0]}: not an image ({len(others)} such in this folder): "
                f"a class folder holds images only ({', '.join(IMAGE_SUFFIXES)}); move or remove it"
            )
        if not files:
            rule = "there must be one folder of images per class, none empty"
            raise ValueError(f"{self.root / folder}: holds no image; {rule}")
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
        self, classes: Sequence[str] | None = None, remedy: str = "", allowed: Collection[str] = ()
    ) -> tuple[list[str], list[str], list[int]]:
        """(class folders, names of their images, labels) of a tree that holds one folder of images per class.

        `classes` are the names of the folders in the order of their labels, all of which must be there; None: any,
        sorted.
        """
        try:
            folders = self.folders(known=classes, remedy=remedy, allowed=allowed)
            if classes is not None:
                self.check_complete(folders, classes, remedy=remedy)
                folders = list(classes)
            return folders, *self.class_images(folders)
        finally:
            self.warn_of_junk()

    def error(self, problem: str, folder: str = "") -> ValueError:
        """An error that shows the expected tree beside the one found, with `folder` opened in it (or its first one)."""
        path = Path(folder).parts or tuple(self.entries()[0][:1])
        found = self._draw("", path) or ["(empty)"]
        left = ["expected", *self.layout.strip("\n").splitlines()]
        right = ["found", f"{self.root.resolve().name}/", *found]
        width = max(map(len, left)) + 4
        rows = [f"  {a:<{width}}{b}".rstrip() for a, b in zip_longest(left, right, fillvalue="")]
        return ValueError("\n".join([f"{self.root}: {problem}", *rows, "All layouts are in docs/evaluation.md."]))

    def warn_of_junk(self) -> None:
        """Logs what was skipped since the last call."""
        if self.junk:
            names = escaped(_names(sorted(self.junk), "path"))
            logger.warning("skipped, hidden or an operating system's own: %s", names)
        self.junk = set()

    def _draw(self, where: str, path: tuple[str, ...]) -> list[str]:
        """The first entries of a folder as branches of a tree, with those of the folders on the path in it."""
        folders, files = self.entries(where)
        entries = [f"{name}/" for name in folders] + files
        opened = f"{path[0]}/" if path else None
        drawn = entries[:MAX_SHOWN]
        if opened and opened not in drawn:
            drawn[-1] = opened
        if len(entries) > MAX_SHOWN:
            drawn.append(f"... ({len(entries) - MAX_SHOWN:,} more)")
        lines = []
        for entry in drawn:
            last = entry == drawn[-1]
            lines.append(f"{'└' if last else '├'}── {entry}")
            if entry == opened:
                inner = self._draw(f"{where}/{path[0]}" if where else path[0], path[1:])
                lines += [("    " if last else "│   ") + line for line in inner]
        return lines


def _names(names: list[str], kind: str) -> str:
    """`file a.txt`; `2 files (a.txt, b.txt)`; `9 files (as a.txt, b.txt, c.txt)`."""
    return f"{kind} {names[0]}" if len(names) == 1 else f"{len(names):,} {kind}s ({_first(names)})"


def _first(names: list[str]) -> str:
    shown = ", ".join(names[:MAX_SHOWN])
    return f"as {shown}" if len(names) > MAX_SHOWN else shown
