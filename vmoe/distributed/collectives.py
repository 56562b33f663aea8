"""The processes of a job while they save or load a checkpoint: all succeed, or all raise the same error."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from vmoe.distributed.process_group import SharedError, run_together
from vmoe.models.manifest import find_problems
from vmoe.utils.world import world

Result = TypeVar("Result")

_groups: dict[dist.ProcessGroup, dist.ProcessGroup] = {}  # {all processes of the job: the same for messages of ours}


class CheckpointError(SharedError):
    """A checkpoint that cannot be written, read, or does not fit; the message is one sentence for the user."""


class Team:
    """The processes of the job, or the only one. All of them make it and call its methods together."""

    def __init__(self) -> None:
        (self.rank, self.world), self.group = world(), None
        if dist.is_available() and dist.is_initialized():
            # Of its own, so that a background thread's messages do not mix with those of training; gloo, for CPU data.
            if dist.group.WORLD not in _groups:
                _groups.clear()
                timeout = dist.group.WORLD.get_group_store().timeout  # parallel.timeout, see process_group.py
                _groups[dist.group.WORLD] = dist.new_group(backend="gloo", timeout=timeout)
            self.group = _groups[dist.group.WORLD]

    def run(self, action: Callable[[], Result], path: Path, collect: bool = True) -> list[Result]:
        """As `run_together`, with a CheckpointError about `path`."""
        return run_together(action, lambda error: _sentence(error, path), CheckpointError, self.group, collect)

    def run_first(self, action: Callable[[], Result], path: Path) -> Result:
        """Does something in process 0; as `run`, and returns what it gave there."""
        return self.run(action if self.rank == 0 else lambda: None, path)[0]

    def find_problems(self, checkpoint: Path) -> list[str]:
        """As `manifest.find_problems`; each process reads a share of the files, all get the same answer."""
        found = self.run(lambda: find_problems(checkpoint, (self.rank, self.world)), checkpoint)
        return list(dict.fromkeys(problem for each in found for problem in each))


def _sentence(error: BaseException, path: Path) -> str:
    """What to say of an error that came while `path` was written or read."""
    if isinstance(error, CheckpointException):  # torch's, of several processes
        error = next(iter(error.failures.values()))[0]
    if isinstance(error, OSError):
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        what, remedy = ("the disk is full", "free some space") if full else (error.strerror or error, "mend that")
        return f"{path}: {what}; {remedy} and continue the run, the checkpoints before are untouched"
    return str(error) if isinstance(error, ValueError) else f"{path}: {type(error).__name__}: {error}"
