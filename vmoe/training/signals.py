"""Signals that stop training before its last step."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from vmoe.utils.world import world

# Seconds that a process which waits in C++ (for the others to join) has to handle a signal, before it is ended.
PATIENCE_SECONDS = 2.0
INTERRUPTS = (signal.SIGINT, signal.SIGTERM)
SIGNALS = (*INTERRUPTS, signal.SIGUSR1)
STOPPED_OUTSIDE = "stopped outside of the steps, nothing to save; the same command starts or continues the run"


class Stopped(KeyboardInterrupt):
    """Training was interrupted: between two steps, after saving a checkpoint, or before the first one."""

    def __init__(self, message: str, planned: bool, agreed: bool = False) -> None:
        super().__init__(message)
        self.planned = planned  # by SIGUSR1 or `train.max_minutes`: the job is to go on later
        self.agreed = agreed  # all processes stop, after the same step


closed_in_fork: set[int] = set()  # file descriptors that are not for forked children, such as data workers


@dataclass
class StopRequest:
    """What signals asked for: to stop after this step."""

    interrupted: bool = False  # Ctrl-C or SIGTERM: the exit code says so
    planned: bool = False  # SIGUSR1: the job is to go on later, and nothing is wrong
    in_loop: bool = False  # inside `between_steps`
    started: bool = False  # `between_steps` was entered
    parent: int = field(default_factory=os.getppid)

    @contextmanager
    def between_steps(self) -> Iterator[None]:
        """Around the loop, which stops after a step."""
        self.in_loop = self.started = True
        try:
            yield
        finally:
            self.in_loop = False

    @property
    def orphaned(self) -> bool:
        """torchrun was killed: nobody would restart this process, pass signals on to it, or end it."""
        return "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != self.parent


@contextmanager
def interruptible() -> Iterator[StopRequest]:
    """Notes Ctrl-C, SIGTERM and SIGUSR1 in `StopRequest.between_steps`; before and after, the first raises Stopped.

    A second Ctrl-C stops at once, but not one of several processes: it comes from the terminal and from torchrun.
    """
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():  # only the main thread may handle signals
        yield stop
        return

    def handle(number: int, _frame: Any) -> None:
        if stop.interrupted and number == signal.SIGINT and world()[1] == 1:
            raise KeyboardInterrupt
        first = not (stop.interrupted or stop.planned)
        stop.interrupted |= number in INTERRUPTS
        stop.planned |= number not in INTERRUPTS
        if first and not stop.in_loop:
            raise Stopped(STOPPED_OUTSIDE, stop.planned)

    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    threading.Thread(target=_acknowledge, args=(stop, reading), daemon=True).start()
    handlers = {number: signal.signal(number, handle) for number in SIGNALS}
    descriptor = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    closed_in_fork.add(writing)
    try:
        yield stop
    finally:
        signal.set_wakeup_fd(descriptor)
        closed_in_fork.discard(writing)
        os.close(writing)  # ends the thread
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _acknowledge(stop: StopRequest, reading: int) -> None:
    """Answers signals from a thread: Python's handlers run only when the main thread returns from C++.

    In the loop it says that the run stops after this step. Before it, where C++ may wait, it ends the process.
    """
    first, reported = os.environ.get("RANK", "0") == "0", False
    while byte := os.read(reading, 1):
        if byte[0] not in SIGNALS:
            continue
        if stop.in_loop and first and not reported:
            again = "; Ctrl-C again stops at once" if world()[1] == 1 else ""
            print(f"\nvmoe-train: stopping after this step{again}", file=sys.stderr, flush=True)
            reported = True
        elif not stop.started:
            time.sleep(PATIENCE_SECONDS)
            if stop.interrupted or stop.planned or stop.started:
                continue
            if first:
                print(f"\nvmoe-train: {STOPPED_OUTSIDE}", file=sys.stderr, flush=True)
            sys.stdout.flush()
            os._exit(130 if byte[0] in INTERRUPTS else 0)
    os.close(reading)


def _close_in_fork() -> None:
    if closed_in_fork:
        signal.set_wakeup_fd(-1)  # a child's signals are not the run's
    while closed_in_fork:
        os.close(closed_in_fork.pop())


os.register_at_fork(after_in_child=_close_in_fork)
