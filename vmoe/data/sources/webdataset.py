"""Images with captions or classes in shards: tar files in the layout of WebDataset, img2dataset and open_clip."""

import functools
import glob
import itertools
import logging
import math
import os
import re
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from braceexpand import braceexpand

from vmoe.data.config import SourceConfig
from vmoe.data.dataset import ConcatenatedDataset, Sample, clean_caption
from vmoe.data.fingerprint import Fingerprint
from vmoe.data.images import BadSample, DataError, file_errors
from vmoe.data.sampler import Shuffle, ShuffledShards
from vmoe.data.shards import BLOCK, Index, dotted_members, read_index, read_members
from vmoe.data.sources.folder import read_class_names
from vmoe.data.texts import warn_once
from vmoe.utils.files import parse_json, read_json
from vmoe.utils.printable import printable
from vmoe.utils.world import world

logger = logging.getLogger("vmoe.data")

MAX_TEXT_BYTES = 2**20
MAX_OPEN = 64  # shards whose index is in memory and whose file is open
INDEX_THREADS = 8
MAX_SHARDS = 1_000_000
COUNT_AGAIN = "; remove {}, and the shards are counted again"


class _Members(NamedTuple):
    """Where the members of a sample are."""

    file: BinaryIO
    entry: np.void  # of dtype ENTRY
    name: str  # for messages

    def read(self, part: str) -> bytes:
        offset, size = int(self.entry[f"{part}_block"]) * BLOCK, int(self.entry[f"{part}_size"])
        with file_errors(self.file.name):
            # At an offset, since forked workers share the position of an open file.
            content = os.pread(self.file.fileno(), size, offset)
        if len(content) != size:
            raise DataError(f"{self.file.name}: was changed while it was read; start from scratch")
        return content

    def text(self, part: str) -> str:
        if (size := self.entry[f"{part}_size"]) > MAX_TEXT_BYTES:
            raise BadSample(self.name, f"its .{part} has {size} bytes, more than the limit of {MAX_TEXT_BYTES}")
        try:
            return self.read(part).decode("utf-8-sig")
        except UnicodeDecodeError:
            raise BadSample(self.name, f"its .{part} is not UTF-8") from None


