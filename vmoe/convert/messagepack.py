"""MessagePack, read in place: arrays become addresses in the file, everything else Python values.

The msgpack library holds an object in memory several times while it unpacks it, and a chunk of a checkpoint may be a
gibibyte. Here only the frame is decoded; numbers stay on disk until somebody asks for them.
Format: https://github.com/msgpack/msgpack/blob/master/spec.md; the extension types are flax's (1-3) and the
reference's (4-6 and 8; 7, an array of slices, is not read).
"""

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from vmoe.convert.arrays import CheckpointError, Slices, row_slices

# More than any real checkpoint has; a hostile file of a few bytes must not fill the memory.
MAX_DEPTH, MAX_ITEMS, MAX_STRING = 64, 2**19, 2**16
MAX_AXES, MAX_SIZE = 8, 2**48

_NUMBERS = {
    0xCA: ">f",
    0xCB: ">d",
    **{0xCC + i: ">" + code for i, code in enumerate("BHIQ")},
    **{0xD0 + i: ">" + code for i, code in enumerate("bhiq")},
}
_SIZES = {0xC4: ">B", 0xC5: ">H", 0xC6: ">I"}  # binary; strings and extensions follow the same pattern
_DTYPES = {
    "bool": np.bool_,
    "bfloat16": np.uint16,
    **{name: np.dtype(name) for name in ("float16", "float32", "float64", "complex64", "complex128")},
    **{f"{sign}int{bits}": np.dtype(f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64)},
}


@dataclass(frozen=True)
class Extent:
    """Bytes of a file."""

    offset: int
    size: int


@dataclass(frozen=True)
class Piece:
    """Numbers of one type that lie together in a file, in C order."""

    file: Path
    offset: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def read(self, start: int, stop: int) -> np.ndarray:
        """The numbers start..stop of the flattened piece."""
        kind = np.dtype(_DTYPES[self.dtype])
        with open(self.file, "rb") as opened:
            opened.seek(self.offset + start * kind.itemsize)
            numbers = np.fromfile(opened, kind, stop - start)
        if len(numbers) != stop - start:
            raise CheckpointError(f"{self.file} was cut short while it was read")
        return as_float32(numbers) if self.dtype == "bfloat16" else numbers


