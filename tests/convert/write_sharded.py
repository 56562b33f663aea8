"""Write checkpoints in the reference's sharded format, for tests and for the memory benchmark.

Independent of the reader: the frame is the msgpack library's.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import msgpack
import numpy as np

MAGIC = "__msgpack_array_chunk_a87ca2__"


def pack_array(array: np.ndarray, dtype: str | None = None) -> msgpack.ExtType:
    """flax's extension type 1."""
    return msgpack.ExtType(1, msgpack.packb((array.shape, dtype or array.dtype.name, array.tobytes())))


def _slices(where) -> bytes:
    return msgpack.packb([msgpack.packb((start, stop, None)) for start, stop in where])


def chunks_of(shape: tuple[int, ...], rows: int | None) -> Iterator[list[tuple[int, int]]]:
    """Chunks of `rows` rows of the first axis."""
    if not shape:
        yield []
        return
    for start in range(0, shape[0], rows or max(1, shape[0])):
        yield [(start, min(start + (rows or shape[0]), shape[0])), *((0, size) for size in shape[1:])]


def write_sharded(
    prefix: Path,
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str, tuple], np.ndarray],
    num_shards: int = 3,
    rows: int | None = None,
    numbers_per_piece: int | None = None,
    dtype: str = "float32",
    version: str | None = "20220622",
) -> None:
    """Write one checkpoint, a chunk at a time.

    Args:
        prefix: of the files.
        shapes: {"a/b": shape} of all arrays.
        read: (name, slices) -> the numbers there; 16-bit integers for dtype="bfloat16".
        num_shards: chunks go round them.
        rows: rows of the first axis in a chunk; None: an array is one chunk.
        numbers_per_piece: a chunk is stored in pieces of this many numbers; None: whole.
        dtype: the name that is written.
        version: of the index; None: from before it had one.
    """
    leaves = sorted(shapes, key=lambda name: name.split("/"))
    tree: dict = {}
    shards: list[dict[int, list]] = [{} for _ in range(num_shards)]
    turn = 0
    for number, name in enumerate(leaves):
        chunks, homes = list(chunks_of(shapes[name], rows)), []
        for where in chunks:
            shards[turn % num_shards].setdefault(number, []).append(where)
            homes.append(turn % num_shards)
            turn += 1
        shape = msgpack.packb((shapes[name], dtype, False, {}))
        entry = msgpack.ExtType(8, msgpack.packb((shape, [_slices(where) for where in chunks], homes)))
        *folders, leaf = name.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[leaf] = entry
    index = {"shard_count": num_shards, "index": tree} | ({} if version is None else {"version": version})
    Path(f"{prefix}.index").write_bytes(msgpack.packb(index))
    packer = msgpack.Packer()
    for number, content in enumerate(shards):
        with open(f"{prefix}.data-{number:05d}-of-{num_shards:05d}", "wb") as file:
            file.write(packer.pack_map_header(1 + len(content)) + packer.pack(MAGIC) + packer.pack(True))
            for leaf, chunks in content.items():
                file.write(packer.pack(str(leaf)) + packer.pack_array_header(len(chunks)))
                for where in chunks:
                    numbers = read(leaves[leaf], tuple(slice(*pair) for pair in where)).ravel()
                    step = numbers_per_piece or max(1, numbers.size)
                    pieces = [numbers[i : i + step] for i in range(0, numbers.size, step)]
                    file.write(packer.pack_array_header(2) + packer.pack_array_header(len(pieces)))
                    for piece in pieces:
                        file.write(packer.pack(pack_array(piece, dtype)))
                    file.write(packer.pack(msgpack.ExtType(6, _slices(where))))


def write_arrays(prefix: Path, arrays: Mapping[str, np.ndarray], **kwargs) -> None:
    """`write_sharded` of arrays in memory."""
    shapes = {name: array.shape for name, array in arrays.items()}
    write_sharded(prefix, shapes, lambda name, where: arrays[name][where], **kwargs)
