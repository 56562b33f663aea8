"""Checkpoints of 4 processes on several meshes; run by test_checkpoint_sharded.py, which looks at what it found.

The processes are forked from one that has imported all it needs, because importing is what takes the time.
"""

import errno
import json
import logging
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import vmoe
from vmoe.distributed.mesh import MeshSize, make_meshes
from vmoe.distributed.parallelize import parallelize, split_groups
from vmoe.models import manifest
from vmoe.models.factory import create_model
from vmoe.models.manifest import find_problems, list_checkpoints
from vmoe.models.serialization import find_weights
from vmoe.training.checkpoint import Checkpointer, CheckpointError, latest_checkpoint, load_checkpoint

WORLD = 4
# Widths that do not divide evenly, and parameters of which some processes have no part.
SETTINGS = {
    "img_size": 16,
    "patch_size": 8,
    "width": 12,
    "depth": 1,
    "moe_layers": "every1",
    "num_heads": 2,
    "embed_dim": 6,
    "context_length": 6,
    "vocab_size": 33,
    "eot_token_id": 31,
    "num_experts": 4,
}
MESHES = {
    "2 copies, ep 2": MeshSize(2, 1, 2),
    "ep 4": MeshSize(1, 1, 4),
    "fsdp 2, ep 2": MeshSize(1, 2, 2),
    "ddp": MeshSize(4, 1, 1),
}


