"""Two steps of optimizers on whole weights and on sharded ones; started by test_optimizers.py."""

import json
import sys

import torch
import torch.distributed as dist
import torch.distributed.fsdp
import torch.multiprocessing as mp
from open_clip.loss import ClipLoss  # noqa: F401  imported before the processes are forked
from steps import batches, loss_of, make_model, whole

from vmoe.distributed.mesh import MeshSize, make_meshes
from vmoe.distributed.parallelize import parallelize, split_groups, synchronize_scalars
from vmoe.training.config import OptimConfig
from vmoe.training.optim import create_optimizer
from vmoe.training.optimizer_state import export_state

CPU = torch.device("cpu")


def trained(name: str, size: MeshSize | None, rank: int, world: int) -> dict[str, torch.Tensor]:
    """The weights after two steps, whole."""
    model = make_model("top_1").train()
    module = parallelize(model, make_meshes(size, CPU), CPU) if size else model
    # No epsilon small enough to make steps of rounding errors, as those of a key's bias, whose gradient is zero.
    eps = {"eps": 1e-3} if name not in ("lion", "sgd", "sgdw", "momentum", "nesterov") else {}
    optimizer = create_optimizer(model, OptimConfig(name=name, lr=1e-2, weight_decay=0.01, kwargs=eps))
    if size:
        split_groups(optimizer)
    for batch in batches("vmoe")[:2]:
        part = {key: tensor.tensor_split(world)[rank] for key, tensor in batch.items()}
        loss_of(module, part, None).backward()  # classification needs no criterion
        synchronize_scalars(model)
        optimizer.step()
        optimizer.zero_grad()
    export_state(optimizer, model)  # it can be saved
    return {key: whole(parameter) for key, parameter in model.named_parameters()}


def difference(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The largest norm of a weight's difference, over the norm of its way from the start."""
    start = {name: whole(parameter) for name, parameter in make_model("top_1").named_parameters()}
    return max(
        ((found[name] - expected[name]).norm() / (expected[name] - start[name]).norm().clamp(min=1e-6)).item()
        for name in expected
        if not name.endswith("qkv.bias")  # of which the keys' third has no gradient
    )


def process(rank: int, names: list[str], folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/join", rank=rank, world_size=2)
    found = {}
    for name in names:
        expected = torch.load(f"{folder}/{name}.pt")
        meshes = (MeshSize(1, 2, 1), MeshSize(1, 1, 2))
        found[name] = max(difference(trained(name, size, rank, 2), expected) for size in meshes)
    if rank == 0:
        with open(f"{folder}/differences.json", "w") as file:
            json.dump(found, file)
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    """Arguments: a folder, and a JSON list of names."""
    folder, names = sys.argv[1], json.loads(sys.argv[2])
    torch.set_num_threads(1)
    for name in names:
        torch.save(trained(name, None, 0, 1), f"{folder}/{name}.pt")
    mp.start_processes(process, (names, folder), nprocs=2, start_method="fork")


if __name__ == "__main__":
    main()
