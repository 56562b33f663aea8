"""The planning command (`vmoe-plan`, `vmoe-plan`): which mesh of processes suits a training config.

It reads neither data nor weights and starts no processes; the model is built on the meta device.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from vmoe.cli.command import exit_code
from vmoe.planning.candidates import Planner, rank
from vmoe.planning.hardware import pick_hardware
from vmoe.planning.model_plan import make_subject
from vmoe.planning.plan_report import as_json, show
from vmoe.training.config import Config
from vmoe.utils.atomic import whole_file
from vmoe.utils.config import ConfigError, parse_config
from vmoe.utils.printable import safe_output
from vmoe.utils.tables import make_console


@dataclass
class HardwareConfig:
    """Numbers in place of those of --gpu; null: its own.

    Attributes:
        memory: GiB of one GPU, as nvidia-smi shows it.
        half_tflops: Peak of bf16 products, 10^12 operations per second.
        float32_tflops: Peak of float32 products.
        memory_bandwidth: GB/s of its memory.
        node_bandwidth: GB/s to the other GPUs of its machine, in one direction.
        network_bandwidth: GB/s to other machines, in one direction.
        reserve: Share of the memory to leave for fragmentation, CUDA and NCCL.
        product_efficiency: Share of the peak that products reach.
        memory_efficiency: Share of the memory's bandwidth that is reached.
        link_efficiency: Share of the links' bandwidth that is reached.
        launch: Microseconds that any operation takes at least.
        latency: Microseconds that any collective takes at least.
    """

    memory: float | None = None
    half_tflops: float | None = None
    float32_tflops: float | None = None
    memory_bandwidth: float | None = None
    node_bandwidth: float | None = None
    network_bandwidth: float | None = None
    reserve: float | None = None
    product_efficiency: float | None = None
    memory_efficiency: float | None = None
    link_efficiency: float | None = None
    launch: float | None = None
    latency: float | None = None


@dataclass
class PlanConfig(Config):
    """A training config, and the machines to plan it for.

    The settings of `vmoe-train` are all here, so that its config files and options serve. `parallel` and
    `train.grad_checkpointing` are what the plan finds, so their values do not matter.

    Attributes:
        nodes: Machines.
        gpus_per_node: GPUs (processes) of each machine.
        gpu: a100, h100, h200, b200, l40s, or cpu.
        hardware: Numbers in place of those of gpu.
        top: Candidates to show.
        output: File for the whole plan as JSON; null: none.
    """

    nodes: int = 1
    gpus_per_node: int = 8
    gpu: str = "h100"
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    top: int = 8
    output: str | None = None


@safe_output()
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code: 0, 1 for an error, 2 for a wrong setting, 130 for Ctrl-C.

    An error is one sentence; set VMOE_TRACEBACK=1 to see where it comes from.
    """
    return exit_code("vmoe-plan", lambda: run(argv))


def run(argv: Sequence[str] | None = None) -> None:
    """Plans a config and prints the result.

    Raises:
        ConfigError: a setting is out of range or does not suit another one.
    """
    config = parse_config(
        PlanConfig,
        argv,
        prog="vmoe-plan",
        description="Memory and time of a training config for each mesh of processes, best first.",
    )
    config.check()
    for name in ("nodes", "gpus_per_node", "top"):
        if getattr(config, name) < 1:
            raise ConfigError(f"{name} must be >= 1, got {getattr(config, name)}")
    output = None if config.output is None else Path(config.output)
    if output is not None and (output.is_dir() or not output.absolute().parent.is_dir()):
        raise ConfigError(f"output {output} is a folder, or lies in none; give the path of a file")
    hardware = pick_hardware(config.gpu, asdict(config.hardware))
    planner = Planner(config, make_subject(config), hardware, config.nodes, config.gpus_per_node)
    meshes, refused = planner.meshes()
    ranked = rank([planner.candidate(mesh, checkpointing) for mesh in meshes for checkpointing in (False, True)])
    show(make_console(), planner, ranked, refused, config.top)
    if output is not None:
        with whole_file(output) as draft:
            draft.write_text(json.dumps(as_json(planner, ranked, refused), indent=2) + "\n", encoding="utf-8")
        print(f"the whole plan is in {output}")


if __name__ == "__main__":
    sys.exit(main())
