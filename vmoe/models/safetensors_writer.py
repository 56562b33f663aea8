"""Writes safetensors files: tensors at once, or one by one."""

import errno
import json
import math
import os
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from vmoe.utils.files import atomic_file


def write_tensors(tensors: dict[str, Tensor], metadata: dict[str, str], file: Path) -> None:
    """Writes contiguous CPU tensors atomically and to the disk itself; an OSError if the file cannot be written, a
    RuntimeError for tensors that share their memory."""
    with atomic_file(file) as draft:
        try:
            save_file(tensors, draft, metadata=metadata)
        except SafetensorError as error:  # only the disk can fail here; the message has the system's number
            code = re.search(r"os error (\d+)", str(error))
            number = int(code[1]) if code else errno.EIO
            raise OSError(number, os.strerror(number), str(file)) from error
        with open(draft, "rb") as written:
            os.fsync(written.fileno())


# Names of types in a safetensors file: https://huggingface.co/docs/safetensors, "Format".
DTYPE_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
DTYPE_NAMES |= {torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8"}
DTYPE_NAMES |= {torch.uint8: "U8", torch.bool: "BOOL"}


def write_one_by_one(
    file: Path,
    shapes: Mapping[str, Sequence[int]],
    dtypes: Mapping[str, torch.dtype],
    metadata: dict[str, str],
    read: Callable[[str], Tensor],
) -> None:
    """Writes a file atomically, with one tensor at a time in memory: what `read` gives for a name."""
    header, end = {"__metadata__": metadata}, 0
    names = sorted(shapes, key=lambda name: (-dtypes[name].itemsize, name))  # so that each is aligned
    for name in names:
        start, end = end, end + math.prod(shapes[name]) * dtypes[name].itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtypes[name]], "shape": list(shapes[name]), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with atomic_file(file) as draft, open(draft, "wb") as opened:
        if hasattr(os, "posix_fallocate"):  # a disk that is too full says so now
            os.posix_fallocate(opened.fileno(), 0, 8 + len(text) + end)
        opened.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            opened.write(read(name).contiguous().flatten().view(torch.uint8).numpy())
        opened.flush()
        os.fsync(opened.fileno())
