"""The processes of a job while they save or load a checkpoint: all succeed, or all raise the same error."""

import errno
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from vmoe.distributed.process_group import SharedError, run_together
from vmoe.models.manifest import find_problems
from vmoe.utils.world import world

Result = TypeVar("Result")


class CheckpointError(SharedError):
    """A checkpoint that cannot be written, read, or does not fit."""


class CheckpointGroup:
    """The processes of the job, or the only one. All of them make it and call its methods together."""

    def __init__(self) -> None:
        self.rank, self.world = world()
        self.group = _own_group(dist.group.WORLD) if dist.is_available() and dist.is_initialized() else None

    def run(self, action: Callable[[], Result], path: Path, collect: bool = True) -> list[Result]:
        """`run_together`, with a CheckpointError about `path`."""
        return run_together(action, lambda error: _sentence(error, path), CheckpointError, self.group, collect)

    def run_first(self, action: Callable[[], Result], path: Path) -> Result:
        """Runs something in process 0; its result in all."""
        return self.run(action if self.rank == 0 else lambda: None, path)[0]

    def find_problems(self, checkpoint: Path) -> list[str]:
        """`manifest.find_problems`, with the files shared among the processes."""
        found = self.run(lambda: find_problems(checkpoint, (self.rank, self.world)), checkpoint)
        return list(dict.fromkeys(problem for each in found for problem in each))


@lru_cache(maxsize=1)
def _own_group(job: dist.ProcessGroup) -> dist.ProcessGroup:
    """A second group of the same processes: collectives of a background thread must not mix with those of training."""
    return dist.new_group(backend="gloo", timeout=job.get_group_store().timeout)  # that is parallel.timeout


def _sentence(error: BaseException, path: Path) -> str:
    """The message for an error while `path` was written or read."""
    if isinstance(error, CheckpointException):  # torch's, of several processes
        error = next(iter(error.failures.values()))[0]
    if isinstance(error, OSError):
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        what, remedy = ("the disk is full", "free some space") if full else (error.strerror or error, "fix that")
        return f"{path}: {what}; {remedy} and continue the run, the checkpoints before are untouched"
    return str(error) if isinstance(error, ValueError) else f"{path}: {type(error).__name__}: {error}"
