"""Writes safetensors files: tensors at once, or a mapped file that is filled bit by bit."""

import errno
import json
import math
import mmap
import os
import re
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from vmoe.utils.files import atomic_file


def write_tensors(tensors: dict[str, Tensor], metadata: dict[str, str], file: Path) -> None:
    """Writes contiguous CPU tensors atomically and to the disk itself; an OSError if the file cannot be written, a
    RuntimeError for tensors that share their memory."""
    file.parent.mkdir(parents=True, exist_ok=True)
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


@contextmanager
def mapped_safetensors(
    file: Path, shapes: Mapping[str, Sequence[int]], dtypes: Mapping[str, torch.dtype], metadata: dict[str, str]
) -> Iterator[tuple[dict[str, Tensor], Callable[[], None]]]:
    """(the tensors of a new file, a function that takes filled ones out of memory). The file takes its name when the
    block ends without an error; a full disk is an OSError before anything is written."""
    header, end = {"__metadata__": metadata}, 0
    for name in sorted(shapes, key=lambda name: (-dtypes[name].itemsize, name)):  # so that each is aligned
        start, end = end, end + math.prod(shapes[name]) * dtypes[name].itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtypes[name]], "shape": list(shapes[name]), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    first = 8 + len(text)
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(file) as draft, open(draft, "w+b") as opened:
        opened.truncate(first + end)
        if hasattr(os, "posix_fallocate"):  # a full disk is an error now, not a crash while the map is written
            os.posix_fallocate(opened.fileno(), 0, first + end)
        mapped = mmap.mmap(opened.fileno(), first + end)
        mapped[:first] = struct.pack("<Q", len(text)) + text
        data = torch.frombuffer(mapped, dtype=torch.uint8)[first:]
        tensors = {
            name: data[slice(*header[name]["data_offsets"])].view(dtypes[name]).view(tuple(shape))
            for name, shape in shapes.items()
        }

        def release() -> None:
            mapped.flush()
            if hasattr(mmap, "MADV_DONTNEED"):
                mapped.madvise(mmap.MADV_DONTNEED)

        yield tensors, release
        mapped.flush()
        os.fsync(opened.fileno())
