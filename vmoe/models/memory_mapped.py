"""A safetensors file that is written tensor by tensor, so that memory need not hold the model."""

from __future__ import annotations

import json
import math
import mmap
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor

from vmoe.utils.atomic import whole_file

# Names of types in a safetensors file: https://huggingface.co/docs/safetensors, "Format".
DTYPE_NAMES = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.bool: "BOOL",
}


class MappedTensors(dict[str, Tensor]):
    """{name: tensor in the file}; `release` lets the system take the pages that were written."""

    def __init__(self, mapped: mmap.mmap, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(tensors)
        self._mapped = mapped

    def release(self) -> None:
        self._mapped.flush()
        if hasattr(mmap, "MADV_DONTNEED"):
            self._mapped.madvise(mmap.MADV_DONTNEED)


@contextmanager
def mapped_safetensors(
    file: Path, shapes: Mapping[str, Sequence[int]], dtypes: Mapping[str, torch.dtype], metadata: dict[str, str]
) -> Iterator[MappedTensors]:
    """The tensors of a new file, to be filled inside the block.

    The file takes its name when the block ends without an error; else it stays as it was, and folders that were made
    for it are removed.

    Args:
        file: its folder is made if there is none.
        shapes: {name: shape}.
        dtypes: {name: type}, of the same names.
        metadata: what the file says of itself.

    Raises:
        OSError: it cannot be written; a full disk is found before anything is.
    """
    header, end = {"__metadata__": metadata}, 0
    for name in sorted(shapes, key=lambda name: (-dtypes[name].itemsize, name)):  # so that each starts at its multiple
        start, end = end, end + math.prod(shapes[name]) * dtypes[name].itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtypes[name]], "shape": list(shapes[name]), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    first = 8 + len(text)
    made = [folder for folder in file.parents if not folder.exists()]
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(file) as draft, open(draft, "w+b") as opened:
            if hasattr(os, "posix_fallocate"):  # a full disk is an error now, not a crash while the map is written
                os.posix_fallocate(opened.fileno(), 0, first + end)
            else:
                opened.truncate(first + end)
            mapped = mmap.mmap(opened.fileno(), first + end)
            mapped[:first] = struct.pack("<Q", len(text)) + text
            data = torch.frombuffer(mapped, dtype=torch.uint8)[first:]
            places = {name: header[name]["data_offsets"] for name in shapes}
            yield MappedTensors(
                mapped,
                {name: data[a:b].view(dtypes[name]).view(tuple(shapes[name])) for name, (a, b) in places.items()},
            )
            mapped.flush()
            os.fsync(opened.fileno())
    finally:
        if not file.exists():
            with suppress(OSError):  # somebody else wrote into one of them
                for folder in made:
                    folder.rmdir()
