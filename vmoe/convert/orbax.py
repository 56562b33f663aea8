"""Orbax checkpoints: a folder of Zarr arrays, all in one OCDBT store or each in a folder of its own."""

import logging
import math
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vmoe.convert.arrays import CheckpointError, StoredArray, list_names
from vmoe.utils.optional import import_optional
from vmoe.utils.printable import printable

logger = logging.getLogger("vmoe.convert")

# A chunk is decoded in one go, and a hostile one may be much larger than its array, or as small as a number.
MAX_CHUNK_BYTES, MAX_CHUNKS = 4 * 2**30, 2**16
_ERRORS = (ValueError, KeyError, IndexError, OSError, RuntimeError, NotImplementedError)  # tensorstore's
_MARKS = ("manifest.ocdbt", "_METADATA", "checkpoint")
_STEP = re.compile(r"((?!.*orbax-checkpoint-tmp).*?)([0-9]+)")  # not what Orbax is still writing


def find_orbax(folder: Path, step: int | None = None) -> Path | None:
    """The folder of the arrays: `folder` itself, or inside a checkpoint manager's numbered folders; None if none.

    Of folders such as "10" or "checkpoint_10" that of `step`, else the newest with arrays is taken; newer ones without,
    of a save that never ended, are named in a warning. A CheckpointError if there are several to choose from.
    """
    if step is None and _is_marked(folder):
        return folder
    steps = {path.name: match for path in folder.glob("*") if path.is_dir() and (match := _STEP.fullmatch(path.name))}
    names = [name for name, match in steps.items() if step in (None, int(match[2]))]
    names.sort(key=lambda name: int(steps[name][2]))
    if not names:
        return _arrays_in(folder) if step is None else None
    complete = [name for name in names if _arrays_in(folder / name)]
    if not complete:
        raise CheckpointError(
            f"{folder} holds no arrays in {list_names(names)}, saves that never ended: give another folder or step"
        )
    if len({steps[name][1] for name in complete}) > 1:
        raise CheckpointError(f"{folder} holds several checkpoints, {list_names(complete)}: give the path of one")
    if newer := names[names.index(complete[-1]) + 1 :]:
        logger.warning("%s holds no arrays in %s: %s is read", folder, list_names(newer), complete[-1])
    return _arrays_in(folder / complete[-1])


def _is_marked(folder: Path) -> bool:
    return any((folder / mark).is_file() for mark in _MARKS)


def _arrays_in(folder: Path) -> Path | None:
    if _is_marked(folder):
        return folder
    inside = sorted(path for path in folder.glob("*") if _is_marked(path))
    if len(inside) > 1:
        names = list_names([path.name for path in inside])
        raise CheckpointError(f"{folder} holds several checkpoints, {names}: give the path of one")
    return inside[0] if inside else None


def _stored(store: Any, source: str) -> StoredArray:
    """An array that tensorstore reads, chunk by chunk, since less than one would only be decoded again."""
    shape, chunk = tuple(store.shape), store.chunk_layout.read_chunk.shape or ()
    itemsize = store.dtype.numpy_dtype.itemsize
    nbytes, grid = math.prod(shape) * itemsize, tuple(-(-size // step) for size, step in zip(shape, chunk))
    bound = 2 ** len(chunk) * max(1, nbytes)  # the last chunk of an axis may go beyond the array
    if math.prod(chunk) * itemsize > min(bound, MAX_CHUNK_BYTES) or math.prod(grid) > MAX_CHUNKS:
        raise CheckpointError(f"{source}, {shape}, is cut into chunks of {chunk}, which is not sensible")

    def read(where: tuple[slice, ...]) -> np.ndarray:
        try:
            return np.asarray(store[where].read().result())
        except _ERRORS as error:
            raise CheckpointError(f"{source} is damaged: {printable(error)[:300]}") from error

    parts = []
    for corner in np.ndindex(*grid):
        sides = zip(corner, chunk, shape)
        where = tuple(slice(index * step, min((index + 1) * step, size)) for index, step, size in sides)
        parts.append((where, partial(read, where)))
    return StoredArray(shape, store.dtype.name, nbytes, parts)


def open_orbax(folder: str | Path) -> dict[str, StoredArray]:
    """The arrays of an Orbax checkpoint by name, "params/Encoder/encoder_norm/scale"."""
    ts = import_optional("tensorstore", "convert", "Orbax checkpoints need")
    folder = Path(folder).resolve()
    plain = {"driver": "file", "path": f"{folder}/"}
    base = {"driver": "ocdbt", "base": plain} if (folder / "manifest.ocdbt").is_file() else plain
    try:
        keys = {key.decode() for key in ts.KvStore.open(base).result().list().result()}
    except _ERRORS as error:
        raise CheckpointError(f"{folder} is not a readable Orbax checkpoint: {printable(error)[:300]}") from error
    formats = {"/.zarray": "zarr", "/zarr.json": "zarr3"}
    drivers = {key.removesuffix(end): driver for key in keys for end, driver in formats.items() if key.endswith(end)}
    arrays = {}
    for key, driver in sorted(drivers.items()):
        name = key.replace(".", "/")
        inner = {**base, "path": f"{base['path']}{key}/" if base is plain else key}
        try:
            store = ts.open({"driver": driver, "kvstore": inner}, open=True, read=True).result()
        except _ERRORS as error:
            raise CheckpointError(f"{name} in {folder} cannot be opened: {printable(error)[:300]}") from error
        arrays[name] = _stored(store, f"{name} in {folder}")
        # A chunk's file that is not there would be read as zeros. (In OCDBT a lost file is an error by itself.)
        wanted, own = len(arrays[name].parts), sum(other.startswith(f"{key}/") for other in keys) - 1
        if base is plain and own < wanted:
            raise CheckpointError(f"{name} in {folder} has lost {wanted - own} of its {wanted} chunks")
    return arrays