def as_float32(bits: np.ndarray) -> np.ndarray:
    """bfloat16 numbers, given as 16-bit integers: the upper half of a float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


class ArrayInFiles:
    """A `StoredArray` made of chunks, each a part of the array given by slices, whose numbers lie in pieces.

    Args:
        shape: of the whole array.
        dtype: name of its type.
        chunks: [(where, pieces)]; the caller has checked that they cover the array.
    """

    def __init__(self, shape: tuple[int, ...], dtype: str, chunks: list[tuple[Slices, list[Piece]]]) -> None:
        self.shape, self.dtype, self.chunks = shape, dtype, chunks
        self.nbytes = math.prod(shape) * itemsize(dtype)

    def pieces(self) -> Iterator[tuple[Slices, np.ndarray]]:
        for where, pieces in self.chunks:
            shape = tuple(part.stop - part.start for part in where)
            done = 0
            for inner in row_slices(shape, max(4, itemsize(self.dtype))):
                part = tuple(piece.stop - piece.start for piece in inner)
                count = math.prod(part)
                numbers = _read_run(pieces, done, done + count).reshape(part)
                done += count
                shifted = (slice(w.start + i.start, w.start + i.stop) for w, i in zip(where, inner, strict=True))
                yield tuple(shifted), numbers


def _read_run(pieces: list[Piece], start: int, stop: int) -> np.ndarray:
    """Numbers start..stop of several pieces laid end to end."""
    found, offset = [], 0
    for piece in pieces:
        low, high = max(start, offset), min(stop, offset + piece.size)
        if low < high:
            found.append(piece.read(low - offset, high - offset))
        offset += piece.size
    return found[0] if len(found) == 1 else np.concatenate(found)


def itemsize(dtype: str) -> int:
    """Bytes of one number."""
    return np.dtype(_DTYPES[dtype]).itemsize


class Reader:
    """Decodes one MessagePack file.

    Dictionaries, lists, strings and numbers become Python's own; binary data an `Extent`; arrays a `Piece`; slices
    Python's `slice`; an entry of the reference's index (shape, dtype name, [slices], [shard number]).

    Raises:
        CheckpointError: with the file, the byte, and `where` it is, for anything that is not as it should be.
    """

    def __init__(self, file: Path, names: dict[str, str] | None = None) -> None:
        self.file = file
        self.names = names or {}  # of the outermost keys, for errors
        self.where: list[str] = []  # the keys on the way to what is being read
        self._items = 0
        self._opened: BinaryIO

    def read(self):
        """The one object that the file holds."""
        try:
            size = self.file.stat().st_size
            with open(self.file, "rb") as self._opened:
                self._end = size
                value = self._value(0)
                if self._opened.tell() != size:
                    raise self._error(f"has {size - self._opened.tell()} bytes too many at its end")
                return value
        except OSError as error:
            raise CheckpointError(f"{self.file} cannot be read: {error.strerror or error}") from error

    def _error(self, what: str) -> CheckpointError:
        path = "/".join(self.where)
        return CheckpointError(f"{self.file} {what}" + (f" (in {path})" if path else ""))

    def _take(self, size: int) -> bytes:
        if size > self._end - self._opened.tell():
            raise self._error(f"is truncated or damaged at byte {self._opened.tell()}")
        return self._opened.read(size)

    def _unpack(self, code: str) -> int | float:
        return struct.unpack(code, self._take(struct.calcsize(code)))[0]

    def _skip(self, size: int) -> Extent:
        extent = Extent(self._opened.tell(), size)
        if extent.offset + size > self._end:
            raise self._error(f"is truncated: {size} bytes from byte {extent.offset} on go past its end, {self._end}")
        self._opened.seek(size, 1)
        return extent

    def _value(self, depth: int):
        self._items += 1
        if depth > MAX_DEPTH or self._items > MAX_ITEMS:
            raise self._error(f"nests deeper than {MAX_DEPTH} or holds more than {MAX_ITEMS} objects")
        tag = self._take(1)[0]
        if tag < 0x80:
            return tag
        if tag >= 0xE0:
            return tag - 0x100
        if tag < 0x90 or tag in (0xDE, 0xDF):
            return self._map(tag & 0x0F if tag < 0x90 else self._unpack(">H" if tag == 0xDE else ">I"), depth)
        if tag < 0xA0 or tag in (0xDC, 0xDD):
            return self._list(tag & 0x0F if tag < 0xA0 else self._unpack(">H" if tag == 0xDC else ">I"), depth)
        if tag < 0xC0 or 0xD9 <= tag <= 0xDB:
            return self._string(tag & 0x1F if tag < 0xC0 else self._unpack((">B", ">H", ">I")[tag - 0xD9]))
        if tag in (0xC0, 0xC2, 0xC3):
            return {0xC0: None, 0xC2: False, 0xC3: True}[tag]
        if tag in _NUMBERS:
            return self._unpack(_NUMBERS[tag])
        if tag in _SIZES:
            return self._skip(self._unpack(_SIZES[tag]))
        if 0xD4 <= tag <= 0xD8 or 0xC7 <= tag <= 0xC9:
            size = 1 << (tag - 0xD4) if tag >= 0xD4 else self._unpack((">B", ">H", ">I")[tag - 0xC7])
            code = self._unpack(">b")
            return self._extension(code, self._skip(size), depth)
        raise self._error(f"is not MessagePack: byte {self._opened.tell() - 1} is 0x{tag:02x}")

    def _string(self, size: int) -> str:
        if size > MAX_STRING:
            raise self._error(f"holds a string of {size} bytes at byte {self._opened.tell()}")
        try:
            return self._take(size).decode()
        except UnicodeDecodeError as error:
            raise self._error(f"holds a string that is not text at byte {self._opened.tell() - size}") from error

    def _list(self, count: int, depth: int) -> list:
        return [self._value(depth + 1) for _ in range(count)]

    def _map(self, count: int, depth: int) -> dict:
        result = {}
        for _ in range(count):
            key = self._value(depth + 1)
            if not isinstance(key, (str, int)):
                raise self._error(f"has a key that is neither text nor a number before byte {self._opened.tell()}")
            self.where.append(self.names.get(str(key), str(key)) if depth == 0 else str(key))
            result[str(key)] = self._value(depth + 1)
            self.where.pop()
        return result

    def _inside(self, extent: Extent, depth: int):
        """The object that some bytes of the file hold."""
        resume, end = self._opened.tell(), self._end
        self._opened.seek(extent.offset)
        self._end = extent.offset + extent.size
        value = self._value(depth + 1)
        self._opened.seek(resume)
        self._end = end
        return value

    def _extension(self, code: int, extent: Extent, depth: int):
        readers = {1: self._array, 2: self._complex, 3: self._array}
        readers |= {4: self._shape, 5: self._slice, 6: self._slices, 8: self._index_entry}
        if code not in readers:
            raise self._error(f"has an extension type that is not known, {code}, at byte {extent.offset}")
        try:
            return readers[code](self._inside(extent, depth), depth)
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise self._error(
                f"has an object of extension type {code} that is damaged, at byte {extent.offset}"
            ) from error

    def _array(self, value, depth: int) -> Piece:
        shape, dtype, data = value
        shape, dtype = sizes(shape), self._dtype(dtype)
        if data.size != math.prod(shape) * itemsize(dtype):
            raise self._error(f"has an array of shape {shape} and type {dtype} in {data.size} bytes")
        return Piece(self.file, data.offset, shape, dtype)

    def _shape(self, value, depth: int) -> tuple[tuple[int, ...], str]:
        shape, dtype, *_ = value
        return sizes(shape), self._dtype(dtype)

    def _dtype(self, name) -> str:
        if isinstance(name, Extent):
            name = self._text(name)
        if name not in _DTYPES:
            raise self._error(f"has an array of type {name!r}, which this reader does not know")
        return name

    def _text(self, extent: Extent) -> str:
        resume = self._opened.tell()
        self._opened.seek(extent.offset)
        text = self._opened.read(min(extent.size, 64)).decode()
        self._opened.seek(resume)
        return text

    @staticmethod
    def _complex(value, depth: int) -> complex:
        return complex(*value)

    @staticmethod
    def _slice(value, depth: int) -> slice:
        start, stop, step = value
        if step not in (None, 1):
            raise ValueError("a step")
        start, stop = sizes((start or 0, stop))
        return slice(start, stop)

    def _slices(self, value, depth: int) -> Slices:
        return tuple(self._slice(self._inside(part, depth), depth) for part in value)

    def _index_entry(self, value, depth: int):
        shape, parts, shards = value
        whole, dtype = self._shape(self._inside(shape, depth), depth)
        slices = [self._slices(self._inside(part, depth), depth) for part in parts]
        return IndexEntry(whole, dtype, slices, list(_counts(shards)))


@dataclass(frozen=True)
class IndexEntry:
    """What the reference's index says of one array: the slices of its chunks, and the shard that holds each."""

    shape: tuple[int, ...]
    dtype: str
    slices: list[Slices]
    shards: list[int]


def _counts(numbers) -> tuple[int, ...]:
    numbers = tuple(numbers)
    if not all(isinstance(number, int) and not isinstance(number, bool) and number >= 0 for number in numbers):
        raise ValueError("not sizes")
    return numbers


def sizes(numbers) -> tuple[int, ...]:
    """Sizes of an array, which a hostile file may give in any number and of any kind; else a ValueError."""
    numbers = _counts(numbers)
    if len(numbers) > MAX_AXES or any(number > MAX_SIZE for number in numbers):
        raise ValueError("not the sizes of an array")
    return numbers
