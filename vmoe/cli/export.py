"""The export command: a checkpoint of any run, sharded or not, as one safetensors file with all that it needs.

It exports what `eval.py` measures: the moving average of the weights, if the run kept one. The tensors pass from mapped
files to a mapped file, so the memory need not hold the model.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from vmoe.cli.command import exit_code
from vmoe.utils.printable import safe_output


def export(source: str | Path, output: str | Path, raw: bool = False) -> Path:
    """Writes a checkpoint's weights as one safetensors file, atomically; returns the file or folder that was read.

    `source` is a run's folder (its newest undamaged checkpoint), or a checkpoint's; `output` is replaced if it exists;
    `raw` takes the trained weights, even if the run kept a moving average of them. WeightsError: no such weights, they
    are damaged, or the file cannot be written there.
    """
    from vmoe.models.manifest import is_checkpoint
    from vmoe.models.serialization import (
        SETTINGS_NAME,
        StoredTensors,
        WeightsError,
        checkpoint_weights,
        find_weights,
        mapped_safetensors,
        safetensors_metadata,
    )

    output = Path(output)
    if output.suffix != ".safetensors":
        raise WeightsError(f"--output {output}: give a name that ends with .safetensors")
    if Path(source).is_file():
        raise WeightsError(f"{source} is one file already; give the folder of a run or of a checkpoint")
    if (Path(source) / SETTINGS_NAME).is_file():
        raise WeightsError(
            f"{source} is one part of a checkpoint; give the checkpoint's folder, and --raw for its model"
        )
    for folder in output.resolve().parents:
        if is_checkpoint(folder):
            problem = f"lies in the checkpoint {folder}, which another file would damage"
            raise WeightsError(f"--output {output} {problem}; give another folder")
    weights = find_weights(source)  # compares the checkpoint with its checksums
    if raw:
        weights = checkpoint_weights(weights.parent)
    stored = StoredTensors(weights)
    try:
        with mapped_safetensors(output, stored.shapes, stored.dtypes, safetensors_metadata(weights)) as (tensors, _):
            stored.read_into(tensors)
    except OSError as error:
        reason = f"({error.strerror or error}); free some space or choose another folder"
        raise WeightsError(f"{output} cannot be written {reason}") from error
    return weights


@safe_output()
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code, see `exit_code`."""
    description = "Write the weights of a training run as one safetensors file."
    parser = argparse.ArgumentParser(prog="vmoe-export", description=description)
    parser.add_argument("source", metavar="RUN_OR_CHECKPOINT", help="folder of a run (its newest), or of a checkpoint")
    parser.add_argument("--output", required=True, metavar="FILE.safetensors", help="the file to write")
    parser.add_argument("--raw", action="store_true", help="the trained weights, instead of their moving average")
    args = parser.parse_args(argv)

    def run() -> None:
        from vmoe.models.serialization import StoredTensors, checkpoint_weights, read_pretrained_metadata

        weights = export(args.source, args.output, args.raw)
        shapes, name = StoredTensors(args.output).shapes.values(), read_pretrained_metadata(args.output)["name"]
        if checkpoint_weights(weights.parent, average=True) is None:
            what = "the weights, which eval.py measures too; the run kept no moving average of them"
        elif args.raw:
            what = "the weights as they were trained, not their moving average, which eval.py measures"
        else:
            what = "the moving average of the weights, which eval.py measures too; --raw exports the weights themselves"
        print(f"read     {weights}: {what}")
        print(f"wrote    {args.output}: {name}, {len(shapes)} tensors, {sum(map(math.prod, shapes)):,} numbers")

    return exit_code("vmoe-export", run)
