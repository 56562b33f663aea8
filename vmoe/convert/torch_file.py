"""PyTorch's own files, `torch.save(model.state_dict(), FILE)`, read tensor by tensor; no code in them is run."""

import pickle
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
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
        return file.read(4).startswith(_BEGINNINGS)


def open_torch(file: str | Path) -> dict[str, StoredArray]:
    """The tensors of a state dict by name; each is read from the disk when its numbers are asked for.

    CheckpointError: the file cannot be read, holds more than tensors, or no state dict.
    """
    return {name: _stored(file, name, tensor) for name, tensor in _state_dict(file).items()}


def _state_dict(file: str | Path) -> dict[str, Tensor]:
    """The tensors of a file, mapped. CheckpointError."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        reason = f"it holds more than tensors, which could run code ({first_line(error)[:120]})"
        raise CheckpointError(f"{file} is not read: {reason}; save its state_dict alone with torch.save") from error
    except Exception as error:  # whatever PyTorch raises for a damaged file
        if "_use_new_zipfile_serialization" in str(error):
            raise CheckpointError(
                f"{file} is of PyTorch's older format: load it and save it again with torch.save"
            ) from error
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
    return {str(name): tensor for name, tensor in content.items()}


def _stored(file: str | Path, name: str, tensor: Tensor) -> StoredArray:
    dtype = str(tensor.dtype).removeprefix("torch.")
    parts = [(..., partial(_read, file, name))] if tensor.numel() else []
    return StoredArray(tuple(tensor.shape), dtype, tensor.nbytes, parts)


def _read(file: str | Path, name: str) -> np.ndarray:
    # By a map of its own, since all that was read of a map counts as memory until it is closed.
    return to_numpy(_state_dict(file)[name])
