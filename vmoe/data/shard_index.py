"""Where the samples of a shard lie: made by reading its headers once, then kept in the cache folder.

A sample is all members of one key, the part of a member's name before the first dot of its last component (the rule of
WebDataset): 000012.jpg, 000012.txt and 000012.json are one. Members with other endings are skipped; those that only
look like a sample's, as the picture img_1.5.jpg with the ending "5.jpg", are counted.
"""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vmoe.data.images import DataError
from vmoe.data.sources.emoji import cache_folder
from vmoe.data.tar import BLOCK, REMEDY, read_members
from vmoe.utils.atomic import whole_file
from vmoe.utils.printable import printable

FORMAT = 2
IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp")
KINDS = {**dict.fromkeys(IMAGE_ENDINGS, "image"), "txt": "txt", "json": "json", "cls": "cls"}
# Each part's place (in blocks of 512 bytes; 0: there is none) and size in bytes: 32 bytes a sample.
ENTRY = np.dtype([(f"{part}_{what}", "<u4") for part in ("image", "txt", "json", "cls") for what in ("block", "size")])
CHECKSUM_BYTES = 16
MAX_KEPT = 64
# So that a hostile shard of millions of empty members cannot fill the memory; usual are 1,000 to 10,000.
MAX_SAMPLES = 1_000_000


class Index(NamedTuple):
    """What a shard holds.

    Attributes:
        entries: (N,) of dtype ENTRY, its samples in order, read-only.
        num_dotted: skipped members such as img_1.5.jpg, whose last ending alone is one of KINDS.
        first_dotted: the first of them; "" where there is none.
    """

    entries: np.ndarray
    num_dotted: int = 0
    first_dotted: str = ""


class ShardIndex:
    """The indices of shards; read from the cache folder or made, and the last ones kept in memory."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, Index] = OrderedDict()

    def read(self, path: str) -> Index:
        """The index of a shard.

        Raises:
            DataError: the shard is broken or holds no sample (see `read_members` and `scan`), or the cache folder
                cannot be written to.
        """
        if path in self._kept:
            self._kept.move_to_end(path)
            return self._kept[path]
        file = cache_file(path)
        index = _load(file)
        if index is None:
            index = scan(path)
            content = json.dumps(index[1:]).encode() + b"\n" + index.entries.tobytes()
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                with whole_file(file) as draft:
                    draft.write_bytes(_checksum(content) + content)
            except OSError as error:
                raise DataError(
                    f"cannot write {file} ({error.strerror}): set the environment variable VMOE_CACHE to a writable "
                    "folder"
                ) from None
        self._kept[path] = index
        if len(self._kept) > MAX_KEPT:
            self._kept.popitem(last=False)
        return index


def cache_file(path: str) -> Path:
    """Where the entries of a shard are kept; another file when its place, size or time of change is another."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the data source's path") from None
    facts = f"{os.path.abspath(path)}\0{status.st_size}\0{status.st_mtime_ns}\0{FORMAT}"
    name = hashlib.blake2b(facts.encode(errors="replace"), digest_size=16).hexdigest()
    return cache_folder() / "shards" / f"{name}.index"


def scan(path: str) -> Index:
    """The index of a shard from its headers.

    Raises:
        DataError: as `read_members`; a sample has two pictures or two captions of one kind, or comes twice; there
            are none or more than MAX_SAMPLES.
    """
    column = {name: place for place, name in enumerate(ENTRY.names)}
    rows, numbers = array("L"), {}
    num_dotted, first_dotted = 0, ""
    for member in read_members(path):
        folder, slash, base = member.name.rpartition("/")
        stem, _, ending = base.partition(".")
        kind = KINDS.get(ending.lower())
        if kind is None and stem and ending.lower().rpartition(".")[2] in KINDS:
            num_dotted, first_dotted = num_dotted + 1, first_dotted or member.name
        if kind is None or not stem:
            continue
        key = folder + slash + stem
        number = numbers.setdefault(key, len(numbers))
        if number == MAX_SAMPLES:
            raise DataError(f"{path}: holds more than {MAX_SAMPLES} samples; split it")
        if number * len(column) == len(rows):
            rows.extend([0] * len(column))
        place = number * len(column) + column[f"{kind}_block"]
        if rows[place]:
            raise DataError(f"{path}: member {member.name!r}: sample {key!r} has two such members; {REMEDY}")
        rows[place], rows[place + 1] = member.offset // BLOCK, member.size
    if not rows:
        skipped = f"; {dotted_members(num_dotted, first_dotted)}" if num_dotted else "; leave it out"
        raise DataError(f"{path}: holds no sample ({', '.join(KINDS)}){skipped}")
    return Index(np.array(rows, "<u4").reshape(-1, len(column)).view(ENTRY)[:, 0], num_dotted, first_dotted)


def dotted_members(count: int, first: str) -> str:
    """What to say of skipped members."""
    return (
        f"{count} members such as {printable(first)!r} are skipped, because a sample's name ends at its first dot (as "
        "in WebDataset): write the shards again without dots in the names"
    )


def _load(file: Path) -> Index | None:
    """The index that was kept, or None if there is none or the file is damaged."""
    # Not as .npy: on Python 3.11 numpy's reader of its header now and then fails in several threads at once.
    try:
        content = file.read_bytes()
    except OSError:
        return None
    checksum, content = content[:CHECKSUM_BYTES], content[CHECKSUM_BYTES:]
    if not content or checksum != _checksum(content):
        return None
    dotted, _, entries = content.partition(b"\n")
    return Index(np.frombuffer(entries, ENTRY), *json.loads(dotted))


def _checksum(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=CHECKSUM_BYTES).digest()