class Shards(ConcatenatedDataset):
    """Images in tar files; `dataset[i]` reads just the bytes of sample i, nothing is unpacked.

    How many samples a shard holds is taken from `sizes.json` in its folder ({"00000.tar": 10000}) or from img2dataset's
    `00000_stats.json` beside it ("successes"), else from its headers.
    """

    def __init__(self, source: SourceConfig) -> None:
        self.paths = find_shards(source.path)
        self.caption_key = source.caption_key
        self.shuffle_buffer, self.streams = source.shuffle_buffer or 100_000, source.streams or 1
        self._shards: OrderedDict[int, tuple[Index, BinaryIO]] = OrderedDict()  # the last MAX_OPEN
        self._count()
        first = self._open(0)[0].entries
        self.has_captions = bool(first["json_block"].any() or (first["txt_block"].any() and self.caption_key is None))
        if source.class_names is not None:
            self.classes = read_class_names(Path(source.class_names))
        elif not self.has_captions:
            problem = "its samples have no captions (.txt or .json); for labels (.cls) set class_names"
            raise ValueError(f"{self.paths[0]}: {problem}")

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_shards": OrderedDict()}  # open files cannot be sent to a worker

    def __getitem__(self, index: int) -> Sample:
        members = self._find(index)
        if not members.entry["image_block"]:
            raise BadSample(members.name, "no image (.jpg, .jpeg, .png, .webp) beside it")
        caption = self._caption(members) if self.has_captions else None
        label = self._label(members) if self.classes is not None else None
        return Sample(self.load(members.name, members.read("image")), label, caption, members.name)

    def name_of(self, index: int) -> str:
        return self._find(index).name

    def caption(self, index: int) -> str:
        return self._caption(self._find(index))

    def shuffle(self, seed: int, batch_size: int) -> Shuffle:
        if batch_size % self.streams:
            equal = "each stream gives an equal part of every batch"
            raise ValueError(f"streams must divide data.loader.batch_size {batch_size}, got {self.streams}: {equal}")
        return ShuffledShards(seed, self.sizes, self.streams, self.shuffle_buffer)

    def _count(self) -> None:
        """Finds the size of each shard, and the file that gives it (None: the shard itself)."""
        known = _sizes_beside(self.paths)
        self._skip_empty({path: file for path, (size, file) in known.items() if size == 0})
        unknown = [path for path in self.paths if known[path][1] is None]
        if unknown:
            logger.info("reading the headers of %d shards in %s, once", len(unknown), os.path.dirname(self.paths[0]))
        # Each process starts elsewhere, and finds in the cache what others have indexed.
        rank, processes = world()
        start = rank * len(unknown) // processes
        unknown = unknown[start:] + unknown[:start]
        with ThreadPoolExecutor(INDEX_THREADS) as pool:  # the indices themselves would fill the memory
            facts = pool.map(lambda path: (len((index := read_index(path)).entries), *index[2:]), unknown)
            counted = dict(zip(unknown, facts))
        dotted = [(number, f"{path}: {first}") for path, (_, number, first) in sorted(counted.items()) if number]
        if dotted:
            skipped = dotted_members(sum(number for number, _ in dotted), dotted[0][1])
            logger.warning("%d of %d shards: %s", len(dotted), len(self.paths), skipped)
        self.size_files = [known[path][1] for path in self.paths]
        self.set_sizes([counted.get(path, known[path])[0] for path in self.paths])

    def _skip_empty(self, empty: dict[str, str]) -> None:
        """Takes shards without samples, {path: the file that gives the size}, out of `paths`; logs how many."""
        for path, file in empty.items():
            if next(read_members(path), None) is not None:
                raise DataError(f"{path}: holds samples, but {file} says 0{COUNT_AGAIN.format(file)}")
        if empty:
            path, file = next(iter(empty.items()))
            message = f"{len(empty)} of {len(self.paths)} shards are empty, as {path}, of which {file} says 0 samples"
            if len(empty) == len(self.paths):
                raise DataError(f"{message}; all downloads may have failed, so download them again")
            logger.warning("%s; they are skipped", message)
            self.paths = [path for path in self.paths if path not in empty]

    def _open(self, shard: int) -> tuple[Index, BinaryIO]:
        """The index and the file of a shard; DataError: it does not hold as many samples as it should."""
        path, size_file = self.paths[shard], self.size_files[shard]
        if shard not in self._shards:
            index = read_index(path)
            dotted = dotted_members(*index[2:]) if index.num_dotted else None
            if len(index.entries) != self.sizes[shard]:
                remedy = COUNT_AGAIN.format(size_file) if size_file else "; start from scratch"
                says = f"{size_file} says" if size_file else "it had"
                problem = f"holds {len(index.entries)} samples, but {says} {self.sizes[shard]}"
                raise DataError(f"{path}: {problem}{f'; {dotted}' if dotted else remedy}")
            if dotted and size_file:
                warn_once(f"{path}: {dotted}")
            with file_errors(path):
                self._shards[shard] = index, open(path, "rb", buffering=0)  # noqa: SIM115 (it stays open)
            if len(self._shards) > MAX_OPEN:
                self._shards.popitem(last=False)
        self._shards.move_to_end(shard)
        return self._shards[shard]

    def _find(self, index: int) -> _Members:
        shard, number = self.locate(index)
        found, file = self._open(shard)
        return _Members(file, found.entries[number], f"{self.paths[shard]}: {found.names[number]!r}")

    def _caption(self, members: _Members) -> str:
        entry, name = members.entry, members.name
        if self.caption_key is None and entry["txt_block"]:
            return clean_caption(members.text("txt"), name)
        if not entry["json_block"]:
            raise BadSample(name, "no caption (.txt or .json) beside it")
        key = self.caption_key or "caption"
        try:
            content = parse_json(members.text("json"))
        except ValueError as error:
            raise BadSample(name, f"its .json is {error}") from None
        if not isinstance(content, dict) or not isinstance(content.get(key), str):
            raise BadSample(name, f"its .json has no text {key!r}")
        return clean_caption(content[key], name)

    def _label(self, members: _Members) -> int:
        if not members.entry["cls_block"]:
            raise BadSample(members.name, "no label (.cls) beside it")
        text = members.text("cls").strip()
        if not re.fullmatch("[0-9]{1,9}", text) or int(text) >= len(self.classes):
            raise BadSample(members.name, f"label {text[:20]!r} is none of the {len(self.classes)} classes")
        return int(text)

    def _add_facts(self, facts: Fingerprint) -> None:
        facts.add("shards", [self.classes, self.caption_key, self.sizes.tolist()])
        for path in self.paths:
            facts.add_file(os.path.basename(path), path)


