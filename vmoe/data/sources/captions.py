"""Pictures with captions: from a CSV, TSV or JSONL file, or from a folder with a .txt file beside each picture."""

from __future__ import annotations

import csv
import itertools
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from vmoe.data.dataset import ImageDataset, Sample, clean_caption
from vmoe.data.images import IMAGE_SUFFIXES, BadSample, leads_out
from vmoe.data.sources.folder_layout import is_junk
from vmoe.utils.printable import printable
from vmoe.utils.safe_json import parse_json, read_text

logger = logging.getLogger("vmoe.data")

IMAGE_KEYS = ("image", "path", "filepath", "file_path", "image_path", "file_name", "filename", "file")
MAX_TEXT = 2**20  # characters of a line, bytes of a caption's file
DELIMITERS = (",", ";", "\t", "|")
CAPTION_KEYS = ("caption", "title", "text")


class PairsFile(ImageDataset):
    """Pairs listed in a file.

    A .csv or .tsv file starts with a line of column names; without one it has exactly two columns, path and caption.
    A .tsv file knows no quotation marks (each is part of its caption). Excel's line `sep=;` may come first. A .jsonl
    file has one object per line.

    Args:
        path: the file, in UTF-8.
        image_root: folder from which relative image paths start, and which no path may lead out of; None: the file's
            own.
        image_key: column or key of the image path; None: the first of IMAGE_KEYS that the file has.
        caption_key: column or key of the caption; None: the first of CAPTION_KEYS that the file has.
        delimiter: what separates the columns of a .csv or .tsv file; None: "," and a tab.

    Raises:
        ValueError: the file is missing, holds no pairs, is malformed, has no such column or another delimiter, or names
            a picture outside of image_root.
    """

    has_captions = True

    def __init__(
        self,
        path: str | Path,
        image_root: str | Path | None = None,
        image_key: str | None = None,
        caption_key: str | None = None,
        delimiter: str | None = None,
    ) -> None:
        path = Path(path)
        self.root = Path(image_root) if image_root else path.parent
        suffix = path.suffix.lower()
        if suffix not in (".csv", ".tsv", ".jsonl"):
            raise ValueError(f"{path}: a file of pairs must end in .csv, .tsv or .jsonl")
        if suffix == ".jsonl" and delimiter is not None:
            raise ValueError(f"delimiter is for .csv and .tsv files, and path is {path}; leave it out")
        rows = _read_jsonl(path) if suffix == ".jsonl" else _read_table(path, delimiter, image_key)
        self.pairs: list[tuple[str, str]] = []
        self._no_caption: dict[int, str] = {}  # why a pair has none that can be used
        try:
            root = os.path.abspath(self.root)
            self.image_ids = []
            for line, row in rows:
                image = row[_key(row, image_key, IMAGE_KEYS, "image_key", f"{path} line {line}")]
                caption = row[_key(row, caption_key, CAPTION_KEYS, "caption_key", f"{path} line {line}")]
                try:
                    text = clean_caption(caption, "")
                except BadSample as error:
                    text, self._no_caption[len(self.pairs)] = "", error.reason
                self.pairs.append((image.strip() if isinstance(image, str) else "", text))
                self.image_ids.append(_name_within(root, self.pairs[-1][0], f"{path} line {line}"))
        except OSError as error:
            raise ValueError(f"{path}: cannot be read ({error.strerror}); check the data source's path") from None
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
        if not self.pairs:
            raise ValueError(f"{path}: holds no pairs; it needs an image path and a caption per line")

    @property
    def captions(self) -> list[str]:
        return [caption for _, caption in self.pairs]

    def __len__(self) -> int:
        return len(self.pairs)

    def file_of(self, index: int) -> tuple[str, Path]:
        return Path(self.image_ids[index]).as_posix(), self.root / self.pairs[index][0]

    def __getitem__(self, index: int) -> Sample:
        image, caption = self.pairs[index]
        if not image:
            raise BadSample(f"pair {index}", "no image path")
        path = self.root / image
        if not caption:
            raise BadSample(str(path), self._no_caption[index])
        return Sample(self.load(path), None, caption, str(path))


class PairsFolder(ImageDataset):
    """Pictures in a folder and its subfolders, each with its caption in a .txt file of the same name beside it.

    Args:
        path: the folder.

    Raises:
        ValueError: the folder is missing or holds no pictures.
    """

    has_captions = True

    def __init__(self, path: str | Path) -> None:
        self.root = path = Path(path)
        if not path.is_dir():
            raise ValueError(f"{path}: no such folder; check the data source's path")
        files = [file for file in sorted(path.rglob("*")) if not any(map(is_junk, file.relative_to(path).parts))]
        self.paths = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
        if not self.paths:
            raise ValueError(f"{path}: holds no pictures ({', '.join(IMAGE_SUFFIXES)})")
        used = {file.with_suffix("") for file in self.paths}
        others = [file for file in files if file.with_suffix("") not in used]
        alone = {file.with_suffix("") for file in others if file.suffix == ".txt"}
        pairs = [file for file in others if file.suffix != ".txt" and file.with_suffix("") in alone]
        if pairs:
            logger.warning(
                "%s: skipped %d files with a caption that do not end in %s, such as %s",
                printable(path), len(pairs), ", ".join(IMAGE_SUFFIXES), printable(pairs[0].relative_to(path)),
            )  # fmt: skip

    @property
    def captions(self) -> list[str]:
        def caption(path: Path) -> str:
            try:
                return _caption_beside(path)
            except BadSample:
                return ""

        return [caption(path) for path in self.paths]

    def __len__(self) -> int:
        return len(self.paths)

    def file_of(self, index: int) -> tuple[str, Path]:
        return self.paths[index].relative_to(self.root).as_posix(), self.paths[index]

    def __getitem__(self, index: int) -> Sample:
        path = self.paths[index]
        return Sample(self.load(path), None, _caption_beside(path), str(path))


