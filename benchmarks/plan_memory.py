"""Memory that the planner predicts beside the measured peak of real training steps, of one process on a CPU.

    python benchmarks/plan_memory.py

Each model trains two steps under PyTorch's profiler, whose CPU allocator reports every tensor that is allocated and
freed; the peak is the largest sum. This measures what tensors ask for: no fragmentation, no workspace that a kernel
takes elsewhere (oneDNN), no memory of the interpreter.

Sharded runs are the first process of several, and the others are not there: PyTorch's fake process group answers for
them at once, with tensors of the right size and any content.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.distributed.fake_pg import FakeStore

import vmoe
from vmoe.cli.plan import PlanConfig
from vmoe.distributed.mesh import MeshSize, make_meshes
from vmoe.distributed.parallelize import parallelize, split_groups
from vmoe.evaluation.inference import arithmetic
from vmoe.models.factory import create_model, is_contrastive, preprocess_config
from vmoe.planning.hardware import HARDWARE
from vmoe.planning.planner import Candidate, Planner
from vmoe.planning.simulate import task_loss
from vmoe.training.optim import create_optimizer
from vmoe.utils.config import read_config
from vmoe.utils.tables import MetricTable, make_console

MiB = 2**20
ALONE = MeshSize(1)


def classifier(name: str, batch: int, *options: str) -> tuple[str, ...]:
    """Options of a classification run with 1,000 classes."""
    model = ("--model.name", name, "--model.kwargs.num_classes", "1000")
    return ("--task", "classification", *model, *options, "--data.loader.batch_size", str(batch))


def pairs(name: str, batch: int, *options: str) -> tuple[str, ...]:
    """Options of a contrastive run."""
    return ("--task", "contrastive", "--model.name", name, *options, "--data.loader.batch_size", str(batch))


CHECKPOINTING = ("--train.grad_checkpointing", "true")
# With a capacity a GPU keeps buffers of full size whatever is dropped, a CPU only the rows that are used.
EXPERTS_64 = ("--model.kwargs.num_experts", "64")
SGD_AND_EMA = ("--optim.name", "sgd", "--train.ema_decay", "0.99")
DROPLESS = ("--model.kwargs.capacity_factor", ".inf")
FOUR_PARTS = ("--train.accumulate_steps", "4")
# A capacity that drops nearly nothing. With experts sharded over processes rows then travel in buffers of a fixed size;
# without a capacity the processes tell each other their numbers of rows, and those that are not there say none.
TWICE_EVEN = ("--model.kwargs.capacity_factor", "2.0")
SMALL, TINY = "vmoe_small_patch32_224", "vmoe_tiny_patch8_48"
EIGHT_SHARDS = MeshSize(1, 8, 1)
CASES: list[tuple[str, tuple[str, ...], MeshSize]] = [
    ("V-MoE S/32, weights", classifier(SMALL, 2, *DROPLESS), ALONE),
    ("V-MoE S/32, activations", classifier(SMALL, 64, *DROPLESS), ALONE),
    ("V-MoE S/32, checkpointed", classifier(SMALL, 64, *DROPLESS, *CHECKPOINTING), ALONE),
    ("V-MoE S/32, capacity 1.05", classifier(SMALL, 64), ALONE),
    ("V-MoE tiny, activations", classifier(TINY, 128, *DROPLESS), ALONE),
    ("V-MoE tiny, checkpointed", classifier(TINY, 128, *DROPLESS, *CHECKPOINTING), ALONE),
    ("V-MoE tiny, SGD and EMA", classifier(TINY, 8, *DROPLESS, *SGD_AND_EMA), ALONE),
    ("LIMoE tiny, weights", pairs("limoe_tiny_patch12_48", 4, *DROPLESS), ALONE),
    ("LIMoE tiny, activations", pairs("limoe_tiny_patch12_48", 256, *DROPLESS), ALONE),
    ("LIMoE tiny, checkpointed", pairs("limoe_tiny_patch12_48", 256, *DROPLESS, *CHECKPOINTING), ALONE),
    ("Soft MoE tiny, activations", classifier("softmoe_tiny_patch8_48", 64), ALONE),
    *((f"V-MoE tiny, {mesh}", classifier(TINY, 16 * mesh.world, *capacity), mesh) for mesh, capacity in (
        (EIGHT_SHARDS, DROPLESS),
        (MeshSize(1, 32, 1), DROPLESS),
        (MeshSize(1, 1, 8), TWICE_EVEN),
        (MeshSize(1, 2, 4), TWICE_EVEN),
    )),
    ("64 experts, ep 8", classifier(TINY, 16, *TWICE_EVEN, *EXPERTS_64), MeshSize(1, 1, 8)),
    ("64 experts, dp_shard 8", classifier(TINY, 16, *DROPLESS, *EXPERTS_64), EIGHT_SHARDS),
    ("the same, 4 parts a step", classifier(TINY, 16, *DROPLESS, *EXPERTS_64, *FOUR_PARTS), EIGHT_SHARDS),
]  # fmt: skip


def read(options: tuple[str, ...]) -> PlanConfig:
    """The config of some options; on one process with a CPU's numbers."""
    return read_config(PlanConfig, ["--output_dir", "unused", "--gpu", "cpu", "--gpus_per_node", "1", *options])


