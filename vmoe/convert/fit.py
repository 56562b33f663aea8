"""What all converters do: build a model without memory, say what does not fit it, and fill it."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import nn

from vmoe.convert.arrays import CheckpointError, StoredArray
from vmoe.convert.layout import Entry
from vmoe.convert.section import ConfigError
from vmoe.utils.meta import meta_device
from vmoe.utils.printable import printable

Fill = Callable[[np.ndarray], None]
Rows = list[tuple[Entry, Fill]]  # a tensor's entry, and what fills its view
FLOATS = ("float16", "bfloat16", "float32", "float64")
MOST_PROBLEMS = 6  # in an error


def without_memory(build: Callable[[], nn.Module], what: str = "these arguments") -> nn.Module:
    """The model on the meta device, however large it is; a ConfigError if it cannot be built."""
    try:
        with meta_device():
            return build()
    except (RuntimeError, OverflowError, MemoryError, ZeroDivisionError) as error:  # sizes beyond what PyTorch counts
        raise ConfigError(f"the model of {what} cannot be built: {printable(error)[:200]}") from error


def fit(
    model: nn.Module,
    layout: Iterable[tuple[str, Entry]],
    names: Iterable[str],
    read: Callable[[str, Entry, tuple[int, ...]], Fill],
    source: object,
    what: str,
    problems: Sequence[str] = (),
) -> Rows:
    """What fills each tensor of a model, before any number is read.

    `layout` says which array lies where, `names` are the arrays of the checkpoint, and `read(name, entry, shape)` gives
    what fills a view of this shape, or a ValueError. A CheckpointError names all problems of `source` with `what`, the
    given ones too.
    """
    own, rows, known, found = model.state_dict(), [], set(), []
    for name, entry in layout:
        known.add(name)
        shape = entry.view(np.broadcast_to(np.float32(0), own[entry.tensor].shape)).shape  # takes no memory
        try:
            rows.append((entry, read(name, entry, shape)))
        except ValueError as error:
            found.append(f"{name} {error}")
    unknown = [f"{name} is not part of the model" for name in sorted(set(names) - known)]
    if problems := [*found, *problems, *unknown]:
        others = f" and {len(problems) - MOST_PROBLEMS} more" if len(problems) > MOST_PROBLEMS else ""
        raise CheckpointError(f"{source} does not fit {what}: {printable('; '.join(problems[:MOST_PROBLEMS]))}{others}")
    return rows


def floats(stored: Mapping[str, StoredArray], name: str) -> StoredArray:
    """An array of floating-point numbers; a ValueError if there is none of this name."""
    if name not in stored:
        raise ValueError("is missing")
    if (dtype := stored[name].dtype) not in FLOATS:
        raise ValueError(f"is of type {dtype}")
    return stored[name]


def filler(stored: Mapping[str, StoredArray], name: str, entry: Entry, shape: tuple[int, ...]) -> Fill:
    """What reads the entry's rows of an array into a view of this shape; a ValueError if they do not fit it."""
    array, rows = floats(stored, name), entry.rows
    found = array.shape and (len(range(*rows.indices(array.shape[0]))), *array.shape[1:])
    if found != shape:
        raise ValueError(f"has shape {array.shape}, the model's is {shape}")
    return array.read_into if rows == slice(None) else lambda target: np.copyto(target, array.read()[rows])


def filled(model: nn.Module, rows: Rows) -> nn.Module:
    """The model in eval mode, with the weights that `rows` read."""
    tensors: dict[str, torch.Tensor] = model.state_dict()
    for entry, fill in rows:
        fill(entry.view(tensors[entry.tensor].numpy()))
    return model.eval()
