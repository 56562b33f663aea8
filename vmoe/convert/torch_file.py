"""PyTorch's own files, `torch.save(model.state_dict(), FILE)`, read without running code from them."""

import pickle
import zipfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from vmoe.convert.arrays import CheckpointError, StoredArray, to_numpy
from vmoe.utils.printable import first_line

_BEGINNINGS = (b"PK\x03\x04", b"\x80")  # of a zip archive, and of a pickle, the older format
_INSIDE = ("model", "state_dict")  # where training programs put the state dict


def is_torch_file(source: str | Path) -> bool:
    """Whether a path is a file that begins as those of `torch.save` do."""
    if not Path(source).is_file():
        return False
    with open(source, "rb") as file:
        beginning = file.read(4)
    return beginning.startswith(_BEGINNINGS)


def open_torch(file: str | Path) -> dict[str, StoredArray]:
    """The tensors of a state dict by name; they are read from the disk when their numbers are asked for.

    CheckpointError: the file cannot be read, holds more than tensors, or no state dict.
    """
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        remedy = "save its state_dict alone with torch.save"
        reason = f"it holds more than tensors, which could run code ({first_line(error)[:120]})"
        raise CheckpointError(f"{file} is not read: {reason}; {remedy}") from error
    except Exception as error:  # whatever PyTorch raises for a damaged file
        reason = f"{type(error).__name__}: {first_line(error)[:120]}"
        raise CheckpointError(f"{file} cannot be read by torch.load ({reason}); is it complete?") from error
    for key in _INSIDE:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if (
        not isinstance(content, Mapping)
        or not content
        or not all(isinstance(each, Tensor) for each in content.values())
    ):
        raise CheckpointError(f"{file} holds no state dict, names with a tensor each: {type(content).__name__}")
    return {str(name): _stored(tensor) for name, tensor in content.items()}


def _stored(tensor: Tensor) -> StoredArray:
    return StoredArray(
        tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), tensor.nbytes, [(..., partial(to_numpy, tensor))]
    )
