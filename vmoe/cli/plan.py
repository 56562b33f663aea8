"""The planning command (`vmoe-plan`): which mesh of processes suits a training config, whose model stays on meta."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vmoe.cli.command import exit_code
from vmoe.planning.hardware import pick_hardware
from vmoe.training.config import Config
from vmoe.utils.config import ConfigError, parse_config
from vmoe.utils.paths import check_output
from vmoe.utils.tables import make_console


@dataclass
class PlanConfig(Config):
    """A training config, and the machines to plan it for.

    All settings of `vmoe-train` are accepted; the values of `parallel` and `train.grad_checkpointing` do not matter.

    Attributes:
        nodes: Machines.
        gpus_per_node: GPUs (processes) of each machine.
        gpu: a100, h100, h200, b200, l40s, or cpu.
        hardware: Numbers instead of those of gpu. GiB: memory; 10^12 operations per second: half_tflops,
            float32_tflops; GB/s in one direction: memory_bandwidth, node_bandwidth, network_bandwidth.
        top: Candidates to show.
        output: .json file for the whole plan; null: none.
    """

    nodes: int = 1
    gpus_per_node: int = 8
    gpu: str = "h100"
    hardware: dict[str, Any] = field(default_factory=dict)
    top: int = 8
    output: str | None = None


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code, see `exit_code`."""
    return exit_code("vmoe-plan", lambda: run(argv))


def run(argv: Sequence[str] | None = None) -> None:
    """Plans a config and prints the result. ConfigError: a setting is out of range or does not suit another one."""
    description = "Memory and time of a training config for each mesh of processes, best first."
    config = parse_config(PlanConfig, argv, prog="vmoe-plan", description=description)
    config.check()
    for name in ("nodes", "gpus_per_node", "top"):
        if getattr(config, name) < 1:
            raise ConfigError(f"{name} must be >= 1, got {getattr(config, name)}")
    if config.output is not None:
        check_output(config.output, ".json")
    hardware = pick_hardware(config.gpu, config.hardware)
    from vmoe.evaluation.results_file import write_json
    from vmoe.planning.plan_report import as_json, show
    from vmoe.planning.planner import Planner, rank

    planner = Planner(config, hardware, config.nodes, config.gpus_per_node)
    meshes, impossible = planner.meshes()
    ranked = rank([planner.candidate(mesh, checkpointing) for checkpointing in (False, True) for mesh in meshes])
    show(make_console(), planner, ranked, impossible, config.top)
    if config.output is not None:
        write_json(as_json(planner, ranked, impossible), Path(config.output))
        print(f"the whole plan is in {config.output}")