def find_shards(path: str) -> list[str]:
    """The shards that a setting names, sorted within each of its parts; no shard may be named twice."""
    found: dict[str, str] = {}  # by the path that links lead to
    for part in path.split("::"):
        for name in sorted(_expand(part)):
            if (real := os.path.realpath(name)) in found:
                both = f"{printable(name)} and {printable(found[real])}, which are one shard"
                raise DataError(f"path {printable(path)}: names {both}; each sample must come once")
            found[real] = name
    return list(found.values())


def _expand(part: str) -> Iterator[str]:
    """The shards of a folder, a glob or a brace pattern (`{00..02}`, `{a,b}`)."""
    shown = f"path {printable(part)!r}"
    if os.path.isdir(part):
        names = glob.glob(os.path.join(glob.escape(part), "*.tar"))
        if not names:
            raise DataError(f"{shown}: this folder holds no .tar file")
        yield from names
        return
    # braceexpand writes each range out before it combines them
    ranges = re.findall(r"\{(\d{1,4000})\.\.(\d{1,4000})", part)
    many = math.prod(abs(int(last) - int(first)) + 1 for first, last in ranges) > MAX_SHARDS
    try:
        patterns = [] if many else list(itertools.islice(braceexpand(part, escape=False), MAX_SHARDS + 1))
    except ValueError:  # braces that do not match are part of the name
        patterns = [part]
    if many or len(patterns) > MAX_SHARDS:
        raise DataError(f"{shown}: stands for more than {MAX_SHARDS} shards")
    for pattern in patterns:
        names = glob.glob(pattern) if glob.has_magic(pattern) and not os.path.isfile(pattern) else [pattern]
        missing = [name for name in names or [pattern] if not os.path.isfile(name)]
        if missing:
            raise DataError(f"{shown}: there is no shard {printable(missing[0])!r}")
        yield from names


def _sizes_beside(paths: list[str]) -> dict[str, tuple[int | None, str | None]]:
    """{shard: (its samples, the file beside it that gives them)}; (None, None) where there is none."""
    known = dict.fromkeys(paths, (None, None))
    read = functools.cache(lambda file: read_json(file, kind=dict) if os.path.exists(file) else {})
    for path in paths:
        folder, name = os.path.split(path)
        stats = f"{os.path.splitext(path)[0]}_stats.json"
        for file, key in ((stats, "successes"), (os.path.join(folder, "sizes.json"), name)):
            with file_errors(file, COUNT_AGAIN.format("it")):
                size = read(file).get(key)
                if size is not None and (type(size) is not int or not 0 <= size < 2**40):
                    raise ValueError(f"{key} must be a number of samples, got {size!r}")
            if size is not None:
                known[path] = size, file
    return known
