"""PyTorch's own files, `torch.save(model.state_dict(), FILE)`, read tensor by tensor; no code in them is run."""

import pickle
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

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
    try:
        with FakeTensorMode():  # tensors without numbers, which know where these lie in the file
            content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = f"it holds more than tensors, which could run code ({first_line(error)[:120]})"
        raise CheckpointError(f"{file} is not read: {reason}; save its state_dict alone with torch.save") from error
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
    if any(getattr(each.untyped_storage(), "_checkpoint_offset", None) is None for each in content.values()):
        raise CheckpointError(
            f"{file} is of PyTorch's older format, or lacks numbers: load it and save it with torch.save"
        )
    return {str(name): _stored(file, tensor) for name, tensor in content.items()}


def _stored(file: str | Path, tensor: Tensor) -> StoredArray:
    dtype = str(tensor.dtype).removeprefix("torch.")
    parts = [(..., partial(_read, file, tensor))] if tensor.numel() else []
    return StoredArray(tuple(tensor.shape), dtype, tensor.nbytes, parts)


def _read(file: str | Path, tensor: Tensor) -> np.ndarray:
    storage = tensor.untyped_storage()
    raw = np.fromfile(file, np.uint8, storage.nbytes(), offset=storage._checkpoint_offset)
    if len(raw) < storage.nbytes():
        raise CheckpointError(f"{file} ends before the numbers of a tensor {tuple(tensor.shape)}; is it complete?")
    numbers = torch.from_numpy(raw).view(tensor.dtype)
    return to_numpy(numbers.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()))
