"""The exporting command: a checkpoint of any run, whole or in shards, as one safetensors file with all that it needs.

    python -m vmoe.export RUN_OR_CHECKPOINT --output FILE.safetensors [--ema]

The tensors pass from the checkpoint's mapped files into the mapped output file, so the memory need not hold the model.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import struct
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from vmoe.command import exit_code
from vmoe.manifest import is_checkpoint
from vmoe.models.weights import (
    SETTINGS_NAME,
    StoredTensors,
    WeightsError,
    checkpoint_weights,
    find_weights,
    read_pretrained_metadata,
    safetensors_metadata,
)
from vmoe.whole import whole_file

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


def export(source: str | Path, output: str | Path, average: bool = False) -> Path:
    """Writes a checkpoint's weights as one safetensors file, or leaves what is there as it was.

    Args:
        source: a run's folder (its newest whole checkpoint), or a checkpoint's.
        output: the file; replaced if it exists.
        average: the moving average of the weights instead of the weights.

    Returns:
        The weights that were read: a file, or a folder of shards.

    Raises:
        WeightsError: no such weights, they are damaged, or the file cannot be written, or must not be, because it would
            damage a checkpoint.
    """
    output = Path(output)
    if output.suffix != ".safetensors":
        raise WeightsError(f"--output {output}: give a name that ends with .safetensors")
    if Path(source).is_file():
        raise WeightsError(f"{source} is one file already; give the folder of a run or of a checkpoint")
    if (Path(source) / SETTINGS_NAME).is_file():
        raise WeightsError(f"{source} is one part of a checkpoint; give the checkpoint's folder, and --ema for its ema")
    inside = next((folder for folder in output.resolve().parents if is_checkpoint(folder)), None)
    if inside is not None:
        raise WeightsError(
            f"--output {output} lies in the checkpoint {inside}, which a file more would damage; give another folder"
        )
    checkpoint = find_weights(source).parent  # compares it with its checksums
    weights = checkpoint_weights(checkpoint, average)
    if weights is None:
        raise WeightsError(f"{checkpoint} holds no moving average: its run has train.ema_decay null; leave --ema out")
    stored = StoredTensors(weights)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with _mapped(output, stored.shapes, stored.dtypes, safetensors_metadata(weights)) as tensors:
            stored.read_into(tensors)
    except OSError as error:
        raise WeightsError(
            f"{output} cannot be written ({error.strerror or error}); free some space or choose another place"
        ) from error
    return weights


@contextmanager
def _mapped(
    file: Path, shapes: dict[str, torch.Size], dtypes: dict[str, torch.dtype], metadata: dict[str, str]
) -> Iterator[dict[str, Tensor]]:
    """{name: tensor to be filled} of a safetensors file, which takes its name when the block ends without an error."""
    header, end = {"__metadata__": metadata}, 0
    for name in sorted(shapes, key=lambda name: (-dtypes[name].itemsize, name)):  # so that each starts at its multiple
        start, end = end, end + math.prod(shapes[name]) * dtypes[name].itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtypes[name]], "shape": list(shapes[name]), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    first = 8 + len(text)
    with whole_file(file) as draft, open(draft, "w+b") as opened:
        if hasattr(os, "posix_fallocate"):  # a full disk is an error now, not a crash while the map is written
            os.posix_fallocate(opened.fileno(), 0, first + end)
        else:
            opened.truncate(first + end)
        opened.write(struct.pack("<Q", len(text)) + text)
        opened.flush()
        data = torch.from_file(str(draft), shared=True, size=first + end, dtype=torch.uint8)[first:]
        places = {name: header[name]["data_offsets"] for name in shapes}
        yield {name: data[a:b].view(dtypes[name]).view(shapes[name]) for name, (a, b) in places.items()}
        os.fsync(opened.fileno())


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code: 0, or 1 for an error, which is one sentence."""
    parser = argparse.ArgumentParser(
        prog="vmoe-export", description="Write the weights of a training run as one safetensors file."
    )
    parser.add_argument("source", metavar="RUN_OR_CHECKPOINT", help="folder of a run (its newest), or of a checkpoint")
    parser.add_argument("--output", required=True, metavar="FILE.safetensors", help="the file to write")
    parser.add_argument("--ema", action="store_true", help="the moving average of the weights instead of the weights")
    args = parser.parse_args(argv)

    def run() -> None:
        weights = export(args.source, args.output, args.ema)
        shapes = StoredTensors(args.output).shapes.values()
        name = read_pretrained_metadata(args.output)["name"]
        print(f"read     {weights}")
        print(f"wrote    {args.output}: {name}, {len(shapes)} tensors, {sum(map(math.prod, shapes)):,} numbers")

    return exit_code("vmoe-export", run)


if __name__ == "__main__":
    sys.exit(main())
