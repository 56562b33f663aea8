"""Images with captions: from a CSV, TSV or JSONL file, or from a folder with a .txt file beside each image."""

import csv
import itertools
import logging
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from vmoe.data.config import SourceConfig
from vmoe.data.dataset import ImageFiles, Sample, clean_caption
from vmoe.data.images import IMAGE_SUFFIXES, BadSample, DataError, file_errors, leads_out
from vmoe.data.sources.folder_layout import is_junk
from vmoe.utils.files import parse_json, read_text
from vmoe.utils.printable import printable

logger = logging.getLogger("vmoe.data")

IMAGE_KEYS = ("image", "path", "filepath", "file_path", "image_path", "file_name", "filename", "file")
CAPTION_KEYS = ("caption", "title", "text")
DELIMITERS = (",", ";", "\t", "|")
MAX_TEXT = 2**20  # characters of a line, bytes of a caption's file


class PairsFile(ImageFiles):
    """Pairs listed in a file in UTF-8.

    A .csv or .tsv file starts with a line of column names; without one it has exactly two columns, path and caption.
    Excel's line `sep=;` may come first. A .tsv file knows no quotation marks (each is part of its caption). A .jsonl
    file has one object per line. ValueError: it is malformed, or names an image outside of image_root.
    """

    def __init__(self, source: SourceConfig) -> None:
        path = Path(source.path)
        root = Path(source.image_root) if source.image_root else path.parent
        suffix = path.suffix.lower()
        if suffix not in (".csv", ".tsv", ".jsonl"):
            rule = "a file of pairs must end in .csv, .tsv or .jsonl"
            raise ValueError(f"{path}: {rule if path.exists() else 'no such file or folder; check path'}")
        if suffix == ".jsonl" and source.delimiter is not None:
            raise ValueError(f"delimiter is for .csv and .tsv files, and path is {path}; leave it out")
        names, captions, read = [], [], _read_jsonl if suffix == ".jsonl" else _read_table
        with file_errors(path, "; check path"), open(path, newline="", encoding="utf-8-sig") as file:
            for line, row in read(file, source):
                with file_errors(f"{path} line {line}"):
                    image = _value(row, source.image_key, IMAGE_KEYS, "image_key")
                    names.append(_name_within(os.path.abspath(root), image.strip() if isinstance(image, str) else ""))
                    captions.append(_value(row, source.caption_key, CAPTION_KEYS, "caption_key"))
        if not names:
            raise ValueError(f"{path}: holds no pairs; it needs an image path and a caption per line")
        super().__init__(root, names, captions=captions)
        self.image_ids = names

    def __getitem__(self, index: int) -> Sample:
        if self.names[index] == ".":
            raise BadSample(f"pair {index}", "no image path")
        return super().__getitem__(index)


class PairsFolder(ImageFiles):
    """Images in a folder and its subfolders, each with its caption in a .txt file of the same name beside it."""

    def __init__(self, source: SourceConfig) -> None:
        root = Path(source.path)
        files = [file.relative_to(root) for file in sorted(root.rglob("*"))]
        files = [file for file in files if not any(map(is_junk, file.parts))]
        images = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
        if not images:
            raise ValueError(f"{root}: holds no images ({', '.join(IMAGE_SUFFIXES)})")
        used = {file.with_suffix("") for file in images}
        others = [file for file in files if file.with_suffix("") not in used]
        alone = {file.with_suffix("") for file in others if file.suffix == ".txt"}
        pairs = [file for file in others if file.suffix != ".txt" and file.with_suffix("") in alone]
        if pairs:
            rule = f"files with a caption that do not end in {', '.join(IMAGE_SUFFIXES)}"
            logger.warning("%s: skipped %d %s, such as %s", printable(root), len(pairs), rule, printable(pairs[0]))
        super().__init__(root, [file.as_posix() for file in images])
        self.has_captions = True

    def caption(self, index: int) -> str:
        path = str(self.root / self.names[index])
        file = Path(path).with_suffix(".txt")
        try:
            caption = read_text(file, MAX_TEXT)
        except OSError:
            raise BadSample(path, f"no caption file {file.name} beside it") from None
        except ValueError as error:
            raise BadSample(path, f"its caption file {file.name}: {error}") from None
        return clean_caption(caption, path)


