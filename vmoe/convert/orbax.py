"""Orbax checkpoints: a folder in which every array is a Zarr array, all in one OCDBT store or each in its own folder.

Read with tensorstore (`pip install -e '.[convert]'`), without JAX.
"""

import logging
import math
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from vmoe.convert.arrays import CheckpointError, Slices
from vmoe.utils.printable import printable
from vmoe.utils.safe_json import read_json

logger = logging.getLogger("vmoe.convert")

# A chunk is decoded as a whole, and a hostile one may be much larger than its array, or as small as a number.
MAX_METADATA_BYTES, MAX_CHUNK_BYTES, MAX_CHUNKS = 64 * 2**20, 4 * 2**30, 2**20
_ERRORS = (ValueError, KeyError, IndexError, OSError, RuntimeError, NotImplementedError)  # tensorstore's
_MARKS = ("manifest.ocdbt", "_METADATA", "checkpoint")
_STEP = re.compile(r"((?!.*orbax-checkpoint-tmp).*?)([0-9]+)")  # not what Orbax is still writing


def _tensorstore():
    try:
        import tensorstore
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Orbax checkpoints are read with tensorstore: pip install -e '.[convert]' in a checkout", name="tensorstore"
        ) from error
    return tensorstore


def find_orbax(folder: str | Path, step: int | None = None) -> Path | None:
    """The folder of the arrays: `folder` itself, or inside a checkpoint manager's numbered folders; None if none.

    Numbered folders are called "10", "checkpoint_10" and the like. The newest one with arrays is taken; newer ones
    without, of a save that never ended, are named in a warning.

    Args:
        folder: where to look.
        step: the number, instead of the newest.

    Raises:
        CheckpointError: there are several to choose from, or numbered folders without arrays.
    """
    folder = Path(folder)
    if step is None and _is_marked(folder):
        return folder
    steps = [(match[1], int(match[2]), path) for path in folder.glob("*") if (match := _STEP.fullmatch(path.name))]
    steps = sorted((each for each in steps if each[2].is_dir() and step in (None, each[1])), key=lambda each: each[1])
    if not steps:
        return _arrays_in(folder) if step is None else None
    whole = [each for each in steps if _arrays_in(each[2])]
    if not whole:
        raise CheckpointError(
            f"{folder} holds no arrays in {_listed(steps)}, saves that never ended: give another folder or step"
        )
    if len({stem for stem, _, _ in whole}) > 1:
        raise CheckpointError(f"{folder} holds several checkpoints, {_listed(whole)}: give the path of one")
    if newer := steps[steps.index(whole[-1]) + 1 :]:
        logger.warning("%s holds no arrays in %s: %s is read", folder, _listed(newer), whole[-1][2].name)
    return _arrays_in(whole[-1][2])


def _listed(steps: list[tuple[str, int, Path]]) -> str:
    return printable(", ".join(path.name for _, _, path in steps[-5:])) + f" and {len(steps) - 5} more" * (
        len(steps) > 5
    )


def _is_marked(folder: Path) -> bool:
    return any((folder / mark).is_file() for mark in _MARKS)


def _arrays_in(folder: Path) -> Path | None:
    if _is_marked(folder):
        return folder
    inside = sorted(path for path in folder.glob("*") if _is_marked(path))
    if len(inside) > 1:
        names = printable(", ".join(path.name for path in inside[:5]))
        raise CheckpointError(f"{folder} holds several checkpoints, {names}: give the path of one")
    return inside[0] if inside else None


class ZarrArray:
    """A `StoredArray` that tensorstore reads.

    Args:
        store: the open tensorstore.
        source: folder and name, for errors.
    """

    def __init__(self, store, source: str) -> None:
        self.store, self.source = store, source
        self.shape, self.dtype = tuple(store.shape), store.dtype.name
        self.nbytes = math.prod(self.shape) * store.dtype.numpy_dtype.itemsize

    def pieces(self) -> Iterator[tuple[Slices, np.ndarray]]:
        chunk = self.store.chunk_layout.read_chunk.shape or ()
        # A chunk is decoded as a whole, so asking for less than one would only decode it again.
        for outer in _grid(self.shape, chunk):
            try:
                yield outer, np.asarray(self.store[outer].read().result())
            except _ERRORS as error:
                raise CheckpointError(f"{self.source} is damaged: {_short(error)}") from error


