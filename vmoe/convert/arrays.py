"""What every checkpoint reader gives: arrays by name, whose numbers are read when they are asked for."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vmoe.utils.printable import printable

# Prefixes of the weights in the trees that training programs save; the first that fits counts.
_ROOTS = ("", "params/", "params/params/", "state/params/", "model/params/", "train_state/params/", "target/")
_PROBES = ("Encoder/encoder_norm/scale", "img/Encoder/encoder_norm/scale", "txt/Encoder/encoder_norm/scale")


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or does not fit; one sentence that names the file and the tensor."""


@dataclass(frozen=True)
class StoredArray:
    """An array of a checkpoint, as it is stored; `parts` that together cover it: where each lies, and a function that
    reads it (bfloat16 as float32)."""

    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    parts: Sequence[tuple[Any, Callable[[], np.ndarray]]]

    def read_into(self, target: np.ndarray) -> None:
        """Fills a writable view of the array's shape; other types are converted."""
        for where, read in self.parts:
            target[where] = read()

    def read(self, dtype=np.float32) -> np.ndarray:
        """The array in memory."""
        array = np.empty(self.shape, dtype)
        self.read_into(array)
        return array


def to_numpy(array: Any) -> np.ndarray:
    """Anything that NumPy can read, or a torch tensor; 16-bit floats of torch as float32."""
    if hasattr(array, "detach"):  # NumPy cannot read tensors in bfloat16 or with a gradient
        array = array.detach().cpu()
        array = array.float() if array.dtype.is_floating_point and array.dtype.itemsize == 2 else array
    return np.asarray(array)


def in_memory(array: Any) -> StoredArray:
    """An array that was read already."""
    array = to_numpy(array)
    return StoredArray(array.shape, array.dtype.name, array.nbytes, [(..., lambda: array)])


def state_arrays(state: Any, what: str = "state") -> dict[str, StoredArray]:
    """The arrays of a dictionary by name, "a/b" of nested ones. A CheckpointError if it is none."""
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{what} must be a dictionary of arrays, got {type(state).__name__}")
    return {name: in_memory(array) for name, array in flatten(state)}


def flatten(tree: Mapping, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """("a/b", leaf) of nested dictionaries in the order in which JAX walks them: by sorted key at every level."""
    for key in sorted(tree, key=str):
        name, value = f"{prefix}{key}", tree[key]
        if isinstance(value, Mapping):
            yield from flatten(value, f"{name}/")
        elif value is not None:
            yield name, value


def select_params(arrays: Mapping[str, StoredArray], source: str | Path) -> tuple[dict[str, StoredArray], int]:
    """The model's weights by their names in the model, and the number of other arrays (optimizer state, step, ...)."""
    for root in _ROOTS:
        if any(root + probe in arrays for probe in _PROBES):
            chosen = {name.removeprefix(root): array for name, array in arrays.items() if name.startswith(root)}
            return chosen, len(arrays) - len(chosen)
    wanted = f"holds no weights of a V-MoE of the reference (an array named [params/]{_PROBES[0]})"
    raise CheckpointError(f"{source} {wanted}; it holds {list_names(sorted(arrays))}")


def list_names(names: Sequence[str]) -> str:
    """The first five names, for errors."""
    more = f" and {len(names) - 5} more" * (len(names) > 5)
    return printable(", ".join(names[:5])) + more if names else "nothing"
