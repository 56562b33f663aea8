"""The converting command: `vmoe-convert --from PREFIX_OR_DIR --config NAME_OR_JSON --to FILE.safetensors`."""

import argparse
import os
import sys
from collections.abc import Sequence

from vmoe.convert.released import RELEASED
from vmoe.convert.to_safetensors import convert_checkpoint
from vmoe.utils.printable import printable, safe_output


@safe_output()
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code: 0, or 1 for an error, which is one sentence.

    Set VMOE_TRACEBACK=1 to see where an error comes from.
    """
    parser = argparse.ArgumentParser(
        prog="vmoe-convert",
        description="Write a checkpoint of the reference (google-research/vmoe) as a safetensors file of this package.",
        epilog="released checkpoints, known by name: " + ", ".join(RELEASED),
    )
    parser.add_argument("--from", dest="source", required=True, metavar="PREFIX_OR_DIR", help="the checkpoint: " + (
        "the prefix of PREFIX.index and PREFIX.data-i-of-n, an Orbax folder, or one flax MessagePack file"
    ))  # fmt: skip
    parser.add_argument("--config", required=True, metavar="NAME_OR_JSON", help="a released name, or a JSON file")
    parser.add_argument("--to", required=True, metavar="FILE.safetensors", help="the file to write")
    parser.add_argument("--step", type=int, help="of a training run's checkpoints; by default the last")
    parser.add_argument("--image_size", type=int, help="in pixels, if not the checkpoint's: positions are resized")
    parser.add_argument("--context_length", type=int, help="of a text tower without position embeddings")
    args = parser.parse_args(argv)
    try:
        done = convert_checkpoint(
            args.source, args.config, args.to, args.step, args.image_size, args.context_length
        )  # fmt: skip
    except (ValueError, OSError, ModuleNotFoundError) as error:
        if os.environ.get("VMOE_TRACEBACK"):
            raise
        print(f"vmoe.convert: error: {printable(error)}", file=sys.stderr)
        return 1
    aside = f"; {done.left_aside} others left aside (optimizer, step, ...)" if done.left_aside else ""
    print(f"read     {done.arrays} arrays, {done.nbytes:,} bytes, from {done.source} ({done.format}){aside}")
    print(f"wrote    {done.file}: {done.name}, {done.parameters:,} parameters")
    print(f'use it   model, _, transform = vmoe.create_model_and_transforms(pretrained="{done.file}")')
    return 0


if __name__ == "__main__":
    sys.exit(main())
