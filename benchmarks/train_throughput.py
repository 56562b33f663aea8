"""Training of configs/limoe_tiny_emoji.yaml with this checkout and with another one, in turn.

`python -m benchmarks.train_throughput --against DIR`, where DIR is a checkout of an earlier commit, made for example by
`git worktree add DIR COMMIT`. Each round trains a few steps in a fresh process of either checkout, with its own
`train.py` and config and the round's number as the seed. Compared are the medians of the steps' times after the first
five, as `metrics.jsonl` tells them (data, forward, backward and optimizer; not the log, evaluation and checkpoints).
With `--steps 300`, a whole run, the final accuracies can be compared as well.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import yaml

from benchmarks.measure import milliseconds, ratios, spread
from benchmarks.session import RESULTS, ROOT, Session

CONFIG = Path("configs") / "limoe_tiny_emoji.yaml"
WARM_UP = 5


def run(words: Sequence[str], checkout: Path) -> str:
    """What Python prints when it runs in a checkout and imports its package.

    Raises:
        RuntimeError: it failed.
    """
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    done = subprocess.run([sys.executable, *words], cwd=checkout, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)} failed in {checkout}:\n{(done.stderr or done.stdout)[-2000:]}")
    return done.stdout


def train(checkout: Path, steps: int, seed: int, threads: int | None) -> tuple[float, dict]:
    """(median seconds of a step after the warm-up, summary.json) of a run that is deleted afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            **{"seed": seed, "device": "cpu", "output_dir": folder, "evaluate.examples": 0},
            **{"train.steps": steps, "train.eval_every": steps, "train.checkpoint_every": steps},
            **{"train.log_every": 1, "train.tensorboard": "false", "train.num_threads": threads or "null"},
        }
        run(
            ["train.py", "--config", str(CONFIG), *(w for k, v in settings.items() for w in (f"--{k}", str(v)))],
            checkout,
        )
        entries = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
        seconds = [1 / e["images_per_second"] for e in entries if "images_per_second" in e and e["step"] > WARM_UP]
        summary = json.loads((Path(folder) / "summary.json").read_text())
    summary["batch"] = yaml.safe_load((checkout / CONFIG).read_text(encoding="utf-8"))["data"]["loader"]["batch_size"]
    return statistics.median(seconds) * summary["batch"], summary


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """One sentence for what cannot be compared."""
    if args.steps <= WARM_UP:
        parser.error(f"--steps must be more than {WARM_UP}, which are not counted, got {args.steps}")
    if not (args.against / "train.py").is_file() or not (args.against / CONFIG).is_file():
        parser.error(f"--against {args.against} has no train.py and {CONFIG}: name the root of a checkout")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_throughput", description=__doc__.splitlines()[0])
    parser.add_argument("--against", type=Path, required=True, metavar="DIR", help="root of the other checkout")
    parser.add_argument("--steps", type=int, default=20, help="of each run (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each checkout (%(default)s)")
    parser.add_argument("--threads", type=int, help="of PyTorch; default: its own choice")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    parser.set_defaults(device="cpu", compile=None, allocator="keep")  # as train.py sets it
    session = Session("train_throughput", parser, argv)
    args = session.args
    check(parser, args)
    checkouts = {"before": args.against.resolve(), "now": ROOT}
    for checkout in checkouts.values():
        package = Path(run(["-c", "import vmoe; print(vmoe.__file__)"], checkout).strip())
        if not package.resolve().is_relative_to(checkout):
            parser.error(f"Python in {checkout} imports another vmoe, {package}: uninstall it")
    seconds, summaries = {name: [] for name in checkouts}, {name: [] for name in checkouts}
    for number in range(args.rounds):
        for name, checkout in checkouts.items():
            own, summary = train(checkout, args.steps, number, args.threads)
            seconds[name].append(own)
            summaries[name].append(summary)
            print(f"round {number}, {name}: {1e3 * own:.1f} ms, top-1 {summary['evaluation']['top1']:.4f}", flush=True)
    for name, own in seconds.items():
        precisions, batches = ({s[word] for s in summaries[name]} for word in ("precision", "batch"))
        session.add(
            {
                **{"comparison": "limoe_tiny_emoji", "name": name, "dtype": ", ".join(precisions), "pass": "step"},
                **{"batch": max(batches), "steps": args.steps, "ms": milliseconds(own)},
                "images_per_second": spread([max(batches) / value for value in own]),
                "speed_ratio": ratios(seconds["before"], own),
                "ratios": {} if name == "before" else {"before": ratios(own, seconds["before"])},
                "top1": spread([summary["evaluation"]["top1"] for summary in summaries[name]]),
            }
        )
    git = ["git", "-C", str(args.against), "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    session.note(f'"before" is {f"commit {commit[:10]}" if commit else "a checkout without git"}.')
    if (args.against / CONFIG).read_text() != (ROOT / CONFIG).read_text():
        session.note(f"The two checkouts differ in {CONFIG}; each was trained with its own.")
    session.finish()


if __name__ == "__main__":
    main()
