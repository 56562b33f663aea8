"""Reads folders strictly: what lies where a picture or a class folder should be is an error that names it.

Nothing is passed over in silence. What is left aside, with a warning, are hidden files and folders (their name starts
with a dot) and the few that operating systems leave behind; see `is_junk`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterable
from itertools import zip_longest
from pathlib import Path

from vmoe.data.images import IMAGE_SUFFIXES
from vmoe.utils.printable import escaped

logger = logging.getLogger("vmoe.data")

JUNK = frozenset({"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "__macosx", "@eadir"})
MAX_NAMED = 3  # of many names, so many are in a message
MAX_DRAWN = 3  # of a folder's many entries, so many are drawn


def is_junk(name: str) -> bool:
    """Whether a file or folder of this name is hidden (`.DS_Store`, `._cat.jpg`) or an operating system's own."""
    return name.startswith(".") or name.lower() in JUNK


class TreeReader:
    """Lists the folders and pictures of a data set, and complains with the expected layout beside the one found.

    Args:
        root: the data set's folder.
        layout: how the tree should look, drawn in a few lines.

    Raises:
        ValueError: there is no such folder.
    """

    def __init__(self, root: str | Path, layout: str) -> None:
        self.root = Path(root)
        self.layout = layout
        self.junk: set[str] = set()
        if not self.root.is_dir():
            what = "a file, and a folder is needed" if self.root.is_file() else "no such folder"
            raise ValueError(f"{root}: {what}; check the data source's path")

    def entries(self, folder: str = "") -> tuple[list[str], list[str]]:
        """(names of folders, names of files) in a folder of the tree, each sorted.

        Raises:
            ValueError: the folder cannot be read.
        """
        folders, files = [], []
        try:
            with os.scandir(self.root / folder) as scan:
                for entry in scan:
                    if is_junk(entry.name):
                        self.junk.add(entry.path)
                    else:
                        (folders if entry.is_dir() else files).append(entry.name)
        except OSError as error:
            raise ValueError(
                f"{self.root / folder}: cannot be read ({error.strerror}); check its permissions"
            ) from None
        return sorted(folders), sorted(files)

    def folders(
        self,
        folder: str = "",
        known: Collection[str] | None = None,
        kind: str = "class",
        remedy: str = "",
        allowed: Collection[str] = (),
    ) -> list[str]:
        """Sorted names of a folder's folders, where nothing else may be.

        Args:
            folder: where to look, within the tree.
            known: names that folders may have; None: any.
            kind: what such a folder is called in messages.
            remedy: closes the message about an unknown folder.
            allowed: files that may lie beside the folders.

        Raises:
            ValueError: there are files, unknown folders, or no folders.
        """
        folders, files = self.entries(folder)
        where = f"in {folder}/, " if folder else ""
        files = [name for name in files if name not in allowed]
        if files and folders:
            lie = "lies" if len(files) == 1 else "lie"
            raise self.error(f"{where}beside the {kind} folders {lie} {_names(files, 'file')}; move or remove", folder)
        if not folders:
            holds = _names(files, "file") + f", and no {kind} folder" if files else f"no {kind} folder"
            rule = "; there must be one folder of pictures per class" if kind == "class" else ""
            raise self.error(f"{where}there is {holds}{rule}", folder)
        unknown = sorted(set(folders).difference(known)) if known is not None else []
        if unknown:
            verb = "is" if len(unknown) == 1 else "are"
            raise self.error(
                f"{where}{_names(unknown, 'folder')} {verb} not among the {kind} folders of this data set{remedy}",
                folder,
            )
        return folders

    def check_complete(self, found: Iterable[str], wanted: Collection[str], folder: str = "", remedy: str = "") -> None:
        """Raises ValueError unless all wanted class folders are there; the message names some that are not."""
        missing = sorted(set(wanted) - set(found))
        if missing:
            where = f" in {folder}/" if folder else ""
            problem = f"{len(missing)} of {len(wanted)} classes are missing{where}, {_first(missing)}{remedy}"
            raise self.error(problem, folder)

    def pictures(self, folder: str, allowed: Collection[str] = ()) -> list[str]:
        """Sorted names of the pictures in a folder where nothing else may be.

        Args:
            folder: its name within the tree.
            allowed: files that may lie among the pictures.

        Raises:
            ValueError: there is a folder, a file that is no picture, or no picture.
        """
        folders, files = self.entries(folder)
        if folders:
            where = f"{folder}/" if folder else "it"
            raise self.error(f"{where} holds {_names(folders, 'folder')}, and only pictures may be there", folder)
        files = [name for name in files if name not in allowed]
        others = [name for name in files if not name.lower().endswith(IMAGE_SUFFIXES)]
        if others:
            raise ValueError(
                f"{self.root / folder / others[0]}: not a picture ({len(others)} such in this folder): "
                f"a class folder holds pictures only ({', '.join(IMAGE_SUFFIXES)}); move or remove it"
            )
        if not files:
            raise ValueError(
                f"{self.root / folder}: holds no picture; there must be one folder of pictures per class, none empty"
            )
        return files

    def error(self, problem: str, folder: str = "") -> ValueError:
        """An error that shows the expected tree beside the one found, with `folder` opened in it."""
        left = ["expected", *self.layout.strip("\n").splitlines()]
        right = ["found", *self._draw(folder)]
        width = max(map(len, left)) + 4
        rows = [f"  {a:<{width}}{b}".rstrip() for a, b in zip_longest(left, right, fillvalue="")]
        return ValueError("\n".join([f"{self.root}: {problem}", *rows, "All layouts are in docs/evaluation.md."]))

    def warn_of_junk(self) -> None:
        """Logs what was left aside since the last call."""
        if self.junk:
            logger.warning(
                "left aside, hidden or an operating system's own: %s", escaped(_names(sorted(self.junk), "path"))
            )
        self.junk = set()

    def _draw(self, folder: str) -> list[str]:
        """The tree in a few lines: its first entries, and those of the folders on the way to `folder`.

        Without one, those of its first folder.
        """
        path = Path(folder).parts or tuple(self.entries()[0][:1])
        lines = self._branches("", path)
        return [f"{self.root.resolve().name}/", *(lines or ["(empty)"])]

    def _branches(self, where: str, path: tuple[str, ...]) -> list[str]:
        """The first entries of a folder as branches of a tree, with those of the folders on the path in it."""
        folders, files = self.entries(where)
        entries = [f"{name}/" for name in folders] + files
        opened = f"{path[0]}/" if path else None
        drawn = entries[:MAX_DRAWN]
        if opened and opened not in drawn:
            drawn[-1] = opened
        more = [f"... ({len(entries) - MAX_DRAWN:,} more)"] if len(entries) > MAX_DRAWN else []
        lines = []
        for entry in drawn + more:
            last = entry == (drawn + more)[-1]
            lines.append(f"{'└' if last else '├'}── {entry}")
            if entry == opened:
                inner = self._branches(f"{where}/{path[0]}" if where else path[0], path[1:])
                lines += [("    " if last else "│   ") + line for line in inner]
        return lines


