"""A training step of two processes whose batches differ in size, against one process; started by test_uneven.py."""

import sys

import pytest
import torch
import torch._dynamo  # before the processes are forked, so that it is imported once; so is fsdp
import torch.distributed as dist
import torch.distributed.fsdp
import torch.multiprocessing as mp
from steps import MODELS, make_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import vmoe
from vmoe.distributed.mesh import MeshSize, make_meshes
from vmoe.distributed.parallelize import parallelize, synchronize_scalars
from vmoe.moe import SparseMoE

CASES = ("top_2_bpr", "dropless", "expert_choice", "soft", "deepseek", "limoe")
SIZES = {"uneven": (5, 1), "empty": (6, 0)}
CPU = torch.device("cpu")


def batch(case: str) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(6, 3, 16, 16, generator=generator)
    if MODELS[case][0] != "limoe":
        return [images]
    text = torch.randint(1, 31, (6, 6), generator=generator)
    return [images, text.scatter(1, torch.randint(2, 6, (6, 1), generator=generator), 31)]


def step(model: nn.Module, module: nn.Module, inputs: list[torch.Tensor], world: int) -> dict[str, torch.Tensor]:
    """Gradients and counts after one step, whole."""
    outputs = module(*inputs)
    outputs = outputs[:2] if isinstance(outputs, tuple) else (outputs,)
    (sum(output.square().sum() for output in outputs) * world).backward()  # training averages over the processes
    synchronize_scalars(model)
    loads = [layer.router for layer in model.modules() if isinstance(layer, SparseMoE)]
    vmoe.update_expert_bias(model)
    results = {f"bias {i}": router.expert_bias for i, router in enumerate(loads) if hasattr(router, "expert_bias")}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        results[name] = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
    return results


def process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/join", rank=rank, world_size=2)
    for case in CASES:
        expected = step(model := make_model(case).train(), model, batch(case), 1)
        for kind, sizes in SIZES.items():
            inputs = [tensor.split(sizes)[rank] for tensor in batch(case)]
            for mesh in ("ddp", "ep"):
                model = make_model(case).train()
                if mesh == "ddp":
                    module = DistributedDataParallel(model)  # with its defaults, as users have it
                else:
                    module = parallelize(model, make_meshes(MeshSize(1, 1, 2), CPU), CPU)
                for name, grad in step(model, module, inputs, 2).items():
                    if expected[name] is None:  # the parameters of the logits
                        continue
                    torch.testing.assert_close(
                        grad, expected[name], msg=lambda text, what=(case, kind, mesh, name): f"{what}: {text}"
                    )
    compiled_experts_say_what_is_wrong(rank)
    dist.barrier()
    dist.destroy_process_group()


def compiled_experts_say_what_is_wrong(rank: int) -> None:
    """Compiled code exchanges buffers of one size; other sizes are an error in all processes before they do."""
    model = make_model("top_1").train()
    module = parallelize(model, make_meshes(MeshSize(1, 1, 2), CPU), CPU)
    for layer in model.modules():
        if isinstance(layer, SparseMoE):  # the rest of the model would only be more to trace, twice in each process
            layer.compile(backend="eager", dynamic=False)  # the forward pass alone says it
    module(batch("top_1")[0].split((3, 3))[rank])
    with pytest.raises(RuntimeError, match="give all processes batches of the same size"):
        module(batch("top_1")[0].split(SIZES["uneven"])[rank])


if __name__ == "__main__":
    mp.start_processes(process, (sys.argv[1],), nprocs=2, start_method="fork")