def _caption_beside(path: Path) -> str:
    file = path.with_suffix(".txt")
    try:
        caption = read_text(file, MAX_TEXT)
    except OSError:
        raise BadSample(str(path), f"no caption file {file.name} beside it") from None
    except ValueError as error:
        raise BadSample(str(path), f"its caption file {file.name}: {error}") from None
    return clean_caption(caption, str(path))


def _read_table(path: Path, delimiter: str | None, image_key: str | None) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, {column: cell}) of each row of a .csv or .tsv file."""
    with open(path, newline="", encoding="utf-8-sig") as file:
        tsv = path.suffix.lower() == ".tsv"
        delimiter = delimiter or ("\t" if tsv else ",")
        lines = _lines(file, path)
        first, skipped = next(lines, ""), 0
        if re.fullmatch(r"sep=.\s*", first, re.IGNORECASE):  # Excel's
            _check_delimiter(path, delimiter, first[4])
            first, skipped = next(lines, ""), 1
        # strict: else a stray quotation mark silently swallows the lines up to the next one
        style = {"quoting": csv.QUOTE_NONE} if tsv else {"strict": True, "skipinitialspace": True}
        rows = csv.reader(itertools.chain([first], lines), delimiter=delimiter, **style)
        try:
            if not _fits(first, delimiter, image_key):
                for other in DELIMITERS:
                    if _fits(first, other, image_key):
                        _check_delimiter(path, delimiter, other)
            columns = [name.strip() for name in next(rows, [])]
            if len(columns) == 2 and _is_image(columns[0]):  # no line of column names
                first_row, columns = columns, [IMAGE_KEYS[0], CAPTION_KEYS[0]]
                yield 1 + skipped, dict(zip(columns, first_row))
            for row in rows:
                if len(row) > len(columns):
                    what = {",": "a comma", "\t": "a tab"}.get(delimiter, repr(delimiter))
                    remedy = f"take {what} out of it" if tsv else f"put a caption with {what} in quotation marks"
                    raise ValueError(
                        f"{path} line {rows.line_num + skipped}: {len(row)} cells for {len(columns)} columns; {remedy}"
                    )
                if row:  # not an empty line
                    yield rows.line_num + skipped, dict.fromkeys(columns) | dict(zip(columns, row))
        except csv.Error as error:
            raise ValueError(f"{path} line {max(1, rows.line_num) + skipped}: malformed ({error})") from None


def _fits(line: str, delimiter: str, image_key: str | None) -> bool:
    """Whether the first line of a table, cut so, names the images' column, or is a path and a caption."""
    columns = [name.strip() for name in next(csv.reader([line], delimiter=delimiter, skipinitialspace=True), [])]
    keys = IMAGE_KEYS if image_key is None else (image_key,)
    return any(name in keys for name in columns) or (len(columns) == 2 and _is_image(columns[0]))


def _is_image(name: str) -> bool:
    return Path(name).suffix.lower() in IMAGE_SUFFIXES


def _check_delimiter(path: Path, delimiter: str, found: str) -> None:
    """Raises ValueError if a file has another delimiter than the one to be used."""
    if found != delimiter:
        shown = {"\t": "a tab ('\\t')"}.get(found, repr(found))
        raise ValueError(f"{path}: its columns are separated by {shown}; set delimiter to it")


def _lines(file: TextIO, path: Path) -> Iterator[str]:
    """The lines of a file, of which none can fill the memory."""
    for number in itertools.count(1):
        line = file.readline(MAX_TEXT + 1)
        if len(line) > MAX_TEXT:
            raise ValueError(f"{path} line {number}: longer than {MAX_TEXT} characters")
        if not line:
            return
        yield line


def _read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of each line of a .jsonl file."""
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(_lines(file, path), start=1):
            if not line.strip():
                continue
            try:
                row = parse_json(line)
            except ValueError as error:
                raise ValueError(f"{path} line {number}: {error}") from None
            if not isinstance(row, dict):
                raise ValueError(f"{path} line {number}: must be a JSON object with an image path and a caption")
            yield number, row


def _key(row: dict[str, Any], wanted: str | None, usual: tuple[str, ...], setting: str, where: str) -> str:
    key = wanted if wanted is not None else next((key for key in usual if key in row), None)
    if key not in row:
        looked_for = repr(wanted) if wanted is not None else " or ".join(usual)
        raise ValueError(f"{where}: has no {looked_for}, only {', '.join(map(str, row))}; set {setting}")
    return key


def _name_within(root: str, image: str, where: str) -> str:
    """A picture's path from the root on, so that a copy elsewhere has the same names.

    Raises:
        ValueError: it lies outside, here or (by backslashes) on Windows, so that a stranger's list could show what
            else is on this machine.
    """
    path = Path(os.path.normpath(os.path.join(root, image)))
    if not path.is_relative_to(root):
        raise ValueError(
            f"{where}: the picture {printable(image)} lies outside of {root}; set image_root to the folder that holds "
            "all pictures"
        )
    name = str(path.relative_to(root))
    if leads_out(name):
        raise ValueError(f"{where}: the picture {printable(image)} leads out of its folder on Windows; rename it")
    return name
