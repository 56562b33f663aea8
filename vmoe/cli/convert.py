"""The converting command: `vmoe-convert --from PATH --to FILE.safetensors`, and a Swin-MoE back to ranks."""

import argparse
from collections.abc import Sequence

from vmoe.cli.command import exit_code
from vmoe.convert.released import RELEASED
from vmoe.utils.paths import check_output


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code, see `exit_code`."""
    parser = argparse.ArgumentParser(
        prog="vmoe-convert",
        description="Write a checkpoint of another project as a safetensors file of this package, or a Swin-MoE back.",
        epilog="released checkpoints of google-research/vmoe, known by name: " + ", ".join(RELEASED),
    )
    source_help = "prefix of PREFIX.index and PREFIX.data-i-of-n, or an Orbax folder (google-research/vmoe); a file of "
    source_help += "PyTorch (.pt); NAME.pth, of several ranks (Swin-MoE); with --ranks a file of this package"
    parser.add_argument("--from", dest="source", required=True, metavar="PATH", help=source_help)
    config_help = "a released name of google-research/vmoe, or a JSON file; other released models need none"
    parser.add_argument("--config", metavar="NAME_OR_JSON", help=config_help)
    parser.add_argument("--model", metavar="NAME", help="such as siglino_moe_0_3b, where a .pt fits several models")
    parser.add_argument("--to", dest="file", required=True, metavar="FILE", help="the .safetensors file to write")
    ranks_help = "write --to NAME.pth as NAME.pth.master and so many NAME.pth.rankN, for Swin-MoE on Tutel"
    parser.add_argument("--ranks", type=int, metavar="N", help=ranks_help)
    parser.add_argument("--step", type=int, help="of a training run's checkpoints; by default the last")
    parser.add_argument("--image_size", type=int, help="in pixels, if not the checkpoint's: positions are resized")
    parser.add_argument("--context_length", type=int, help="of a text tower without position embeddings")
    args = vars(parser.parse_args(argv))
    ranks, own = args.pop("ranks"), ("config", "model", "step", "image_size", "context_length")
    if ranks is None:
        return exit_code("vmoe-convert", lambda: run(**args))
    if ranks < 1 or any(args[name] is not None for name in own):
        parser.error("--ranks must be at least 1, and goes with --from and --to alone")
    return exit_code("vmoe-convert", lambda: run_back(args["source"], args["file"], ranks))


def run(file: str, **settings) -> None:
    """Converts, and says what was done; arguments as of `convert_checkpoint`."""
    check_output(file, ".safetensors")
    from vmoe.convert.to_safetensors import convert_checkpoint

    done = convert_checkpoint(file=file, **settings)
    skipped = f"; {done.skipped} others skipped (optimizer, step, ...)" if done.skipped else ""
    print(f"read     {done.arrays} arrays, {done.nbytes:,} bytes, from {done.source} ({done.format}){skipped}")
    print(f"wrote    {file}: {done.name}, {done.parameters:,} parameters")
    print(f'use it   model, _, transform = vmoe.create_model_and_transforms(pretrained="{file}")')


def run_back(source: str, target: str, ranks: int) -> None:
    """Writes a file of this package as the ranks of Tutel's; arguments as of `save_ranks`."""
    check_output(target, ".pth")
    from vmoe.convert.swin_moe import save_ranks

    written = save_ranks(source, target, ranks)
    print(f"wrote    {written[0]} and {ranks} files from {written[1]} on")
