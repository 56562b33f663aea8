"""The converting command: `vmoe-convert --from PATH --to FILE.safetensors`."""

import argparse
from collections.abc import Sequence

from vmoe.cli.command import exit_code
from vmoe.convert.released import RELEASED
from vmoe.utils.paths import check_output
from vmoe.utils.printable import safe_output


@safe_output()
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code, see `exit_code`."""
    parser = argparse.ArgumentParser(
        prog="vmoe-convert",
        description="Write a checkpoint of the reference (google-research/vmoe), or SigLino's, as a safetensors file.",
        epilog="released checkpoints of the reference, known by name: " + ", ".join(RELEASED),
    )
    source_help = "prefix of PREFIX.index and PREFIX.data-i-of-n, an Orbax folder, or a file of PyTorch (.pt)"
    parser.add_argument("--from", dest="source", required=True, metavar="PATH", help=source_help)
    config_help = "of the reference: a released name, or a JSON file; of other models: a JSON file if not released"
    parser.add_argument("--config", metavar="NAME_OR_JSON", help=config_help)
    parser.add_argument("--model", metavar="NAME", help="such as siglino_moe_0_3b, where a .pt fits several models")
    parser.add_argument("--to", dest="file", required=True, metavar="FILE.safetensors", help="the file to write")
    parser.add_argument("--step", type=int, help="of a training run's checkpoints; by default the last")
    parser.add_argument("--image_size", type=int, help="in pixels, if not the checkpoint's: positions are resized")
    parser.add_argument("--context_length", type=int, help="of a text tower without position embeddings")
    args = parser.parse_args(argv)
    return exit_code("vmoe-convert", lambda: run(**vars(args)))


def run(file: str, **settings) -> None:
    """Converts, and says what was done; arguments as of `convert_checkpoint`."""
    check_output(file, ".safetensors")
    from vmoe.convert.to_safetensors import convert_checkpoint

    done = convert_checkpoint(file=file, **settings)
    skipped = f"; {done.skipped} others skipped (optimizer, step, ...)" if done.skipped else ""
    print(f"read     {done.arrays} arrays, {done.nbytes:,} bytes, from {done.source} ({done.format}){skipped}")
    print(f"wrote    {file}: {done.name}, {done.parameters:,} parameters")
    print(f'use it   model, _, transform = vmoe.create_model_and_transforms(pretrained="{file}")')
