"""The reference's own checkpoints: PREFIX.index and PREFIX.data-i-of-n.

The index is a tree of arrays' shapes and chunks, each of which lies in one of the n shards. In a shard the arrays have
numbers, in the order in which JAX walks the tree: by sorted key at every level.
"""

import math
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from vmoe.convert.arrays import CheckpointError, StoredArray, flatten
from vmoe.convert.messagepack import Box, IndexEntry, itemsize, read_numbers, read_tree, sizes
from vmoe.models.serialization import covers_once

_CHUNKS = "__msgpack_array_chunk_a87ca2__"
_VERSIONS = (None, "20220622")  # None: from before the format had a version; the same except for that key


def open_sharded(prefix: str | Path) -> dict[str, StoredArray]:
    """The arrays of a sharded checkpoint by name, "Encoder/encoder_norm/scale"; `prefix` is that of its files' names.

    A CheckpointError names the file that is missing or damaged, and the tensor.
    """
    index_file = Path(f"{prefix}.index")
    entries, shard_count = _read_index(index_file)
    chunks: dict[str, list[tuple[Box, Callable]]] = {name: [] for name in entries}
    for shard in sorted({shard for entry in entries.values() for shard in entry.shards}):
        file = Path(f"{prefix}.data-{shard:05d}-of-{shard_count:05d}")
        if not file.is_file():
            needed = next(name for name, entry in entries.items() if shard in entry.shards)
            raise CheckpointError(f"{file} is missing: {index_file.name} says that it holds part of {needed}")
        for name, chunk in _read_shard(file, entries):
            chunks[name].append(chunk)
    arrays = {}
    for name, entry in entries.items():
        if not covers_once(entry.shape, [box for box, _ in chunks[name]]):
            counts = f"{len(chunks[name])} of {len(entry.shards)} chunks"
            raise CheckpointError(
                f"the {counts} in the shards of {index_file} do not cover {name}, {entry.shape}, exactly once"
            )
        parts = [(tuple(map(slice, *box)), read) for box, read in chunks[name]]
        nbytes = math.prod(entry.shape) * itemsize(entry.dtype)
        arrays[name] = StoredArray(entry.shape, entry.dtype, nbytes, parts)
    return arrays


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


def _read_shard(file: Path, entries: dict[str, IndexEntry]) -> Iterator[tuple[str, tuple[Box, Callable]]]:
    """(array name, (where it is in the array, function that reads it)) of every chunk of a shard."""
    names = {str(number): name for number, name in enumerate(entries)}
    for number, content in read_tree(file, names).items():
        if number == _CHUNKS:
            continue
        if number not in names:
            raise CheckpointError(f"{file} holds array number {number}, of which the index knows nothing")
        try:
            for chunk in content:
                yield names[number], _chunk(entries[names[number]], chunk)
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{file} is damaged: {error} (in {names[number]})") from error


def _chunk(entry: IndexEntry, chunk: Any) -> tuple[Box, Callable]:
    try:
        pieces, box = chunk
        start, stop = map(sizes, box)
        found, types = sum(math.prod(piece.shape) for piece in pieces), {piece.dtype for piece in pieces}
        sides = tuple(b - a for a, b in zip(start, stop, strict=True))
    except (TypeError, ValueError, AttributeError):
        raise ValueError("a chunk is not made of pieces and slices") from None
    if found != math.prod(sides) or types - {entry.dtype}:
        raise ValueError(
            f"{found} numbers of type {', '.join(sorted(types))} for the chunk at {(start, stop)}, which has "
            f"{math.prod(sides)} of {entry.dtype}"
        )
    return (start, stop), partial(read_numbers, pieces, entry.dtype, sides)


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
    matches = [match for name in names if (match := re.fullmatch(rf"({stem})_(\d+)", name))]
    if len({match[1] for match in matches}) != 1:  # none, or which of several?
        return None
    found = {int(match[2]): match[0] for match in matches}
    name = found.get(max(found) if step is None else step)
    return name and str(folder / name)
