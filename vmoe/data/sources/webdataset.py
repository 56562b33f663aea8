"""Pictures with captions or classes in shards: tar files in the layout of WebDataset, img2dataset and open_clip."""

from __future__ import annotations

import glob
import logging
import os
import re
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from vmoe.data.dataset import Captions, ImageDataset, Sample, clean_caption
from vmoe.data.fingerprint import Fingerprint
from vmoe.data.images import BadSample, DataError
from vmoe.data.sampler import ShuffledShards, shuffled_shards
from vmoe.data.shard_index import ShardIndex, dotted_members
from vmoe.data.sources.folder import read_class_names
from vmoe.data.tar import BLOCK, read_members, read_name
from vmoe.utils.printable import printable
from vmoe.utils.safe_json import parse_json, read_json
from vmoe.utils.world import world

logger = logging.getLogger("vmoe.data")

CAPTION_KEY = "caption"
MAX_TEXT_BYTES = 2**20
MAX_OPEN = 64
INDEX_THREADS = 8
MAX_SHARDS = 1_000_000


class Shards(ImageDataset):
    """Pictures in tar files; `dataset[i]` reads just the bytes of sample i, nothing is unpacked.

    How many samples a shard holds is taken from `sizes.json` in its folder ({"00000.tar": 10000}) or from img2dataset's
    `00000_stats.json` beside it ("successes"), else from its headers. These are read when they are first needed, and
    kept in the cache folder.

    Args:
        path: see `find_shards`.
        caption_key: key of the caption in the .json members; None: the .txt member, else "caption" of the .json.
        class_names: .txt or .json file with the names of the classes that the .cls members number from 0; None: samples
            have no labels.
        shuffle_buffer: samples that are shuffled together; see `ShuffledShards`.
        streams: places that are read side by side; see `ShuffledShards`.

    Raises:
        DataError: there are no such shards, or the first of them (without numbers of samples from elsewhere, any) is
            broken.
        ValueError: samples have neither captions nor (with class_names) labels, or class_names cannot be read.
    """

    def __init__(
        self,
        path: str,
        caption_key: str | None = None,
        class_names: str | None = None,
        shuffle_buffer: int = 100_000,
        streams: int = 1,
    ) -> None:
        self.paths = find_shards(path)
        self.caption_key = caption_key
        self.shuffle_buffer = shuffle_buffer
        self.streams = streams
        self.index = ShardIndex()
        self._open: OrderedDict[str, BinaryIO] = OrderedDict()
        self._told: set[int] = set()  # shards of which skipped members were logged
        self.sizes, self.said_by = self._count()
        self.ends = self.sizes.cumsum()
        first = self._entries(0)
        self.has_captions = bool(first["json_block"].any() or (first["txt_block"].any() and caption_key is None))
        if class_names is not None:
            self.classes = read_class_names(Path(class_names))
        elif not self.has_captions:
            raise ValueError(
                f"{self.paths[0]}: its samples have no captions (.txt or .json); for labels (.cls) set class_names"
            )

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: int) -> Sample:
        path, entry, name = self._find(index)
        if not entry["image_block"]:
            raise BadSample(name, "no picture (.jpg, .jpeg, .png, .webp) beside it")
        caption = self._caption(path, entry, name) if self.has_captions else None
        label = self._label(path, entry, name) if self.classes is not None else None
        return Sample(self.load(name, self._read(path, entry, "image")), label, caption, name)

    @property
    def captions(self) -> Sequence[str] | None:
        """The captions, each read when it is asked for."""
        return Captions(len(self), self.caption) if self.has_captions else None

    def caption(self, index: int) -> str:
        """A sample's caption, without its picture; "" where there is none."""
        try:
            return self._caption(*self._find(index))
        except BadSample:
            return ""

    def shuffle(self, seed: int, batch_size: int) -> ShuffledShards:
        return shuffled_shards(seed, batch_size, self.sizes, self.streams, self.shuffle_buffer)

    def __getstate__(self) -> dict[str, Any]:  # a worker opens files of its own
        return self.__dict__ | {"_open": OrderedDict()}

    def _count(self) -> tuple[np.ndarray, list[str | None]]:
        """(samples of each shard, the file that says so or None where the shard itself does).

        Shards that hold none, as where all downloads failed, are left out of `paths`.
        """
        said: list[tuple[int, str] | None] = list(_read_sizes(self.paths))
        empty = [(path, one[1]) for path, one in zip(self.paths, said) if one is not None and one[0] == 0]
        if empty:
            self._leave_out(empty)
            said = [one for one in said if one is None or one[0]]
        unknown = [number for number, one in enumerate(said) if one is None]
        # Each process starts at another place, so that they share the work where they share the cache folder.
        rank, processes = world()
        begin = rank * len(unknown) // processes
        if unknown:
            logger.info("reading the headers of %d shards in %s, once", len(unknown), os.path.dirname(self.paths[0]))
        with ThreadPoolExecutor(INDEX_THREADS) as pool:

            def read(number: int) -> tuple[int, int, str]:
                index = ShardIndex().read(self.paths[number])
                return len(index.entries), index.num_dotted, index.first_dotted

            turned = unknown[begin:] + unknown[:begin]
            counted = dict(zip(turned, pool.map(read, turned)))
        dotted = [(self.paths[number], *counted[number][1:]) for number in unknown if counted[number][1]]
        if dotted:
            (path, _, first), count = dotted[0], sum(num_dotted for _, num_dotted, _ in dotted)
            skipped = dotted_members(count, f"{path}: {first}")
            logger.warning("%d of %d shards: %s", len(dotted), len(self.paths), skipped)
        sizes = np.array([counted[number][0] if one is None else one[0] for number, one in enumerate(said)], np.int64)
        return sizes, [one and one[1] for one in said]

    def _leave_out(self, empty: list[tuple[str, str]]) -> None:
        """Takes shards without samples, each with the file that says so, out of `paths`; logs how many.

        Raises:
            DataError: one holds something, or no other is left.
        """
        for path, file in empty:
            if next(read_members(path), None) is not None:
                raise DataError(f"{path}: holds samples, but {file} says 0; remove {file}, and shards are counted anew")
        path, file = empty[0]
        message = f"{len(empty)} of {len(self.paths)} shards are empty, as {path}, of which {file} says 0 samples"
        if len(empty) == len(self.paths):
            raise DataError(f"{message}; all downloads may have failed, so download them again")
        logger.warning("%s; they are left out", message)
        left_out = {path for path, _ in empty}
        self.paths = [path for path in self.paths if path not in left_out]

    def _entries(self, shard: int) -> np.ndarray:
        path = self.paths[shard]
        entries, num_dotted, first_dotted = self.index.read(path)
        if len(entries) != self.sizes[shard]:
            remedy = (
                f"remove {self.said_by[shard]}, and shards are counted anew" if self.said_by[shard] else "start anew"
            )
            says = f"{self.said_by[shard]} says" if self.said_by[shard] else "it had"
            if num_dotted:
                remedy = dotted_members(num_dotted, first_dotted)
            raise DataError(f"{path}: holds {len(entries)} samples, but {says} {self.sizes[shard]}; {remedy}")
        if num_dotted and self.said_by[shard] and shard not in self._told:
            self._told.add(shard)
            logger.warning("%s: %s", path, dotted_members(num_dotted, first_dotted))
        return entries

    def _find(self, index: int) -> tuple[str, np.void, str]:
        """(shard, entry, name for messages) of a sample."""
        shard = int(self.ends.searchsorted(index, side="right"))
        number = index - int(self.ends[shard] - self.sizes[shard])
        path, entry = self.paths[shard], self._entries(shard)[number]
        block = next(int(entry[f"{part}_block"]) for part in ("image", "txt", "json", "cls") if entry[f"{part}_block"])
        name = read_name(lambda offset, size: self._bytes(path, offset, size), (block - 1) * BLOCK)
        return path, entry, f"{path}: {name!r}"

    def _read(self, path: str, entry: np.void, part: str) -> bytes:
        return self._bytes(path, int(entry[f"{part}_block"]) * BLOCK, int(entry[f"{part}_size"]))

    def _bytes(self, path: str, offset: int, size: int) -> bytes:
        try:
            content = _read_at(self._file(path), offset, size)
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from None
        if len(content) != size:
            raise DataError(f"{path}: was changed while it was read; start anew")
        return content

    def _file(self, path: str) -> BinaryIO:
        if path not in self._open:
            if len(self._open) >= MAX_OPEN:
                self._open.popitem(last=False)[1].close()
            self._open[path] = open(path, "rb", buffering=0)  # noqa: SIM115 (kept open)
        self._open.move_to_end(path)
        return self._open[path]

    def _caption(self, path: str, entry: np.void, name: str) -> str:
        if self.caption_key is None and entry["txt_block"]:
            caption = self._text(path, entry, "txt", name)
        elif entry["json_block"]:
            caption = _caption_in(self._text(path, entry, "json", name), self.caption_key or CAPTION_KEY, name)
        else:
            raise BadSample(name, "no caption (.txt or .json) beside it")
        return clean_caption(caption, name)

    def _label(self, path: str, entry: np.void, name: str) -> int:
        text = self._text(path, entry, "cls", name).strip() if entry["cls_block"] else None
        if text is None or not re.fullmatch("[0-9]{1,9}", text):
            raise BadSample(name, "no label (.cls) beside it" if text is None else f"label {text[:20]!r} is no number")
        if int(text) >= len(self.classes):
            raise BadSample(name, f"label {text} is none of the {len(self.classes)} classes")
        return int(text)

    def _text(self, path: str, entry: np.void, part: str, name: str) -> str:
        if entry[f"{part}_size"] > MAX_TEXT_BYTES:
            raise BadSample(
                name, f"its .{part} has {entry[f'{part}_size']} bytes, more than the limit of {MAX_TEXT_BYTES}"
            )
        try:
            return self._read(path, entry, part).decode("utf-8-sig")
        except UnicodeDecodeError:
            raise BadSample(name, f"its .{part} is not UTF-8") from None

    def _make_fingerprint(self) -> str:
        facts = Fingerprint()
        facts.add("shards", [self.classes, self.caption_key, self.sizes.tolist()])
        for path in self.paths:
            facts.add_file(os.path.basename(path), path)
        return facts.hexdigest()