def _grid(shape: tuple[int, ...], chunk: tuple[int, ...]) -> Iterator[Slices]:
    if not shape:
        yield ()
        return
    for corner in np.ndindex(*(math.ceil(size / step) for size, step in zip(shape, chunk, strict=True))):
        yield tuple(
            slice(index * step, min((index + 1) * step, size))
            for index, step, size in zip(corner, chunk, shape, strict=True)
        )


def _short(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:300]


def open_orbax(folder: str | Path) -> dict[str, ZarrArray]:
    """The arrays of an Orbax checkpoint by name, "params/Encoder/encoder_norm/scale".

    Raises:
        CheckpointError: for a file that is missing or damaged; names the folder and the tensor.
        ModuleNotFoundError: if tensorstore is not installed; says how to get it.
    """
    ts = _tensorstore()
    folder = Path(folder).resolve()
    plain = {"driver": "file", "path": f"{folder}/"}
    base = {"driver": "ocdbt", "base": plain} if (folder / "manifest.ocdbt").is_file() else plain
    try:
        keys = {key.decode() for key in ts.KvStore.open(base).result().list().result()}
    except _ERRORS as error:
        raise CheckpointError(f"{folder} is not a readable Orbax checkpoint: {_short(error)}") from error
    formats = {"/.zarray": "zarr", "/zarr.json": "zarr3"}
    stored = {key.removesuffix(end): driver for key in keys for end, driver in formats.items() if key.endswith(end)}
    names = _names(folder, stored)
    arrays = {}
    for name, key in names.items():
        if key not in stored:
            raise CheckpointError(f"{folder} has lost {name}: _METADATA names it, the store does not hold it")
        inner = {**base, "path": f"{base['path']}{key}/" if base is plain else key}
        try:
            store = ts.open({"driver": stored[key], "kvstore": inner}, open=True, read=True).result()
        except _ERRORS as error:
            raise CheckpointError(f"{name} in {folder} cannot be opened: {_short(error)}") from error
        arrays[name] = ZarrArray(store, f"{name} in {folder}")
        _check_layout(arrays[name])
        if base is plain:
            _check_chunks(arrays[name], key, keys)
    return arrays


def _names(folder: Path, stored: dict[str, str]) -> dict[str, str]:
    """{name with slashes: key in the store}, in the order of the tree where the folder describes it."""
    file = folder / "_METADATA"
    if not file.is_file():
        return {key.replace(".", "/"): key for key in sorted(stored)}
    try:
        tree = read_json(file, MAX_METADATA_BYTES)["tree_metadata"].values()
        paths = [
            [str(part["key"]) for part in leaf["key_metadata"]]
            for leaf in tree
            if leaf["value_metadata"].get("value_type") not in ("None", "Dict", "List")
        ]
    except (*_ERRORS, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} is damaged: {_short(error)}") from error
    return {"/".join(path): ".".join(path) for path in paths}


def _check_layout(array: ZarrArray) -> None:
    """Refuses chunks that could not be read in a bounded memory and time."""
    chunk = array.store.chunk_layout.read_chunk.shape or ()
    bound = 2 ** len(chunk) * max(1, array.nbytes)  # sizes of an array need not be multiples of its chunks'
    nbytes = math.prod(chunk) * array.store.dtype.numpy_dtype.itemsize
    if nbytes > min(bound, MAX_CHUNK_BYTES) or _count(array.shape, chunk) > MAX_CHUNKS:
        raise CheckpointError(f"{array.source}, {array.shape}, is cut into chunks of {chunk}, which is not sensible")


def _count(shape: tuple[int, ...], chunk: tuple[int, ...]) -> int:
    return math.prod(-(-size // step) for size, step in zip(shape, chunk, strict=True))


def _check_chunks(array: ZarrArray, key: str, keys: set[str]) -> None:
    """A chunk's file that is not there would be read as zeros. (In OCDBT a lost file is an error by itself.)"""
    chunk = array.store.chunk_layout.read_chunk.shape or ()
    wanted = _count(array.shape, chunk)
    own = sum(other.startswith(f"{key}/") for other in keys) - 1
    if own < wanted:
        raise CheckpointError(f"{array.source} has lost {wanted - own} of its {wanted} chunks")
