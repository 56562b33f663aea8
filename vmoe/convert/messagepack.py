"""MessagePack files of flax and of the reference, read in place: arrays become positions in the file.

The msgpack library would hold the largest array in memory twice, and cannot say which tensor is damaged. Here only the
frame is decoded; the numbers stay on disk until they are asked for.
Format: https://github.com/msgpack/msgpack/blob/master/spec.md; extension types: flax's arrays and scalars (1, 3), the
reference's slices (6) and entries of an index (8).
"""

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from vmoe.convert.arrays import CheckpointError, Slices

# More than any real checkpoint has; a hostile file of a few bytes must not fill the memory.
MAX_DEPTH, MAX_ITEMS, MAX_STRING = 64, 2**19, 2**16
MAX_AXES, MAX_SIZE = 8, 2**48

_CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}
_NUMBERS = {0xCA: ">f", 0xCB: ">d"} | {tag: ">" + code for tag, code in enumerate("BHIQbhiq", 0xCC)}
_SIZED = {  # the object, and how its size is stored behind the tag
    **{tag: ("binary", code) for tag, code in enumerate((">B", ">H", ">I"), 0xC4)},
    **{tag: ("extension", code) for tag, code in enumerate((">B", ">H", ">I"), 0xC7)},
    **{tag: ("string", code) for tag, code in enumerate((">B", ">H", ">I"), 0xD9)},
    **{tag: ("list", code) for tag, code in enumerate((">H", ">I"), 0xDC)},
    **{tag: ("map", code) for tag, code in enumerate((">H", ">I"), 0xDE)},
}
_DTYPES = {
    "bool": np.dtype(np.bool_),
    "bfloat16": np.dtype(np.uint16),
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
        """The numbers start..stop of the flattened piece; bfloat16 as float32."""
        kind = _DTYPES[self.dtype]
        with open(self.file, "rb") as opened:
            opened.seek(self.offset + start * kind.itemsize)
            numbers = np.fromfile(opened, kind, stop - start)
        if len(numbers) != stop - start:
            raise CheckpointError(f"{self.file} was cut short while it was read")
        if self.dtype == "bfloat16":  # the upper half of a float32
            return (numbers.astype(np.uint32) << 16).view(np.float32)
        return numbers


@dataclass(frozen=True)
class IndexEntry:
    """What the reference's index says of one array: the slices of its chunks, and the shard that holds each."""

    shape: tuple[int, ...]
    dtype: str
    slices: list[Slices]
    shards: list[int]


def itemsize(dtype: str) -> int:
    """Bytes of one number."""
    return _DTYPES[dtype].itemsize


def sizes(numbers) -> tuple[int, ...]:
    """Sizes of an array, which a hostile file may give in any number and of any kind; else a ValueError."""
    numbers = tuple(numbers)
    if len(numbers) > MAX_AXES or not all(type(number) is int and 0 <= number <= MAX_SIZE for number in numbers):
        raise ValueError("not the sizes of an array")
    return numbers


class Reader:
    """Decodes one MessagePack file.

    Dictionaries, lists, strings and numbers become Python's own; binary data an `Extent`; arrays a `Piece`; slices a
    tuple of Python's `slice`; an entry of the reference's index an `IndexEntry`.

    Args:
        file: to read.
        names: of the outermost keys, for errors.

    Raises:
        CheckpointError: for anything that is not as it should be; names the file, the byte and the tensor.
    """

    def __init__(self, file: Path, names: dict[str, str] | None = None) -> None:
        self.file = file
        self.names = names or {}
        self.keys: list[str] = []  # that lead to what is being read
        self._items = 0
        self._opened: BinaryIO

    def read(self):
        """The one object that the file holds."""
        try:
            self._end = self.file.stat().st_size
            with open(self.file, "rb") as self._opened:
                value = self._value(0)
                if self._opened.tell() != self._end:
                    raise self._error(f"has {self._end - self._opened.tell()} bytes too many at its end")
                return value
        except OSError as error:
            raise CheckpointError(f"{self.file} cannot be read: {error.strerror or error}") from error

    def _error(self, what: str) -> CheckpointError:
        path = "/".join(self.keys)
        return CheckpointError(f"{self.file} {what}" + (f" (in {path})" if path else ""))

    def _take(self, size: int) -> bytes:
        if size > self._end - self._opened.tell():
            raise self._error(f"is truncated or damaged at byte {self._opened.tell()}")
        return self._opened.read(size)

    def _number(self, code: str) -> int | float:
        return struct.unpack(code, self._take(struct.calcsize(code)))[0]

    def _value(self, depth: int) -> Any:
        self._items += 1
        if depth > MAX_DEPTH or self._items > MAX_ITEMS:
            raise self._error(f"nests deeper than {MAX_DEPTH} or holds more than {MAX_ITEMS} objects")
        tag = self._take(1)[0]
        if tag < 0x80:
            return tag
        if tag < 0x90:
            return self._map(tag & 0x0F, depth)
        if tag < 0xA0:
            return self._list(tag & 0x0F, depth)
        if tag < 0xC0:
            return self._string(tag & 0x1F, depth)
        if tag >= 0xE0:
            return tag - 0x100
        if tag in _CONSTANTS:
            return _CONSTANTS[tag]
        if tag in _NUMBERS:
            return self._number(_NUMBERS[tag])
        if 0xD4 <= tag <= 0xD8:
            return self._extension(1 << (tag - 0xD4), depth)
        if tag not in _SIZED:
            raise self._error(f"is not MessagePack: byte {self._opened.tell() - 1} is 0x{tag:02x}")
        kind, code = _SIZED[tag]
        return getattr(self, f"_{kind}")(self._number(code), depth)

    def _list(self, count: int, depth: int) -> list:
        return [self._value(depth + 1) for _ in range(count)]

    def _map(self, count: int, depth: int) -> dict[str, Any]:
        result = {}
        for _ in range(count):
            key = self._value(depth + 1)
            if not isinstance(key, (str, int)):
                raise self._error(f"has a key that is neither text nor a number before byte {self._opened.tell()}")
            self.keys.append(self.names.get(str(key), str(key)) if depth == 0 else str(key))
            result[str(key)] = self._value(depth + 1)
            self.keys.pop()
        return result

    def _string(self, size: int, depth: int) -> str:
        if size > MAX_STRING:
            raise self._error(f"holds a string of {size} bytes at byte {self._opened.tell()}")
        try:
            return self._take(size).decode()
        except UnicodeDecodeError as error:
            raise self._error(f"holds a string that is not text at byte {self._opened.tell() - size}") from error

    def _binary(self, size: int, depth: int) -> Extent:
        offset = self._opened.tell()
        if offset + size > self._end:
            raise self._error(f"is truncated: {size} bytes from byte {offset} on go past its end, {self._end}")
        self._opened.seek(size, 1)
        return Extent(offset, size)

    def _extension(self, size: int, depth: int) -> Piece | Slices | IndexEntry:
        code = self._number(">b")
        extent = self._binary(size, depth)
        readers = {1: self._array, 3: self._array, 6: self._slices, 8: self._index_entry}
        if code not in readers:
            raise self._error(f"has an extension type that is not known, {code}, at byte {extent.offset}")
        try:
            return readers[code](self._inside(extent, depth), depth)
        except CheckpointError:
            raise
        except (TypeError, ValueError, AttributeError) as error:
            raise self._error(
                f"has an object of extension type {code} that is damaged, at byte {extent.offset}"
            ) from error

    def _inside(self, extent: Extent, depth: int) -> Any:
        """The object that some bytes of the file hold."""
        resume, end = self._opened.tell(), self._end
        self._opened.seek(extent.offset)
        self._end = extent.offset + extent.size
        value = self._value(depth + 1)
        self._opened.seek(resume)
        self._end = end
        return value

    def _array(self, value, depth: int) -> Piece:
        shape, dtype, data = value
        shape, dtype = sizes(shape), self._dtype(dtype)
        if data.size != math.prod(shape) * itemsize(dtype):
            raise self._error(f"has an array of shape {shape} and type {dtype} in {data.size} bytes")
        return Piece(self.file, data.offset, shape, dtype)

    def _dtype(self, name) -> str:
        if name not in _DTYPES:
            raise self._error(f"has an array of type {name!r}, which this reader does not know")
        return name

    def _slices(self, value, depth: int) -> Slices:
        slices = []
        for start, stop, step in (self._inside(part, depth) for part in value):
            if step not in (None, 1):
                raise ValueError("a step")
            slices.append(slice(*sizes((start or 0, stop))))
        return tuple(slices)

    def _index_entry(self, value, depth: int) -> IndexEntry:
        header, chunks, shards = value
        shape, dtype, *_ = self._inside(header, depth)
        slices = [self._slices(self._inside(chunk, depth), depth) for chunk in chunks]
        return IndexEntry(sizes(shape), self._dtype(dtype), slices, [sizes([shard])[0] for shard in shards])