def find_shards(path: str) -> list[str]:
    """The shards that a setting names, sorted within each of its parts.

    Args:
        path: a .tar file, a folder of them, a glob ("data/*.tar") or a brace pattern ("data/{00000..00099}.tar",
            "data/{a,b}.tar"), or several of these with "::" between them.

    Raises:
        DataError: a part is empty, names no shard, or a file that is not there; or a shard is named twice, be it by
            another path.
    """
    shown = printable(path)
    if "\0" in path:
        raise DataError(f"path {shown}: no path has a zero byte; check the data source's path")
    names: list[str] = []
    found: dict[str, str] = {}  # by the path that links lead to
    for part in path.split("::"):
        if not part:
            raise DataError(f"path {shown}: has an empty part; name shards on both sides of each ::")
        for name in sorted(_expand(part)):
            same = found.setdefault(os.path.realpath(name), name)
            if len(found) == len(names):
                also = f", also as {printable(same)}" if same != name else ""
                raise DataError(f"path {shown}: names {printable(name)} twice{also}; each sample must come once")
            names.append(name)
    return names


def _expand(part: str) -> Iterator[str]:
    if os.path.isdir(part):
        names = glob.glob(os.path.join(glob.escape(part), "*.tar"))
        if not names:
            raise DataError(f"{printable(part)}: this folder holds no .tar file; check the data source's path")
        yield from names
        return
    for pattern in _braces(part):
        names = glob.glob(pattern) if glob.has_magic(pattern) and not os.path.isfile(pattern) else [pattern]
        if not names:
            raise DataError(f"{printable(pattern)}: no file fits this pattern; check the data source's path")
        for name in names:
            if not os.path.isfile(name):
                raise DataError(f"{printable(name)}: no such shard; check the data source's path {printable(part)}")
            if name.lower().endswith((".gz", ".tgz", ".bz2", ".xz", ".zst")):
                raise DataError(
                    f"{printable(name)}: is compressed, and its samples could not be read one by one; unpack it to a "
                    "plain .tar"
                )
        yield from names


