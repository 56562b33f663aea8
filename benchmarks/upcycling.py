"""A dense LIMoE made sparse and trained on, against the dense one trained on: `python -m benchmarks.upcycling --help`.

On the emoji pairs, on a CPU, with the code and the configs of `train.py`: limoe_tiny_emoji_dense for N steps; from its
last checkpoint limoe_tiny_emoji_upcycled and limoe_tiny_emoji_dense_longer for N/2 steps more, with the same schedule,
data order and optimizer state. A run that is there already is not made again.
"""

import argparse
import statistics
from pathlib import Path

from vmoe.training.config import Config
from vmoe.training.trainer import train
from vmoe.utils.allocator import keep_freed_memory
from vmoe.utils.config import read_config

RUNS = {
    "dense, N steps": "limoe_tiny_emoji_dense",
    "dense, N/2 more": "limoe_tiny_emoji_dense_longer",
    "upcycled, N/2 more": "limoe_tiny_emoji_upcycled",
}


def run(name: str, seed: int, steps: int, folder: Path, overrides: list[str]) -> dict:
    """The summary of one run."""
    arguments = ["--config", name, "--seed", str(seed), "--output_dir", str(folder / f"seed{seed}" / name)]
    first = RUNS["dense, N steps"]
    if name != first:
        steps //= 2
        arguments += ["--model.pretrained", str(folder / f"seed{seed}" / first)]
    config = read_config(
        Config, [*arguments, "--train.steps", str(steps), "--train.eval_every", str(steps), *overrides]
    )
    return train(config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=300, help="N")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/upcycling"))
    parser.add_argument("--set", nargs="*", default=[], help="settings of all runs, such as optim.lr=0.001")
    parser.add_argument("--set_upcycled", nargs="*", default=[], help="such as model.upcycle.reinit=0.5")
    args = parser.parse_args()
    keep_freed_memory()
    common = ["evaluate.examples=0", "train.tensorboard=false", *args.set]
    lines = []
    for label, name in RUNS.items():
        own = args.set_upcycled if "upcycled" in label else []
        overrides = [f"--{setting}" for setting in (*common, *own)]
        summaries = [run(name, seed, args.steps, args.output_dir, overrides) for seed in args.seeds]
        cells = [label]
        for figure in ("top1", "top5", "loss"):
            values = [summary["evaluation"].get(figure, summary.get(figure)) for summary in summaries]
            cells.append(f"{statistics.mean(values):.3f} ({', '.join(f'{value:.3f}' for value in values)})")
        parameters = [summaries[0][f"parameters_{kind}"] / 1e6 for kind in ("total", "active")]
        cells += [f"{parameters[0]:.1f} M / {parameters[1]:.1f} M"]
        lines.append(f"| {' | '.join(cells)} |")
    print(f"\nN = {args.steps}, seeds {args.seeds}; zero-shot accuracy on emoji compositions never seen\n")
    print("| run | top-1 | top-5 | training loss | parameters, total / active |\n| --- | --- | --- | --- | --- |")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