def make_model(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    return create_model("limoe_tiny_patch8_48", **SETTINGS)


def sharded(size: MeshSize, seed: int, optimizer=torch.optim.AdamW):
    """(model, average, optimizer) on a mesh, with other numbers in each mesh."""
    meshes = make_meshes(size, torch.device("cpu"))
    model, ema = make_model(seed), make_model(seed + 100)
    for each in (model, ema):
        parallelize(each, meshes, torch.device("cpu"))
    # Two groups, and split_groups makes more of them.
    parameters = list(model.parameters())
    groups = [{"params": parameters[:7], "weight_decay": 0.0}, {"params": parameters[7:], "weight_decay": 0.5}]
    optimizer = optimizer(groups, lr=0.25)
    split_groups(optimizer)
    return model, ema, optimizer


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def everything(model, ema, optimizer) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, whole."""
    found = {f"model {name}": whole(tensor).clone() for name, tensor in model.state_dict().items()}
    found |= {f"ema {name}": whole(tensor).clone() for name, tensor in ema.state_dict().items()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            found[f"{key} {name}"] = whole(value).clone()
    for group in optimizer.param_groups:
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        for parameter in group["params"]:
            found[f"settings {names[id(parameter)]}"] = torch.tensor([group["lr"], group["weight_decay"]])
    return found


def same(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first
    )


def files(folder: Path) -> list[str]:
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())


def error_of(action) -> str:
    try:
        action()
    except CheckpointError as error:
        return str(error)
    return ""


def process(rank: int, root: Path, reference: dict) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{root}/store", rank=rank, world_size=WORLD)
    results = {"loads": {}, "files": {}}

    # Each mesh continues what the one before wrote.
    before = root / "one process" / "checkpoints" / "step_000001"
    for number, (name, size) in enumerate(MESHES.items()):
        model, ema, optimizer = sharded(size, number + 1)
        trainer = load_checkpoint(before, model, ema, optimizer)
        results["loads"][name] = trainer == {"position": 0.1} and same(everything(model, ema, optimizer), reference)
        checkpointer = Checkpointer(root / name, 2, asynchronous=number % 2 == 1)
        before = checkpointer.save(1, model, ema, optimizer, trainer, {"class_names": ["a"]})
        if checkpointer._thread is not None:  # what is written must be the state at the moment of the call
            with torch.no_grad():
                for tensor in (*model.parameters(), *ema.parameters(), optimizer.param_groups[0]["params"][0]):
                    tensor.add_(1)
                next(iter(optimizer.state.values()))["exp_avg"].add_(1)
        checkpointer.wait()
        results["files"][name] = files(before)

    # An optimizer without tensors, as SGD without momentum is after a step.
    run = root / "sgd"
    model, ema, optimizer = sharded(MESHES["ep 4"], 0, torch.optim.SGD)
    for parameter in model.parameters():
        optimizer.state[parameter]["momentum_buffer"] = None
    folder = Checkpointer(run, 2).save(1, model, None, optimizer, {}, {})
    wanted = {name: whole(tensor).clone() for name, tensor in model.state_dict().items()}
    model, ema, optimizer = sharded(MESHES["ep 4"], 9, torch.optim.SGD)
    load_checkpoint(folder, model, None, optimizer)
    assert list(optimizer.state.values()) == [{"momentum_buffer": None}] * len(list(model.parameters()))
    results["sgd"] = same({name: whole(tensor) for name, tensor in model.state_dict().items()}, wanted)

    # Damage: all processes must come to the same answer.
    damaged = Checkpointer(run, 2).save(2, model, None, optimizer, {}, {})
    shard = sorted(damaged.glob("model/shard-*"))[-1]
    dist.barrier()
    if rank == 0:
        content = bytearray(shard.read_bytes())
        content[-1] ^= 1
        shard.write_bytes(content)
    dist.barrier()
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("vmoe.training").addHandler(handler)
    results["latest"] = latest_checkpoint(run).name
    results["warnings"] = lines
    results["damaged"] = error_of(lambda: load_checkpoint(damaged, model, None, None))

    # One process cannot write.
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for key, owner, function in (("full in torch", os, "fsync"), ("full in ours", manifest, "describe_files")):
        real = getattr(owner, function)
        if rank == 2:
            setattr(owner, function, full)
        checkpointer = Checkpointer(run, 2, asynchronous=True)
        checkpointer.save(3, model, None, optimizer, {}, {})
        results[key] = error_of(checkpointer.wait)
        setattr(owner, function, real)
    parameter = next(each for each in model.parameters() if hasattr(each, "full_tensor"))
    optimizer.state[parameter]["rows"] = torch.zeros(3)
    results["rows"] = error_of(lambda: Checkpointer(run, 2).save(4, model, None, optimizer, {}, {}))
    results["left"] = sorted(folder.name for folder in (run / "checkpoints").iterdir())

    everyone = [None] * WORLD
    dist.all_gather_object(everyone, results)
    if rank == 0:
        (root / "processes.json").write_text(json.dumps(everyone))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    """Argument: an empty folder; leaves processes.json and alone.json in it."""
    root = Path(sys.argv[1])
    torch.set_num_threads(1)
    model, ema = make_model(0), make_model(50)
    parameters = list(model.parameters())
    groups = [{"params": parameters[7:], "weight_decay": 0.5}, {"params": parameters[:7], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.25)
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    reference = everything(model, ema, optimizer)
    Checkpointer(root / "one process", 2).save(1, model, ema, optimizer, {"position": 0.1}, {"class_names": ["a"]})
    mp.start_processes(process, (root, reference), nprocs=WORLD, start_method="fork")

    # One process again.
    results = {"loads": {}, "models": {}, "whole": {}}
    for name in MESHES:
        (folder,) = list_checkpoints(root / name)
        model, ema = make_model(7), make_model(8)
        groups = [{"params": list(model.parameters())[:7]}, {"params": list(model.parameters())[7:]}]
        optimizer = torch.optim.AdamW(groups, lr=1.0)
        load_checkpoint(folder, model, ema, optimizer)
        results["loads"][name] = same(everything(model, ema, optimizer), reference)
        made = vmoe.create_model(pretrained=root / name)  # the average
        results["models"][name] = all(torch.equal(reference[f"ema {key}"], t) for key, t in made.state_dict().items())
        results["whole"][name] = [find_weights(root / name).name, *find_problems(folder)]
    (root / "alone.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
