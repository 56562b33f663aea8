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
from vmoe.utils.files import read_json
from vmoe.utils.printable import printable

logger = logging.getLogger("vmoe.convert")

# A chunk is decoded in one go, and a hostile one may be much larger than its array, or as small as a number.
MAX_METADATA_BYTES, MAX_CHUNK_BYTES, MAX_CHUNKS = 64 * 2**20, 4 * 2**30, 2**20
_ERRORS = (ValueError, KeyError, IndexError, OSError, RuntimeError, NotImplementedError)  # tensorstore's
_MARKS = ("manifest.ocdbt", "_METADATA", "checkpoint")
_STEP = re.compile(r"((?!.*orbax-checkpoint-tmp).*?)([0-9]+)")  # not what Orbax is still writing


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
    matches = [(path, _STEP.fullmatch(path.name)) for path in folder.glob("*") if path.is_dir()]
    steps = sorted(((path, match) for path, match in matches if match), key=lambda pair: int(pair[1][2]))
    steps = [(path, match[1]) for path, match in steps if step in (None, int(match[2]))]
    if not steps:
        return _arrays_in(folder) if step is None else None
    complete = [(path, stem) for path, stem in steps if _arrays_in(path)]
    if not complete:
        raise CheckpointError(
            f"{folder} holds no arrays in {_listed(steps)}, saves that never ended: give another folder or step"
        )
    if len({stem for _, stem in complete}) > 1:
        raise CheckpointError(f"{folder} holds several checkpoints, {_listed(complete)}: give the path of one")
    newest = complete[-1]
    if newer := steps[steps.index(newest) + 1 :]:
        logger.warning("%s holds no arrays in %s: %s is read", folder, _listed(newer), newest[0].name)
    return _arrays_in(newest[0])


def _listed(steps: list[tuple[Path, str]]) -> str:
    more = f" and {len(steps) - 5} more" * (len(steps) > 5)
    return printable(", ".join(path.name for path, _ in steps[-5:])) + more


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
        source: name and folder, for errors.
    """

    def __init__(self, store, source: str) -> None:
        self.store, self.source = store, source
        self.shape, self.dtype = tuple(store.shape), store.dtype.name
        itemsize = store.dtype.numpy_dtype.itemsize
        self.nbytes = math.prod(self.shape) * itemsize
        self.chunk = store.chunk_layout.read_chunk.shape or ()
        self.grid = tuple(-(-size // step) for size, step in zip(self.shape, self.chunk))
        chunk_bytes = math.prod(self.chunk) * itemsize
        bound = 2 ** len(self.chunk) * max(1, self.nbytes)  # the last chunk of an axis may go beyond the array
        if chunk_bytes > min(bound, MAX_CHUNK_BYTES) or math.prod(self.grid) > MAX_CHUNKS:
            raise CheckpointError(f"{source}, {self.shape}, is cut into chunks of {self.chunk}, which is not sensible")

    def pieces(self) -> Iterator[tuple[Slices, np.ndarray]]:
        for corner in np.ndindex(*self.grid):  # chunk by chunk, since less than one would only be decoded again
            where = tuple(
                slice(index * step, min((index + 1) * step, size))
                for index, step, size in zip(corner, self.chunk, self.shape)
            )
            try:
                yield where, np.asarray(self.store[where].read().result())
            except _ERRORS as error:
                raise CheckpointError(f"{self.source} is damaged: {_short(error)}") from error


def _short(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:300]


def open_orbax(folder: str | Path) -> dict[str, ZarrArray]:
    """The arrays of an Orbax checkpoint by name, "params/Encoder/encoder_norm/scale".

    Raises:
        CheckpointError: for a file that is missing or damaged; names the folder and the tensor.
        ModuleNotFoundError: if tensorstore is not installed; says how to get it.
    """
    try:
        import tensorstore as ts
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Orbax checkpoints are read with tensorstore: pip install -e '.[convert]' in a checkout", name="tensorstore"
        ) from error
    folder = Path(folder).resolve()
    plain = {"driver": "file", "path": f"{folder}/"}
    base = {"driver": "ocdbt", "base": plain} if (folder / "manifest.ocdbt").is_file() else plain
    try:
        keys = {key.decode() for key in ts.KvStore.open(base).result().list().result()}
    except _ERRORS as error:
        raise CheckpointError(f"{folder} is not a readable Orbax checkpoint: {_short(error)}") from error
    formats = {"/.zarray": "zarr", "/zarr.json": "zarr3"}
    drivers = {key.removesuffix(end): driver for key in keys for end, driver in formats.items() if key.endswith(end)}
    arrays = {}
    for name, key in _names(folder, drivers).items():
        if key not in drivers:
            raise CheckpointError(f"{folder} has lost {name}: _METADATA names it, the store does not hold it")
        inner = {**base, "path": f"{base['path']}{key}/" if base is plain else key}
        try:
            store = ts.open({"driver": drivers[key], "kvstore": inner}, open=True, read=True).result()
        except _ERRORS as error:
            raise CheckpointError(f"{name} in {folder} cannot be opened: {_short(error)}") from error
        array = arrays[name] = ZarrArray(store, f"{name} in {folder}")
        # A chunk's file that is not there would be read as zeros. (In OCDBT a lost file is an error by itself.)
        wanted, own = math.prod(array.grid), sum(other.startswith(f"{key}/") for other in keys) - 1
        if base is plain and own < wanted:
            raise CheckpointError(f"{array.source} has lost {wanted - own} of its {wanted} chunks")
    return arrays


def _names(folder: Path, keys: dict[str, str]) -> dict[str, str]:
    """{name with slashes: key in the store}, in the order of the tree where the folder describes it."""
    file = folder / "_METADATA"
    if not file.is_file():
        return {key.replace(".", "/"): key for key in sorted(keys)}
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