def _read_table(file: TextIO, source: SourceConfig) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, {column: cell}) of each row of a .csv or .tsv file."""
    path, tsv = source.path, source.path.lower().endswith(".tsv")
    delimiter = source.delimiter or ("\t" if tsv else ",")
    lines = _lines(file, path)
    first, skipped, found = next(lines, ""), 0, None
    if re.fullmatch(r"sep=.\s*", first, re.IGNORECASE):  # Excel's
        first, skipped, found = next(lines, ""), 1, first[4]
    found = found or next((one for one in (delimiter, *DELIMITERS) if _fits(first, one, source.image_key)), delimiter)
    if found != delimiter:
        shown = "a tab ('\\t')" if found == "\t" else repr(found)
        raise DataError(f"{path}: its columns are separated by {shown}; set delimiter to it")
    # strict: else a stray quotation mark silently swallows the lines up to the next one
    style = {"quoting": csv.QUOTE_NONE} if tsv else {"strict": True, "skipinitialspace": True}
    rows = csv.reader(itertools.chain([first], lines), delimiter=delimiter, **style)
    try:
        columns = [name.strip() for name in next(rows, [])]
        if _is_pair(columns):  # no line of column names
            first_row, columns = columns, [IMAGE_KEYS[0], CAPTION_KEYS[0]]
            yield 1 + skipped, dict(zip(columns, first_row))
        for row in rows:
            line = rows.line_num + skipped
            if len(row) > len(columns):
                what = {",": "a comma", "\t": "a tab"}.get(delimiter, repr(delimiter))
                remedy = f"take {what} out of it" if tsv else f"put a caption with {what} in quotation marks"
                raise DataError(f"{path} line {line}: {len(row)} cells for {len(columns)} columns; {remedy}")
            if row:  # not an empty line
                yield line, dict.fromkeys(columns) | dict(zip(columns, row))
    except csv.Error as error:
        raise DataError(f"{path} line {max(1, rows.line_num) + skipped}: malformed ({error})") from None


def _fits(line: str, delimiter: str, image_key: str | None) -> bool:
    """Whether the first line of a table, cut so, names the images' column, or is a path and a caption."""
    with suppress(csv.Error):
        columns = [name.strip() for name in next(csv.reader([line], delimiter=delimiter, skipinitialspace=True), [])]
        keys = IMAGE_KEYS if image_key is None else (image_key,)
        return not set(columns).isdisjoint(keys) or _is_pair(columns)
    return False


def _is_pair(columns: list[str]) -> bool:
    return len(columns) == 2 and Path(columns[0]).suffix.lower() in IMAGE_SUFFIXES


def _lines(file: TextIO, path: str) -> Iterator[str]:
    """The lines of a file, of which none can fill the memory."""
    for number in itertools.count(1):
        line = file.readline(MAX_TEXT + 1)
        if len(line) > MAX_TEXT:
            raise DataError(f"{path} line {number}: longer than {MAX_TEXT} characters")
        if not line:
            return
        yield line


def _read_jsonl(file: TextIO, source: SourceConfig) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of each line of a .jsonl file."""
    for number, line in enumerate(_lines(file, source.path), start=1):
        if line.strip():
            with file_errors(f"{source.path} line {number}"):
                row = parse_json(line)
                if not isinstance(row, dict):
                    raise ValueError("must be a JSON object with an image path and a caption")
            yield number, row


def _value(row: dict[str, Any], wanted: str | None, usual: tuple[str, ...], setting: str) -> Any:
    keys = usual if wanted is None else (wanted,)
    for key in keys:
        if key in row:
            return row[key]
    raise ValueError(f"has no {' or '.join(keys)}, only {', '.join(map(str, row))}; set {setting}")


def _name_within(root: str, image: str) -> str:
    """An image's path from the root on, so that a copy elsewhere has the same names; "." where there is no path.

    ValueError: it lies outside, here or on Windows, where a list from elsewhere could show what else is there.
    """
    path = Path(os.path.normpath(os.path.join(root, image)))
    if not path.is_relative_to(root):
        remedy = "set image_root to the folder that holds all images"
        raise ValueError(f"the image {printable(image)} is outside of {root}; {remedy}")
    name = path.relative_to(root).as_posix()
    if leads_out(name):
        raise ValueError(f"the image {printable(image)} leads out of its folder on Windows; rename it")
    return name
