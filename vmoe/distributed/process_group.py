"""The processes of a job: joining, what they agree on, and what happens when one of them is lost."""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _set_pg_timeout

from vmoe.distributed.heartbeat import DONE, ERROR, LOST, REMEDY, Heartbeat, LostProcessError, generation_of, sentence
from vmoe.utils.config import ConfigError
from vmoe.utils.printable import first_line
from vmoe.utils.world import world

Result = TypeVar("Result")
# How gloo, NCCL and the system say that another process does not answer, where the error is no DistError.
COLLECTIVE = re.compile(r"\[\S*[/\\]gloo[/\\]|Gloo connect|NCCL (error|timeout)|Connection (closed|reset) by peer")


class SharedError(ValueError):
    """An error that all processes raise together, as others with `shared = True`: one process prints it for all."""

    shared = True


@contextmanager
def joined(device: torch.device | None = None, timeout: float = 600.0) -> Iterator[None]:
    """Joins the other processes of `torchrun` inside the block; without torchrun it does nothing.

    GPU tensors go over NCCL, all else over gloo. LostProcessError: another process died, stopped with an error, or did
    not come within `timeout` seconds. Where the main thread cannot be woken (NCCL), the process prints that sentence
    and exits with code 1 instead.
    """
    if "WORLD_SIZE" not in os.environ or dist.is_initialized():
        yield
        return
    backend = "gloo"
    if device is not None and device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    store, rank, processes = _rendezvous(timeout)
    with Heartbeat(store, rank, processes, timeout) as heartbeat:
        try:
            store = dist.PrefixStore("default_pg", store)
            seconds = timedelta(seconds=timeout)
            dist.init_process_group(backend, store=store, rank=rank, world_size=processes, timeout=seconds)
            yield
        except KeyboardInterrupt as stopped:
            agreed = getattr(stopped, "agreed", False)  # all processes stop, see vmoe.training.signals.Stopped
            heartbeat.leave(DONE if agreed else ERROR, "interrupted", reported=False)
            raise
        except Exception as error:
            lost = _lost_process(error, heartbeat)
            if lost is None:
                error.reported = heartbeat.first_says(sentence(error))
                heartbeat.leave(ERROR, sentence(error), reported=must_report(error, rank))
                raise
            heartbeat.leave(LOST, str(lost))
            raise lost from error
        finally:
            # NCCL would wait for the one who is gone.
            if dist.is_initialized() and (heartbeat.end != LOST or backend == "gloo"):
                dist.destroy_process_group()


def _rendezvous(timeout: float) -> tuple[dist.Store, int, int]:
    """(store of this start of the job, rank, number of processes)"""
    seconds = timedelta(seconds=timeout)
    try:
        store, rank, processes = next(dist.rendezvous("env://", timeout=seconds))
    except (RuntimeError, dist.DistError) as error:
        raise LostProcessError(
            f"the processes did not find each other at {os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')} "
            f"within {timeout:g} s ({first_line(error)}); see that all are started, or raise parallel.timeout"
        ) from error
    store.set_timeout(seconds)
    return dist.PrefixStore(f"vmoe/{generation_of(store, rank, processes, timeout)}", store), rank, processes


def _lost_process(error: Exception, heartbeat: Heartbeat) -> LostProcessError | None:
    """What to raise instead of an error that came because another process is gone; None if it is this one's own."""
    if getattr(error, "shared", False) or not isinstance(error, RuntimeError):
        return None
    collective = isinstance(error, dist.DistError) or COLLECTIVE.match(str(error).strip()) is not None
    lost = heartbeat.explain(waiting=collective)
    if lost is None and collective:
        lost = LostProcessError(f"a collective failed ({first_line(error)}), but all processes answer; {REMEDY}")
    return lost


def must_report(error: BaseException, rank: int) -> bool:
    """Whether process `rank` prints its error: process 0 prints those that all of them have."""
    shared = isinstance(error, ConfigError) or getattr(error, "shared", False)
    return rank == 0 or not (shared or getattr(error, "reported", False))


def set_timeout(meshes: list[DeviceMesh], timeout: float) -> None:
    """Sets the seconds that processes wait for each other in meshes, whose groups do not take the job's timeout."""
    set_group_timeout = getattr(dist, "set_timeout", None) or _set_pg_timeout  # public since PyTorch 2.11
    for mesh in meshes:
        for group in mesh.get_all_groups():
            set_group_timeout(timedelta(seconds=timeout), group)


# --- all processes call these together ---


def run_together(
    action: Callable[[], Result],
    describe: Callable[[BaseException], str] = sentence,
    error_type: type[ValueError] = SharedError,
    group: dist.ProcessGroup | None = None,
    collect: bool = True,
) -> list[Result]:
    """Runs `action` in every process; returns the results of all by rank, or without `collect` this one's alone.

    If it fails in one process, `error_type` is raised in all, with what `describe` makes of the first error. An action
    with collectives must not fail in one process alone.
    """
    result = cause = None
    try:
        result = action()
    except (Exception, CheckpointException) as error:
        cause = error
    own = (None if cause is None else describe(cause), result if collect else None)
    everyone = [own] * world()[1]
    if dist.is_available() and dist.is_initialized():
        dist.all_gather_object(everyone, own, group=group)
    for failure, _ in everyone:
        if failure is not None:
            raise error_type(failure) from cause
    return [each for _, each in everyone] if collect else [result]


def from_first(make: Callable[[], Result]) -> Result:
    """What process 0 makes, in all processes; SharedError in all of them if it fails."""
    rank, processes = world()
    return make() if processes == 1 else run_together(make if rank == 0 else lambda: None)[0]


def sum_over_processes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor's sum over all processes, in float64 on the CPU."""
    if world()[1] == 1 or not tensors:  # a dense model has none
        return tensors
    flat = [tensor.detach().double().cpu() for tensor in tensors.values()]
    sums = torch.cat([tensor.flatten() for tensor in flat])
    dist.all_reduce(sums)  # one message for all
    parts = sums.split([tensor.numel() for tensor in flat])
    return {name: part.view(tensor.shape) for name, tensor, part in zip(tensors, flat, parts)}


def mean_over_processes(values: list[float]) -> list[float]:
    """The mean of each number over all processes."""
    sums = sum_over_processes({"": torch.tensor(values, dtype=torch.float64)})[""]
    return (sums / world()[1]).tolist()


def gather_lists(values: list) -> list:
    """The elements of all processes' lists, process by process."""
    return [value for part in run_together(lambda: values) for value in part]
