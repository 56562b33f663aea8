"""The reference's own checkpoints: PREFIX.index and PREFIX.data-i-of-n, or one flax MessagePack file.

The index is a tree of arrays' shapes; each array is cut into chunks, each chunk lies in one of the n shards. In a shard
the arrays have numbers, in the order in which JAX walks the tree: by sorted key at every level.
"""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vmoe.convert.arrays import CheckpointError, Slices, row_slices
from vmoe.convert.messagepack import IndexEntry, Piece, Reader, itemsize, sizes

_CHUNKS, _FLAX_CHUNKS = "__msgpack_array_chunk_a87ca2__", "__msgpack_chunked_array__"
# More than any real checkpoint has: a few long keys inside each other would give each of their many leaves a long name.
MAX_NAME, MAX_ARRAYS = 500, 100_000
_VERSIONS = (None, "20220622")  # None: from before the format had a version; the same but for that key


class ArrayInFiles:
    """A `StoredArray` made of chunks, each a part of the array given by slices, whose numbers lie in pieces.

    Args:
        shape: of the array.
        dtype: name of its type.
        chunks: [(slices, pieces)]; the caller has checked that they cover the array.
    """

    def __init__(self, shape: tuple[int, ...], dtype: str, chunks: list[tuple[Slices, list[Piece]]]) -> None:
        self.shape, self.dtype, self.chunks = shape, dtype, chunks
        self.nbytes = math.prod(shape) * itemsize(dtype)

    def pieces(self) -> Iterator[tuple[Slices, np.ndarray]]:
        for where, pieces in self.chunks:
            done = 0
            for inner in row_slices(_shape(where), max(4, itemsize(self.dtype))):
                count = math.prod(_shape(inner))
                numbers = _read_run(pieces, done, done + count).reshape(_shape(inner))
                done += count
                yield tuple(slice(w.start + i.start, w.start + i.stop) for w, i in zip(where, inner)), numbers


def _read_run(pieces: list[Piece], start: int, stop: int) -> np.ndarray:
    """Numbers start..stop of several pieces laid end to end."""
    found, offset = [], 0
    for piece in pieces:
        low, high = max(start, offset), min(stop, offset + piece.size)
        if low < high:
            found.append(piece.read(low - offset, high - offset))
        offset += piece.size
    return found[0] if len(found) == 1 else np.concatenate(found)


def _shape(where: Slices) -> tuple[int, ...]:
    return tuple(part.stop - part.start for part in where)


def _bounds(where: Slices) -> tuple[tuple[int, int], ...]:
    return tuple((part.start, part.stop) for part in where)


# --- sharded ---------------------------------------------------------------------------------------------------------


def open_sharded(prefix: str | Path) -> dict[str, ArrayInFiles]:
    """The arrays of a sharded checkpoint by name, "Encoder/encoder_norm/scale".

    Args:
        prefix: the common beginning of the files' names.

    Raises:
        CheckpointError: for a missing or truncated file, an unknown version or extension type, or chunks that do not
            cover their array; names the file and the tensor.
    """
    index_file = Path(f"{prefix}.index")
    entries, shard_count = _read_index(index_file)
    names = {str(number): name for number, name in enumerate(entries)}
    wanted = {
        (name, shard, _bounds(where))
        for name, entry in entries.items()
        for shard, where in zip(entry.shards, entry.slices)
    }
    chunks: dict[str, list[tuple[Slices, list[Piece]]]] = {name: [] for name in entries}
    for shard in sorted({shard for entry in entries.values() for shard in entry.shards}):
        file = Path(f"{prefix}.data-{shard:05d}-of-{shard_count:05d}")
        if not file.is_file():
            needed = next(name for name, entry in entries.items() if shard in entry.shards)
            raise CheckpointError(f"{file} is missing: {index_file.name} says that it holds part of {needed}")
        for name, where, pieces in _read_shard(file, names):
            if (name, shard, _bounds(where)) in wanted:
                _check_chunk(file, name, entries[name], where, pieces)
                chunks[name].append((where, pieces))
    for name, entry in entries.items():
        _check_cover(index_file, name, entry, [where for where, _ in chunks[name]])
    return {name: ArrayInFiles(entry.shape, entry.dtype, chunks[name]) for name, entry in entries.items()}


