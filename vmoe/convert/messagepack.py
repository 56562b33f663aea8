"""The reference's MessagePack files: what lies where in them; numbers are read when they are asked for."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch

from vmoe.convert.arrays import CheckpointError
from vmoe.utils.optional import import_optional
from vmoe.utils.printable import printable

msgpack = import_optional("msgpack", "convert", "MessagePack files need")

# More than any real checkpoint has; a hostile file of a few bytes must not fill the memory.
MAX_ITEMS, MAX_CHUNKS, MAX_STRING, MAX_NAME = 2**18, 2**17, 2**16, 500
MAX_AXES, MAX_SIZE = 8, 2**48
HEADER = 2**8  # bytes that hold all of an array but its numbers

_DTYPES = {name: np.dtype(name) for name in ("float16", "float32", "float64", "complex64", "complex128", "bool")}
_DTYPES |= {f"{sign}int{bits}": np.dtype(f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64)}
_DTYPES["bfloat16"] = np.dtype(np.uint16)

Shape = tuple[int, ...]
Box = tuple[Shape, Shape]  # of a chunk in its array: the first corner, and the corner behind the last


class Piece(NamedTuple):
    """Numbers of one type that lie together in a file, in C order, from byte `offset` on."""

    shape: Shape
    dtype: str
    file: Path = Path()
    offset: int = 0

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * itemsize(self.dtype)


class IndexEntry(NamedTuple):
    """What the index says of one array; `shards` are the numbers of those that hold its chunks."""

    shape: Shape
    dtype: str
    shards: list[Any]


def itemsize(dtype: str) -> int:
    """Bytes of one number; a ValueError for a type that is not known."""
    if dtype not in _DTYPES:
        raise ValueError(f"an array has the type {dtype!r}, which is not known")
    return _DTYPES[dtype].itemsize


def sizes(numbers) -> Shape:
    """Sizes of an array; a ValueError for what a hostile file may give instead."""
    numbers = tuple(numbers)
    if len(numbers) > MAX_AXES or not all(type(number) is int and 0 <= number <= MAX_SIZE for number in numbers):
        raise ValueError("an array or chunk has sizes that are none")
    return numbers


def read_numbers(pieces: list[Piece], dtype: str, shape: Shape) -> np.ndarray:
    """An array from the pieces of its numbers, laid end to end; bfloat16 as float32."""
    numbers, start = bytearray(sum(piece.nbytes for piece in pieces)), 0
    for piece in pieces:
        with open(piece.file, "rb") as opened:
            opened.seek(piece.offset)
            if opened.readinto(memoryview(numbers)[start : start + piece.nbytes]) != piece.nbytes:
                raise CheckpointError(f"{piece.file} was cut short while it was read")
        start += piece.nbytes
    array = np.frombuffer(numbers, _DTYPES[dtype]).reshape(shape)
    return torch.from_numpy(array).view(torch.bfloat16).float().numpy() if dtype == "bfloat16" else array


def read_tree(file: Path, names: Mapping[str, str] = MappingProxyType({})) -> dict[str, Any]:
    """All that a file holds but the numbers; a CheckpointError names the file and the tensor.

    Dictionaries and lists; of an array a `Piece`, of the reference's slices a `Box`, of an entry of its index an
    `IndexEntry`. `names` are other names of the keys, for errors.
    """
    reader = None
    try:
        with open(file, "rb") as opened:
            reader = _Reader(file, opened, names)
            tree = reader.tree("")
            if not isinstance(tree, dict):
                raise CheckpointError(f"{file} is damaged: it holds no dictionary of arrays")
            if reader.tell() != file.stat().st_size:
                raise ValueError("there is more behind the end")
            return tree
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}") from error
    except (ValueError, TypeError, AttributeError, RecursionError, msgpack.UnpackException) as error:
        truncated = isinstance(error, msgpack.OutOfData)
        reason = "truncated" if truncated else f"damaged: {printable(error) or type(error).__name__}"
        where = f" (in {printable(reader.name)})" if reader and reader.name else ""
        raise CheckpointError(f"{file} is {reason}{where}") from error


class _Reader:
    """Reads a file object by object, and of arrays only where their numbers lie; `name` is what is read, for errors."""

    def __init__(self, file: Path, opened: BinaryIO, names: Mapping[str, str]) -> None:
        self.file, self.opened, self.names, self.name, self._items = file, opened, names, "", 0
        self._start(0)

    def _start(self, offset: int) -> None:
        self._offset, size = self.opened.seek(offset), self.file.stat().st_size + 1
        limits = {"max_buffer_size": size, "max_str_len": MAX_STRING}
        self.unpacker = msgpack.Unpacker(self.opened, ext_hook=_extension, **limits)

    def tell(self) -> int:
        """Bytes that were read."""
        return self._offset + self.unpacker.tell()

    def tree(self, name: str) -> Any:
        if len(name) > MAX_NAME:
            raise ValueError(f"the name of an array has more than {MAX_NAME} characters")
        self.name, unpacker = name, self.unpacker
        if (count := self._count(unpacker.read_map_header)) is not None:
            keys = map(self._key, range(count))
            return {key: self.tree(self.names.get(key, f"{name}/{key}".lstrip("/"))) for key in keys}
        if (count := self._count(unpacker.read_array_header)) is not None:
            return [self.tree(name) for _ in range(count)]
        value = unpacker.unpack()
        if isinstance(value, Piece):  # its numbers are what was read last
            value = value._replace(file=self.file, offset=self.tell() - value.nbytes)
            if value.nbytes > 2**20:
                self._start(self.tell())  # frees a buffer that is as large as the array, or larger
        return value

    def _key(self, _: int) -> str:
        key = self.unpacker.unpack()
        if type(key) not in (str, int):
            raise ValueError("a key is neither text nor a number")
        return str(key)

    def _count(self, read_header: Callable[[], int]) -> int | None:
        try:
            count = read_header()
        except ValueError:  # it is something else; nothing was read
            return None
        self._items += count
        if self._items > MAX_ITEMS:
            raise CheckpointError(f"{self.file} is damaged: it holds more than {MAX_ITEMS} objects")
        return count


def _extension(code: int, data: bytes) -> Piece | Box | IndexEntry:
    if code in (1, 3):  # flax's arrays and scalars
        return _array(data)
    if code == 6:  # the reference's slices
        return _box(data)
    if code != 8:  # its entries of an index
        raise ValueError(f"its extension type {code} is not known")
    header, _, shards = _unpack(data)
    shape, dtype, *_ = _unpack(header)
    itemsize(dtype)
    return IndexEntry(sizes(shape), dtype, list(shards))


def _array(data: bytes) -> Piece:
    """Looks at shape and type only, since unpacking the numbers would copy them once more."""
    header = msgpack.Unpacker(max_array_len=MAX_AXES)
    header.feed(data[:HEADER])
    if header.read_array_header() != 3:
        raise ValueError("an array is not made of shape, type and numbers")
    piece = Piece(sizes(header.unpack()), header.unpack())
    tag, start = header.tell(), len(data) - piece.nbytes  # a tag and a size of 1, 2 or 4 bytes, then the numbers
    if start - tag not in (2, 3, 5) or int.from_bytes(data[tag + 1 : start]) != piece.nbytes:
        raise ValueError(f"an array of shape {piece.shape} and type {piece.dtype} has other than {piece.nbytes} bytes")
    return piece


def _box(data: bytes) -> Box:
    slices = [_unpack(one) for one in _unpack(data)]
    if any(step not in (None, 1) for _, _, step in slices):
        raise ValueError("a chunk has a step")
    return sizes(start or 0 for start, _, _ in slices), sizes(stop for _, stop, _ in slices)


def _unpack(data: bytes) -> Any:
    return msgpack.unpackb(data, max_array_len=MAX_CHUNKS)
