"""The processes of a job while they save or load a checkpoint: all succeed, or all raise the same error."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from vmoe.models.manifest import find_problems

Result = TypeVar("Result")

_groups: dict[dist.ProcessGroup, dist.ProcessGroup] = {}  # {all processes of the job: the same for messages of ours}


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, read, or does not fit; the message is one sentence for the user."""

    shared = True  # see vmoe.distributed.process_group.SharedError


class Team:
    """The processes of the job, or the only one. All of them make it and call its methods together.

    Attributes:
        rank: of this process.
        world: their number.
        group: for their messages; None for one process.
    """

    def __init__(self) -> None:
        self.rank, self.world, self.group = 0, 1, None
        if dist.is_available() and dist.is_initialized():
            self.rank, self.world = dist.get_rank(), dist.get_world_size()
            # Of its own, so that a background thread's messages do not mix with those of training; gloo, for CPU data.
            if dist.group.WORLD not in _groups:
                _groups.clear()
                timeout = dist.group.WORLD.get_group_store().timeout  # parallel.timeout, see process_group.py
                _groups[dist.group.WORLD] = dist.new_group(backend="gloo", timeout=timeout)
            self.group = _groups[dist.group.WORLD]

    def run(self, action: Callable[[], Result], path: Path) -> Result:
        """Does something in every process.

        Args:
            action: what to do. If it speaks with other processes, it must not fail in one of them alone.
            path: what it is about, for the message.

        Returns:
            This process's own result.

        Raises:
            CheckpointError: in all processes, if it failed in one.
        """
        return self._run(action, path, tell=False)[0]

    def run_first(self, action: Callable[[], Result], path: Path) -> Result:
        """Does something in process 0; as `run`, and returns what it gave there."""
        return self._run(action if self.rank == 0 else lambda: None, path)[1][0]

    def run_and_collect(self, action: Callable[[], Result], path: Path) -> list[Result]:
        """Does something in every process; as `run`, and returns what it gave in each."""
        return self._run(action, path)[1]

    def find_problems(self, checkpoint: Path) -> list[str]:
        """As `manifest.find_problems`; each process looks at a share of the files, all get the same answer."""
        found = self.run_and_collect(lambda: find_problems(checkpoint, (self.rank, self.world)), checkpoint)
        return list(dict.fromkeys(problem for each in found for problem in each))

    def _run(self, action: Callable[[], Result], path: Path, tell: bool = True) -> tuple[Result, list[Result]]:
        result, failure, cause = None, None, None
        try:
            result = action()
        except (Exception, CheckpointException) as error:
            failure, cause = _sentence(error, path), error
        everyone = self._gather((failure, result if tell else None))
        first = next((each for each, _ in everyone if each is not None), None)
        if first is not None:
            raise CheckpointError(first) from cause
        return result, [each for _, each in everyone]

    def _gather(self, value: Any) -> list[Any]:
        if self.group is None:
            return [value]
        values = [None] * self.world
        dist.all_gather_object(values, value, group=self.group)
        return values


def _sentence(error: BaseException, path: Path) -> str:
    """What to tell of an error that came while `path` was written or read."""
    if isinstance(error, CheckpointException):  # torch's, of several processes
        error = next(iter(error.failures.values()))[0]
    if isinstance(error, OSError):
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        what, remedy = ("the disk is full", "free some space") if full else (error.strerror or error, "mend that")
        return f"{path}: {what}; {remedy} and continue the run, the checkpoints before are untouched"
    return str(error) if isinstance(error, ValueError) else f"{path}: {type(error).__name__}: {error}"