def _read_index(file: Path) -> tuple[dict[str, IndexEntry], int]:
    index = Reader(file).read()
    if not isinstance(index, dict) or not isinstance(index.get("index"), dict):
        raise CheckpointError(f"{file} is not the index of a checkpoint: it has no tree named 'index'")
    if index.get("version") not in _VERSIONS:
        raise CheckpointError(f"{file} has version {index['version']!r}; this reader knows {_VERSIONS[1:]}")
    count = index.get("shard_count")
    if not isinstance(count, int) or count < 1:
        raise CheckpointError(f"{file} has a shard_count of {count!r}")
    entries = _flat(file, index["index"])
    for name, entry in entries.items():
        if not isinstance(entry, IndexEntry):
            raise CheckpointError(f"{file} describes {name} by {type(entry).__name__}, not by a shape and its chunks")
        if len(entry.slices) != len(entry.shards) or any(shard >= count for shard in entry.shards):
            raise CheckpointError(f"{file} places {name} in shards {entry.shards[:8]} of {count}")
    return entries, count


def _flat(file: Path, tree: dict, prefix: str = "", flat: dict | None = None) -> dict[str, Any]:
    """{"a/b": leaf} in JAX's order."""
    flat = {} if flat is None else flat
    for key in sorted(tree):
        name, value = f"{prefix}{key}", tree[key]
        if isinstance(value, dict) and _FLAX_CHUNKS not in value:
            _flat(file, value, f"{name}/", flat)
        elif value is not None:
            flat[name] = value
            if len(name) > MAX_NAME or len(flat) > MAX_ARRAYS:
                raise CheckpointError(f"{file} has more than {MAX_ARRAYS} arrays, or names longer than {MAX_NAME}")
    return flat


def _read_shard(file: Path, names: dict[str, str]) -> Iterator[tuple[str, Slices, list[Piece]]]:
    """(array name, slices, pieces) of every chunk of a shard."""
    shard = Reader(file, names).read()
    if not isinstance(shard, dict) or shard.pop(_CHUNKS, None) is None:
        raise CheckpointError(f"{file} is not a shard of a checkpoint: it holds no chunks of arrays")
    for number, chunks in shard.items():
        if number not in names:
            raise CheckpointError(f"{file} holds array number {number}, of which the index knows nothing")
        for chunk in chunks if isinstance(chunks, list) else [None]:
            match chunk:
                case [list(pieces), tuple(where)] if all(isinstance(piece, Piece) for piece in pieces):
                    yield names[number], where, pieces
                case _:
                    raise CheckpointError(f"{file} has a damaged chunk of {names[number]}")


def _check_chunk(file: Path, name: str, entry: IndexEntry, where: Slices, pieces: list[Piece]) -> None:
    inside = len(where) == len(entry.shape) and all(
        part.start <= part.stop <= size for part, size in zip(where, entry.shape)
    )
    if not inside:
        raise CheckpointError(f"{file} has a chunk of {name} at {_bounds(where)}, outside its shape {entry.shape}")
    size, wanted = sum(piece.size for piece in pieces), math.prod(_shape(where))
    if size != wanted:
        raise CheckpointError(
            f"{file} has {size} numbers for the chunk of {name} at {_bounds(where)}, which has {wanted}"
        )
    types = {piece.dtype for piece in pieces} - {entry.dtype}
    if types:
        raise CheckpointError(f"{file} has {name} in {types.pop()}, the index says {entry.dtype}")


def _check_cover(index_file: Path, name: str, entry: IndexEntry, found: list[Slices]) -> None:
    volume, size = sum(math.prod(_shape(where)) for where in found), math.prod(entry.shape)
    overlap = volume > size or (volume == size > 0 and _overlap(found, len(entry.shape)))
    if volume < size or overlap:
        how = "overlap in" if overlap else "do not cover"
        raise CheckpointError(
            f"the chunks in the shards of {index_file} {how} {name}: {volume} of {size} numbers "
            f"in {len(found)} of {len(entry.slices)} chunks"
        )


