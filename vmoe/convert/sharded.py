"""The reference's own checkpoints: PREFIX.index and PREFIX.data-i-of-n, or one flax MessagePack file.

The index is a tree of arrays' shapes and chunks, each of which lies in one of the n shards. In a shard the arrays have
numbers, in the order in which JAX walks the tree: by sorted key at every level.
"""

import math
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from vmoe.convert.arrays import CheckpointError, StoredArray, flatten
from vmoe.convert.messagepack import Box, IndexEntry, Piece, Shape, itemsize, read_numbers, read_tree, sizes
from vmoe.models.serialization import covers_once

_CHUNKS = "__msgpack_array_chunk_a87ca2__"
_VERSIONS = (None, "20220622")  # None: from before the format had a version; the same but for that key


def _stored(shape: Shape, dtype: str, chunks: list[tuple[Box, list[Piece]]]) -> StoredArray:
    parts = []
    for (start, stop), pieces in chunks:
        sides = tuple(b - a for a, b in zip(start, stop))
        if math.prod(sides):
            parts.append((tuple(map(slice, start, stop)), partial(read_numbers, pieces, sides)))
    return StoredArray(shape, dtype, math.prod(shape) * itemsize(dtype), parts)


# --- sharded ---------------------------------------------------------------------------------------------------------


def open_sharded(prefix: str | Path) -> dict[str, StoredArray]:
    """The arrays of a sharded checkpoint by name, "Encoder/encoder_norm/scale"; `prefix` is that of its files' names.

    A CheckpointError names the file that is missing or damaged, and the tensor.
    """
    index_file = Path(f"{prefix}.index")
    entries, shard_count = _read_index(index_file)
    chunks: dict[str, list[tuple[Box, list[Piece]]]] = {name: [] for name in entries}
    for shard in sorted({shard for entry in entries.values() for shard in entry.shards}):
        file = Path(f"{prefix}.data-{shard:05d}-of-{shard_count:05d}")
        if not file.is_file():
            needed = next(name for name, entry in entries.items() if shard in entry.shards)
            raise CheckpointError(f"{file} is missing: {index_file.name} says that it holds part of {needed}")
        for name, box, pieces in _read_shard(file, entries):
            chunks[name].append((box, pieces))
    for name, entry in entries.items():
        if not covers_once(entry.shape, [box for box, _ in chunks[name]]):
            counts = f"{len(chunks[name])} of {len(entry.shards)} chunks"
            raise CheckpointError(
                f"the {counts} in the shards of {index_file} do not cover {name}, {entry.shape}, exactly once"
            )
    return {name: _stored(entry.shape, entry.dtype, chunks[name]) for name, entry in entries.items()}


def _read_index(file: Path) -> tuple[dict[str, IndexEntry], int]:
    index = read_tree(file)
    if not isinstance(index.get("index"), dict):
        raise CheckpointError(f"{file} is not the index of a checkpoint: it has no tree named 'index'")
    if index.get("version") not in _VERSIONS:
        raise CheckpointError(f"{file} has version {index['version']!r}; this reader knows {_VERSIONS[1:]}")
    count = index.get("shard_count")
    if not isinstance(count, int) or count < 1:
        raise CheckpointError(f"{file} has a shard_count of {count!r}")
    entries = dict(flatten(index["index"]))
    for name, entry in entries.items():
        if not isinstance(entry, IndexEntry):
            raise CheckpointError(f"{file} describes {name} by {type(entry).__name__}, not by a shape and its chunks")
        if not all(type(shard) is int and 0 <= shard < count for shard in entry.shards):
            raise CheckpointError(f"{file} puts {name} into shards {entry.shards[:8]} of {count}")
    return entries, count


def _read_shard(file: Path, entries: dict[str, IndexEntry]) -> Iterator[tuple[str, Box, list[Piece]]]:
    """(array name, chunk, pieces) of every chunk of a shard."""
    names = {str(number): name for number, name in enumerate(entries)}
    for number, content in read_tree(file, names).items():
        if number == _CHUNKS:
            continue
        if number not in names:
            raise CheckpointError(f"{file} holds array number {number}, of which the index knows nothing")
        try:
            for chunk in content:
                yield names[number], *_chunk(entries[names[number]], chunk)
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{file} is damaged: {error} (in {names[number]})") from error


def _chunk(entry: IndexEntry, chunk: Any) -> tuple[Box, list[Piece]]:
    try:
        pieces, box = chunk
        start, stop = map(sizes, box)
        found, types = sum(math.prod(piece.shape) for piece in pieces), {piece.dtype for piece in pieces}
        wanted = math.prod(b - a for a, b in zip(start, stop, strict=True))
    except (TypeError, ValueError, AttributeError):
        raise ValueError("a chunk is not made of pieces and slices") from None
    if found != wanted or types - {entry.dtype}:
        raise ValueError(
            f"{found} numbers of type {', '.join(sorted(types))} for the chunk at {(start, stop)}, which has "
            f"{wanted} of {entry.dtype}"
        )
    return (start, stop), pieces


def find_sharded(prefix: str | Path, step: int | None = None) -> str | None:
    """The prefix itself or, of a training run, that of the last step or of `step`; a folder may stand for it."""
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


def open_flax(file: str | Path) -> dict[str, StoredArray]:
    """The arrays of one file that flax wrote (`flax.serialization.to_bytes`), by name."""
    file = Path(file)
    leaves = flatten(read_tree(file))  # plain numbers and texts among them are no weights
    return {name: _flax_array(file, name, leaf) for name, leaf in leaves if isinstance(leaf, (Piece, dict))}


def _flax_array(file: Path, name: str, leaf: Piece | dict) -> StoredArray:
    if isinstance(leaf, Piece):
        pieces, shape = [leaf], leaf.shape
    else:
        try:
            shape = sizes(leaf["shape"][str(axis)] for axis in range(len(leaf["shape"])))
            pieces = [leaf["chunks"][str(number)] for number in range(len(leaf["chunks"]))]
            found = sum(math.prod(piece.shape) for piece in pieces)
            if found != math.prod(shape) or len({piece.dtype for piece in pieces}) != 1:
                raise ValueError("numbers are missing")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{file} has damaged chunks of {name}, which do not make an array") from error
    return _stored(shape, pieces[0].dtype, [(((0,) * len(shape), shape), pieces)])
