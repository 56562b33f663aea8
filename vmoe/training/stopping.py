"""When training stops before its last step: signals, and the end of the time that it was given."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from vmoe.distributed.processes import world


class Stopped(KeyboardInterrupt):
    """Training was interrupted between two steps, after saving a checkpoint; the message says how to go on.

    Attributes:
        planned: by SIGUSR1 or `train.max_minutes`: the job is to go on later.
    """

    planned = False


@dataclass
class StopRequest:
    """What signals asked for since the loop began.

    Attributes:
        interrupted: Ctrl-C or SIGTERM: stop after this step, the exit code says that the run was interrupted.
        planned: SIGUSR1: stop after this step; the job is to go on later, and nothing is wrong.
    """

    interrupted: bool = False
    planned: bool = False
    parent: int = field(default_factory=os.getppid)

    @property
    def orphaned(self) -> bool:
        """torchrun was killed: nobody would restart this process, pass signals on to it, or end it."""
        return "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != self.parent


@contextmanager
def interruptible() -> Iterator[StopRequest]:
    """Collects Ctrl-C, SIGTERM and SIGUSR1 instead of dying of them, so that a step is never cut in two.

    A second Ctrl-C stops at once, but not one of several processes: it comes from the terminal and from torchrun.
    """
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():  # only the main thread may handle signals
        yield stop
        return
    alone = world()[1] == 1

    def handle(number: int, _frame: Any) -> None:
        if stop.interrupted and number == signal.SIGINT and alone:
            raise KeyboardInterrupt
        if number in (signal.SIGINT, signal.SIGTERM):
            stop.interrupted = True
        else:
            stop.planned = True

    names = [name for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]  # Windows has no SIGUSR1
    previous = {name: signal.signal(getattr(signal, name), handle) for name in names}
    try:
        yield stop
    finally:
        for name, handler in previous.items():
            signal.signal(getattr(signal, name), handler)


class TimeBudget:
    """Tells when to stop so that the next step, an evaluation it may have, and the checkpoint still find time.

    Args:
        minutes: from now on; None: without end.
    """

    def __init__(self, minutes: float | None) -> None:
        self.end = math.inf if minutes is None else time.monotonic() + 60 * minutes
        self._step_began: float | None = None
        self._longest_step = self._saving = 0.0

    def next_step(self) -> None:
        """A step begins; with what follows it (evaluation, saving) it lasts until the next one."""
        now = time.monotonic()
        if self._step_began is not None:
            self._longest_step = max(self._longest_step, now - self._step_began)
        self._step_began = now

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Around the writing of a checkpoint."""
        began = time.monotonic()
        yield
        self._saving = max(self._saving, time.monotonic() - began)

    def used_up(self) -> bool:
        """Whether there is no time for another step after this one."""
        return time.monotonic() + self._longest_step + self._saving >= self.end