def _braces(pattern: str) -> list[str]:
    """`{00..02}` and `{a,b}` written out, as by a shell."""
    patterns, done = [pattern], False
    while not done:
        done, longer = True, []
        for one in patterns:
            match = re.search(r"\{([0-9]{1,12})\.\.([0-9]{1,12})\}|\{([^{}]*,[^{}]*)\}", one)
            if match is None:
                longer.append(one)
                continue
            done = False
            if match[3] is not None:
                words = match[3].split(",")
            else:
                low, high = int(match[1]), int(match[2])
                if low > high:
                    raise DataError(
                        f"path {printable(pattern)}: {match[0]} must run from a smaller number to a larger one"
                    )
                if high - low >= MAX_SHARDS:
                    raise DataError(f"path {printable(pattern)}: {match[0]} stands for more than {MAX_SHARDS} shards")
                width = len(match[1]) if match[1].startswith("0") else 0
                words = (f"{number:0{width}}" for number in range(low, high + 1))
            longer += [one[: match.start()] + word + one[match.end() :] for word in words]
            if len(longer) > MAX_SHARDS:
                raise DataError(f"path {printable(pattern)}: stands for more than {MAX_SHARDS} shards")
        patterns = longer
    return patterns


def _read_sizes(paths: list[str]) -> Iterator[tuple[int, str] | None]:
    """For each shard (its samples, the file that says so), or None where no file does."""
    folders: dict[str, dict[str, Any]] = {}
    for path in paths:
        folder, name = os.path.split(path)
        sizes = os.path.join(folder, "sizes.json")
        if folder not in folders:
            folders[folder] = _read_json(sizes) or {}
        stats = f"{os.path.splitext(path)[0]}_stats.json"
        if name in folders[folder]:
            yield _whole(folders[folder][name], sizes, name), sizes
            continue
        said = _read_json(stats)
        yield (
            None if said is None or "successes" not in said else (_whole(said["successes"], stats, "successes"), stats)
        )


def _read_json(file: str) -> dict[str, Any] | None:
    try:
        content = read_json(file)
    except OSError:
        return None
    except ValueError as error:
        raise DataError(f"{file}: {error}; remove it, and the shards are counted") from None
    if not isinstance(content, dict):
        raise DataError(f"{file}: must be a JSON object; remove it, and the shards are counted")
    return content


def _whole(value: Any, file: str, key: str) -> int:
    if type(value) is not int or not 0 <= value < 2**40:
        raise DataError(
            f"{file}: {key} must be a number of samples, got {value!r}; remove it, and the shards are counted"
        )
    return value


def _caption_in(text: str, key: str, name: str) -> str:
    try:
        content = parse_json(text)
    except ValueError as error:
        raise BadSample(name, f"its .json is {error}") from None
    caption = content.get(key) if isinstance(content, dict) else None
    if not isinstance(caption, str):
        raise BadSample(name, f"its .json has no text {key!r}")
    return caption


def _read_at(file: BinaryIO, offset: int, size: int) -> bytes:
    """Bytes at a place of a file; where the system can, without moving the position that forked workers share."""
    if hasattr(os, "pread"):
        return os.pread(file.fileno(), size, offset)
    file.seek(offset)
    return file.read(size)