def plan(config: PlanConfig, mesh: MeshSize = ALONE) -> Candidate:
    """What the planner says."""
    planner = Planner(config, HARDWARE["cpu"], nodes=1, gpus_per_node=mesh.world)
    return planner.candidate(mesh, config.train.grad_checkpointing)


def build(config: PlanConfig, mesh: MeshSize = ALONE) -> tuple[nn.Module, ModelEmaV3 | None, Optimizer]:
    """(model, its average, optimizer) as `vmoe.training.trainer` makes them; of several processes the first one's."""
    model = create_model(config.model.name, **config.model.kwargs).train()
    model.set_grad_checkpointing(config.train.grad_checkpointing)
    if mesh.world > 1:
        device = torch.device("cpu")
        parallelize(model, make_meshes(mesh, device), device)
    ema = None if config.train.ema_decay is None else ModelEmaV3(model, config.train.ema_decay)
    optimizer = create_optimizer(model, config.optim)
    split_groups(optimizer)
    return model, ema, optimizer


def train(
    config: PlanConfig, mesh: MeshSize, model: nn.Module, ema: ModelEmaV3 | None, optimizer: Optimizer, steps: int = 2
) -> None:
    """Some steps as in `vmoe.training.trainer`, on random images and texts."""
    size = config.data.loader.batch_size // mesh.world
    for _ in range(steps):
        batches = [_batch(model, size) for _ in range(config.train.accumulate_steps)]
        for batch in batches:
            with vmoe.record_routing(model) as record, arithmetic(config.train.precision, "cpu"):
                output = model(*batch)
                loss = task_loss(output, config.train.loss, mesh.world)
            (loss + record.auxiliary_loss()).backward()
            del output, loss, record
        optimizer.step()
        optimizer.zero_grad()
        if ema is not None:
            ema.update(model)


def held(model: nn.Module) -> int:
    """Bytes of the weights and buffers that this process holds."""
    tensors = [tensor.detach() for tensor in (*model.parameters(), *model.buffers())]
    return sum(getattr(tensor, "_local_tensor", tensor).nbytes for tensor in tensors)


def _batch(model: nn.Module, size: int) -> list[Tensor]:
    batch = [torch.randn(size, *preprocess_config(model)["input_size"])]
    if is_contrastive(model):
        batch.append(torch.full((size, model.context_length), model.eot_token_id))
        batch[1][:, :-1] = 1  # all text tokens
    return batch


def measure(config: PlanConfig, mesh: MeshSize = ALONE) -> int:
    """Largest number of bytes that tensors had at a time during `train`.

    Not before: to share out a sharded model, the first process has it whole in the memory of its CPU, which on this
    device is the same.
    """
    if mesh.world > 1:
        dist.init_process_group("fake", rank=0, world_size=mesh.world, store=FakeStore())
    try:
        model, ema, optimizer = build(config, mesh)
        before = held(model) + (0 if ema is None else held(ema.module))
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            train(config, mesh, model, ema, optimizer)
    finally:
        if mesh.world > 1:
            dist.destroy_process_group()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    total = peak = before
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return peak


def main() -> None:
    header = ["run", "planned", "measured", "planned / measured", "most of it"]
    table = MetricTable("Peak memory of one process, MiB", header, left=("run", "most of it"))
    for title, options, mesh in CASES:
        config = read(options)
        planned, measured = plan(config, mesh), measure(config, mesh)
        kind = max(planned.memory, key=planned.memory.__getitem__)
        sizes = (f"{planned.total / MiB:,.1f}", f"{measured / MiB:,.1f}", f"{planned.total / measured:.3f}")
        table.add_row(title, *sizes, f"{kind} ({planned.memory[kind] / planned.total:.0%})")
    make_console().print(table)


if __name__ == "__main__":
    main()
