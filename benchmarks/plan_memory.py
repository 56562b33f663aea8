"""Memory that the planner predicts beside the measured peak of real training steps, on one process and a CPU.

    python benchmarks/plan_memory.py

Each model trains two steps under PyTorch's profiler, whose CPU allocator reports every tensor that is allocated and
freed; the peak is the largest sum. This measures what tensors ask for: no fragmentation, no workspace that a kernel
takes elsewhere (oneDNN), no memory of the interpreter.
"""

from __future__ import annotations

import dataclasses

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.profiler import ProfilerActivity, profile

import vmoe
from vmoe.config_io import read_config
from vmoe.evaluation.inference import arithmetic
from vmoe.models.factory import create_model, is_contrastive, preprocess_config
from vmoe.plan import PlanConfig
from vmoe.planning.candidates import Candidate, Planner
from vmoe.planning.hardware import HARDWARE
from vmoe.planning.simulate import task_loss
from vmoe.planning.subject import make_subject
from vmoe.training.optim import create_optimizer

MiB = 2**20


@dataclasses.dataclass(frozen=True)
class Case:
    """A run to compare.

    Attributes:
        title: what is large in it.
        options: of the plan.
    """

    title: str
    options: tuple[str, ...]


def classifier(name: str, batch: int, *options: str) -> tuple[str, ...]:
    """Options of a classification run with 1,000 classes."""
    model = ("--model.name", name, "--model.kwargs.num_classes", "1000")
    return ("--task", "classification", *model, *options, "--data.loader.batch_size", str(batch))


def pairs(name: str, batch: int, *options: str) -> tuple[str, ...]:
    """Options of a contrastive run."""
    return ("--task", "contrastive", "--model.name", name, *options, "--data.loader.batch_size", str(batch))


CHECKPOINTING = ("--train.grad_checkpointing", "true")
# Nothing is dropped: a GPU keeps buffers of full size whatever is dropped, a CPU only the rows that are used.
SGD_AND_EMA = ("--optim.name", "sgd", "--train.ema_decay", "0.99")
DROPLESS = ("--model.kwargs.capacity_factor", ".inf")
CASES = [
    Case("V-MoE S/32, weights", classifier("vmoe_small_patch32_224", 2, *DROPLESS)),
    Case("V-MoE S/32, activations", classifier("vmoe_small_patch32_224", 64, *DROPLESS)),
    Case("V-MoE S/32, checkpointed", classifier("vmoe_small_patch32_224", 64, *DROPLESS, *CHECKPOINTING)),
    Case("V-MoE S/32, capacity 1.05", classifier("vmoe_small_patch32_224", 64)),
    Case("V-MoE tiny, activations", classifier("vmoe_tiny_patch8_48", 128, *DROPLESS)),
    Case("V-MoE tiny, checkpointed", classifier("vmoe_tiny_patch8_48", 128, *DROPLESS, *CHECKPOINTING)),
    Case("V-MoE tiny, SGD and EMA", classifier("vmoe_tiny_patch8_48", 8, *DROPLESS, *SGD_AND_EMA)),
    Case("LIMoE tiny, weights", pairs("limoe_tiny_patch12_48", 4, *DROPLESS)),
    Case("LIMoE tiny, activations", pairs("limoe_tiny_patch12_48", 256, *DROPLESS)),
    Case("LIMoE tiny, checkpointed", pairs("limoe_tiny_patch12_48", 256, *DROPLESS, *CHECKPOINTING)),
    Case("Soft MoE tiny, activations", classifier("softmoe_tiny_patch8_48", 64)),
]


def read(options: tuple[str, ...]) -> PlanConfig:
    """The config of some options; on one process with a CPU's numbers."""
    return read_config(PlanConfig, ["--output_dir", "unused", "--gpu", "cpu", "--gpus_per_node", "1", *options])


def plan(config: PlanConfig) -> Candidate:
    """What the planner says."""
    planner = Planner(config, make_subject(config), HARDWARE["cpu"], nodes=1, gpus_per_node=1)
    (mesh,), _ = planner.meshes()  # one process has one
    return planner.candidate(mesh, config.train.grad_checkpointing)


def train(config: PlanConfig, steps: int = 2) -> nn.Module:
    """Some steps as in `vmoe.training.loop`, on random pictures and texts."""
    from timm.utils import ModelEmaV3

    model = create_model(config.model.name, **config.model.kwargs).train()
    model.set_grad_checkpointing(config.train.grad_checkpointing)
    ema = None if config.train.ema_decay is None else ModelEmaV3(model, config.train.ema_decay)
    optimizer = create_optimizer(model, config.optim)
    size = config.data.loader.batch_size
    for _ in range(steps):
        batch = [torch.randn(size, *preprocess_config(model)["input_size"])]
        if is_contrastive(model):
            batch.append(torch.full((size, model.context_length), model.eot_token_id))
            batch[1][:, :-1] = 1  # all of it words
        with vmoe.record_routing(model) as record, arithmetic(config.train.precision, "cpu"):
            output = model(*batch)
            loss = task_loss(output, config.train.loss)
        (loss + record.auxiliary_loss()).backward()
        del output
        optimizer.step()
        optimizer.zero_grad()
        if ema is not None:
            ema.update(model)
    return model


def measure(config: PlanConfig) -> int:
    """Largest number of bytes that tensors of `train` had at a time."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        train(config)
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    total = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return peak


def main() -> None:
    table = Table(title="Peak memory of one process, MiB")
    for name in ("run", "planned", "measured", "planned / measured", "most of it"):
        table.add_column(name, justify="left" if name in ("run", "most of it") else "right")
    for case in CASES:
        config = read(case.options)
        planned, measured = plan(config), measure(config)
        kind = max(planned.memory, key=planned.memory.__getitem__)
        table.add_row(
            case.title,
            f"{planned.total / MiB:,.1f}",
            f"{measured / MiB:,.1f}",
            f"{planned.total / measured:.3f}",
            f"{kind} ({planned.memory[kind] / planned.total:.0%})",
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