def _overlap(found: list[Slices], axes: int) -> bool:
    """Do any two chunks share a number? Marks cells between the chunks' edges, of which a grid has one per chunk."""
    edges = [sorted({edge for where in found for edge in _bounds(where)[axis]}) for axis in range(axes)]
    cell_of = [{edge: cell for cell, edge in enumerate(axis)} for axis in edges]
    taken = np.zeros([len(axis) for axis in edges], bool)
    for where in found:
        cells = tuple(slice(at[part.start], at[part.stop]) for at, part in zip(cell_of, where))
        if taken[cells].any():
            return True
        taken[cells] = True
    return False


def find_sharded(prefix: str | Path, step: int | None = None) -> str | None:
    """The prefix itself or, in training, where each step has its own, that of the last step or of `step`.

    A folder stands for the checkpoint in it, if there is one (or one for each step).
    """
    prefix = str(prefix).removesuffix(".index")
    if step is None and Path(f"{prefix}.index").is_file():
        return prefix
    path = Path(prefix)
    folder, stem = (path, r".*?") if path.is_dir() else (path.parent, re.escape(path.name))
    names = [file.name.removesuffix(".index") for file in folder.glob("*.index")]
    if path.is_dir() and len(names) == 1 and step is None:
        return str(folder / names[0])
    found = [(match[1], int(match[2])) for name in names if (match := re.fullmatch(rf"({stem})_(\d+)", name))]
    if len({stem for stem, _ in found}) != 1:
        return None
    stem, last = max(found, key=lambda pair: pair[1])
    step = last if step is None else step
    return str(folder / f"{stem}_{step}") if (stem, step) in found else None


# --- flax ------------------------------------------------------------------------------------------------------------


def open_flax(file: str | Path) -> dict[str, ArrayInFiles]:
    """The arrays of one file that flax wrote (`flax.serialization.to_bytes`), by name.

    Raises:
        CheckpointError: as `open_sharded`.
    """
    file = Path(file)
    if kind := _other_kind(file):
        raise CheckpointError(f"{file} is no MessagePack checkpoint but {kind}, which the converter does not read")
    tree = Reader(file).read()
    if not isinstance(tree, dict):
        raise CheckpointError(f"{file} is not a checkpoint: it holds no dictionary of arrays")
    leaves = _flat(file, tree).items()  # plain numbers and texts are no weights
    return {name: _flax_array(file, name, leaf) for name, leaf in leaves if isinstance(leaf, (Piece, dict))}


def _other_kind(file: Path) -> str | None:
    """What a file is that is often taken for a checkpoint of the reference; None for others."""
    try:
        with open(file, "rb") as opened:
            start = opened.read(9)
    except OSError:  # whoever reads it says so
        return None
    if start.startswith(b"PK"):
        return "a zip archive (.npz or a PyTorch file)"
    if start[8:] == b"{" and int.from_bytes(start[:8], "little") < file.stat().st_size:
        return "a safetensors file"
    return None


def _flax_array(file: Path, name: str, leaf: Piece | dict) -> ArrayInFiles:
    if isinstance(leaf, Piece):
        pieces, shape = [leaf], leaf.shape
    else:
        try:
            shape = sizes(leaf["shape"][str(axis)] for axis in range(len(leaf["shape"])))
            pieces = [leaf["chunks"][str(number)] for number in range(len(leaf["chunks"]))]
            fits = sum(piece.size for piece in pieces) == math.prod(shape)
            types = {piece.dtype for piece in pieces}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{file} has a damaged chunk of {name}") from error
        if not fits or len(types) != 1:
            raise CheckpointError(f"{file} has chunks of {name} that do not cover its shape {shape}")
    return ArrayInFiles(shape, pieces[0].dtype, [(tuple(slice(0, size) for size in shape), pieces)])
