"""Our zero-shot and retrieval metrics beside those of LAION's CLIP_benchmark, by its own code, on the same data.

    vmoe-clip-benchmark --config emoji_zero_shot --checkpoint RUN

takes the settings of eval.py for the tasks zero_shot and retrieval. Data whose images have several right labels or
stand under several conditions, and `loader.on_bad: skip`, are refused, since CLIP_benchmark counts these otherwise.

    vmoe-clip-benchmark cli eval --model_type vmoe --model vmoe --pretrained RUN --dataset cifar10 --no_amp

is CLIP_benchmark's own command (without `cli`), which then also knows this package's checkpoints.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from vmoe.cli.command import exit_code
from vmoe.evaluation.config import EvaluationConfig
from vmoe.utils.config import parse_config
from vmoe.utils.paths import check_checkpoint
from vmoe.utils.tables import MetricTable, make_console


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code, see `exit_code`; 3: a metric differs by more than 1e-6, or is NaN."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["cli"]:
        return exit_code("vmoe-clip-benchmark", lambda: run_theirs(argv[1:]))
    description = "Compare zero-shot and retrieval metrics with those of CLIP_benchmark."
    config = parse_config(EvaluationConfig, argv, "vmoe-clip-benchmark", description, folder="eval")
    differ: list[bool] = []
    return exit_code("vmoe-clip-benchmark", lambda: differ.append(not run(config))) or 3 * differ[0]


def run_theirs(argv: Sequence[str]) -> None:
    """CLIP_benchmark's own command."""
    from vmoe.evaluation.clip_benchmark import their_command

    their_command(argv)


def run(config: EvaluationConfig) -> bool:
    """Prints the metrics of both; returns whether all agree."""
    for checkpoint in config.checkpoints:
        check_checkpoint(checkpoint)
    from vmoe.evaluation import clip_benchmark

    console = make_console()
    rows = clip_benchmark.compare(config, console)
    header = ["measure", "vmoe", "CLIP_benchmark", "difference"]
    table = MetricTable(f"{config.task} of {config.checkpoint}", header, left=["measure"])
    for name, ours, theirs in rows:
        table.add_row(name, f"{ours:.6f}", f"{theirs:.6f}", f"{abs(ours - theirs):.1e}")
    console.print(table)
    return clip_benchmark.agree(rows)
