"""The processes of a job: joining, and what they agree on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from vmoe.data.loaders import world

DEFAULT_TIMEOUT = 600.0


@contextmanager
def joined(device: torch.device | None = None, timeout: float = DEFAULT_TIMEOUT) -> Iterator[None]:
    """Joins the other processes of `torchrun` inside the block; without torchrun it does nothing.

    Args:
        device: where tensors are exchanged: GPUs over NCCL. Numbers and objects on the CPU always go over gloo.
        timeout: seconds to wait for another process, before an error.
    """
    if "WORLD_SIZE" not in os.environ or dist.is_initialized():
        yield
        return
    backend = "gloo"
    if device is not None and device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    try:
        yield
    finally:
        dist.destroy_process_group()


def wait_for_all() -> None:
    """Returns when all processes have come here."""
    if world()[1] > 1:
        dist.barrier()


def mean_over_processes(values: list[float]) -> list[float]:
    """The mean of each number over all processes, the same in all of them."""
    _, processes = world()
    if processes == 1:
        return values
    sums = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(sums)
    return (sums / processes).tolist()


def sum_over_processes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor's sum over all processes, in float64 on the CPU; in one message."""
    if world()[1] == 1:
        return tensors
    flat = [tensor.detach().double().cpu() for tensor in tensors.values()]
    sums = torch.cat([tensor.flatten() for tensor in flat])
    dist.all_reduce(sums)
    parts = sums.split([tensor.numel() for tensor in flat])
    return {name: part.view(tensor.shape) for name, tensor, part in zip(tensors, flat, parts)}


def any_process(found: bool) -> bool:
    """Whether it holds in one of the processes; the same answer in all."""
    return mean_over_processes([float(found)])[0] > 0


__all__ = ["any_process", "joined", "mean_over_processes", "sum_over_processes", "wait_for_all", "world"]
