"""What every checkpoint reader gives: arrays by name that are read in pieces.

A reader looks at names, shapes and positions first and reads no number. So a checkpoint that does not fit is refused
before anything is written, and a large one passes through a small buffer.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

PIECE_BYTES = 32 * 2**20  # of an array that are in memory at once

Slices = tuple[slice, ...]

# Prefixes of the weights in the trees that training programs save; the first that fits counts.
_ROOTS = ("", "params/", "params/params/", "state/params/", "model/params/", "train_state/params/", "target/")
_PROBES = ("Encoder/encoder_norm/scale", "img/Encoder/encoder_norm/scale", "txt/Encoder/encoder_norm/scale")


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or does not fit; one sentence that names the file and the tensor."""


class StoredArray(Protocol):
    """An array of a checkpoint: its shape, the name of its stored type, and the bytes of its numbers."""

    shape: tuple[int, ...]
    dtype: str
    nbytes: int

    def pieces(self) -> Iterator[tuple[Slices, np.ndarray]]:
        """Parts that together cover the array: the slices of each, and its numbers (bfloat16 as float32)."""


class ArrayInMemory:
    """A `StoredArray` around anything that NumPy can read; also the bfloat16 of other libraries."""

    def __init__(self, array) -> None:
        if hasattr(array, "detach"):  # a torch tensor, which NumPy cannot read in bfloat16 or with a gradient
            array = array.detach().cpu()
            array = array.float() if array.dtype.is_floating_point and array.dtype.itemsize == 2 else array
        self.array = np.asarray(array)
        self.shape, self.dtype, self.nbytes = self.array.shape, self.array.dtype.name, self.array.nbytes

    def pieces(self) -> Iterator[tuple[Slices, np.ndarray]]:
        yield (..., self.array)


def row_slices(shape: tuple[int, ...], itemsize: int, limit: int = PIECE_BYTES) -> Iterator[Slices]:
    """Cut an array into runs of neighbours in memory of at most `limit` bytes, in order."""
    if 0 in shape:
        return
    if not shape:
        yield ()
        return
    axis = 0  # that is cut; those before it are walked through one by one
    while axis < len(shape) - 1 and math.prod(shape[axis + 1 :]) * itemsize > limit:
        axis += 1
    step = max(1, limit // (math.prod(shape[axis + 1 :]) * itemsize))
    for lead in np.ndindex(*shape[:axis]):
        for start in range(0, shape[axis], step):
            first = tuple(slice(index, index + 1) for index in lead)
            rest = tuple(slice(0, size) for size in shape[axis + 1 :])
            yield (*first, slice(start, min(start + step, shape[axis])), *rest)


def copy_into(target: np.ndarray, stored: StoredArray) -> None:
    """Read an array, piece by piece, into a writable view of its shape; other types are converted."""
    for where, piece in stored.pieces():
        target[where] = piece


def read_array(stored: StoredArray, dtype=np.float32) -> np.ndarray:
    """The array in memory."""
    array = np.empty(stored.shape, dtype)
    copy_into(array, stored)
    return array


def select_params(arrays: Mapping[str, StoredArray], source: str | Path) -> tuple[dict[str, StoredArray], int]:
    """The model's weights by their names in the model, and the number of other arrays (optimizer state, step, ...).

    Raises:
        CheckpointError: if there are no weights of a reference model; names `source`.
    """
    for root in _ROOTS:
        if any(root + probe in arrays for probe in _PROBES):
            chosen = {name.removeprefix(root): array for name, array in arrays.items() if name.startswith(root)}
            return chosen, len(arrays) - len(chosen)
    some = ", ".join(sorted(arrays)[:4]) or "nothing"
    raise CheckpointError(
        f"{source} holds no weights of a V-MoE of the reference (an array named [params/]{_PROBES[0]}); it holds {some}"
    )