def read_class_tree(
    root: str | Path,
    layout: str,
    classes: Collection[str] | None = None,
    remedy: str = "",
    allowed: Collection[str] = (),
) -> dict[str, list[str]]:
    """Reads a tree with one folder of pictures per class, and nothing else.

    Args:
        root: the folder that holds the class folders.
        layout: how the tree should look, for messages.
        classes: names of the folders, all of which must be there; None: any.
        remedy: closes the message about an unknown or missing class.
        allowed: files that may lie beside the class folders.

    Returns:
        {folder: names of its pictures}, all sorted.

    Raises:
        ValueError: a class is missing, unknown or without pictures, or something lies where it should not.
    """
    tree = TreeReader(root, layout)
    try:
        folders = tree.folders(known=classes, remedy=remedy, allowed=allowed)
        if classes is not None:
            tree.check_complete(folders, classes, remedy=remedy)
        return {folder: tree.pictures(folder) for folder in folders}
    finally:
        tree.warn_of_junk()


def _names(names: list[str], kind: str) -> str:
    """`file a.txt`; `2 files (a.txt, b.txt)`; `9 files (as a.txt, b.txt, c.txt)`."""
    return f"{kind} {names[0]}" if len(names) == 1 else f"{len(names):,} {kind}s ({_first(names)})"


def _first(names: list[str]) -> str:
    shown = ", ".join(names[:MAX_NAMED])
    return f"as {shown}" if len(names) > MAX_NAMED else shown
