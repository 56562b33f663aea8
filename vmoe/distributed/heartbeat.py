"""Which processes of a job are alive: each writes a heartbeat to the job's store, and a thread in each reads them all.

A process that was killed, stopped or cut off has no heartbeat any more; one that raised an error leaves it there. So a
process that waits for it can name it, and end: NCCL does not notice a lost peer, and gloo knows no ranks.
"""

from __future__ import annotations

import json
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from vmoe.utils.printable import escaped

# Seconds between two heartbeats; more in large jobs, where one store answers all processes.
INTERVAL, INTERVAL_PER_PROCESS = 1.0, 0.01
# A process is lost after so many intervals without a heartbeat: long enough for a busy machine.
SILENT_INTERVALS = 4
# Seconds that a process has to end by itself after another one left with an error.
GRACE_SECONDS = 10.0
DONE, ERROR, LOST = "done", "error", "lost"  # how a process can leave; LOST: because of another one
BEATS, GENERATION = "beats", "vmoe_generation"  # keys in the store
REMEDY = "the same command continues the run from its last checkpoint"


class LostProcessError(RuntimeError):
    """Another process of the job died, hangs, or stopped with an error, which it printed itself if `reported`."""

    def __init__(self, message: str, reported: bool = False) -> None:
        super().__init__(message)
        self.reported = reported


def generation_of(store: dist.Store, rank: int, world: int, timeout: float) -> int:
    """How often the processes of this job were started: torchrun restarts them with the same store, still filled.

    Process 0 opens a new generation; the others wait for one in which process 0 has a heartbeat.
    """
    if rank == 0:
        return store.add(GENERATION, 1)
    end, seen = time.monotonic() + timeout, {}
    while time.monotonic() < end:
        generation = store.add(GENERATION, 0)
        key = f"vmoe/{generation}/{BEATS}/0"
        if store.check([key]):
            beat = json.loads(store.get(key))
            if beat["end"] is None and seen.setdefault(generation, beat["number"]) != beat["number"]:
                return generation
        time.sleep(min(max(0.05, INTERVAL_PER_PROCESS * world / 4), timeout / 20))
    raise LostProcessError(
        f"process 0 of {world} did not start within {timeout:g} s; see what it printed, or raise parallel.timeout"
    )


class Heartbeat:
    """The heartbeat of this process, and the last ones of the others; a context manager around the job."""

    def __init__(self, store: dist.Store, rank: int, world: int, timeout: float) -> None:
        self.rank, self.world, self.timeout = rank, world, timeout
        self.interval = min(max(INTERVAL, INTERVAL_PER_PROCESS * world), timeout / 20)
        self.silent = SILENT_INTERVALS * self.interval
        own = store.clone()  # a connection of its own: the main thread may wait in the other one
        own.set_timeout(timedelta(seconds=timeout))
        self._store = dist.PrefixStore(BEATS, own)
        self._own = {"number": 0, "host": socket.gethostname(), "pid": os.getpid(), "end": None, "text": ""}
        self._peers: dict[int, dict[str, Any]] = {}  # the last heartbeat of each process, this one's too
        self._seen: dict[int, float] = {}  # when it came
        self._started = self._read = time.monotonic()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(self, _type: type | None, error: BaseException | None, _trace: Any) -> None:
        self.leave(DONE if error is None else ERROR, "" if error is None else sentence(error))

    @property
    def end(self) -> str | None:
        """How this process left, if it has."""
        return self._own["end"]

    def leave(self, end: str, text: str = "", reported: bool = True) -> None:
        """Writes a last heartbeat: how this process ends, with which error, and whether it prints that itself."""
        if self.end is None:
            self._own |= {"end": end, "text": text, "reported": reported}
            if self.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
                # The store ends with this process, and the others must read this first.
                self._wait_until(self._all_ended, GRACE_SECONDS + self.silent)
            self._ending.set()
            self._thread.join(GRACE_SECONDS)  # the store may be gone

    def first_says(self, text: str) -> bool:
        """Whether process 0 ends with the same error as this one; to be asked before `leave`."""
        seconds = self.silent - self.interval
        return self.rank > 0 and self._wait_until(lambda: self._peers.get(0, {}).get("text") == text, seconds)

    def explain(self, waiting: bool) -> LostProcessError | None:
        """Why other processes do not answer; None if all seem alive. `waiting`: until a heartbeat can be missing."""
        self._wait_until(lambda: self._lost(self.silent), self.silent + 2 * self.interval if waiting else 0.0)
        return self._lost(self.silent)

    def _lost(self, silent: float, ended: float = 0.0) -> LostProcessError | None:
        """The processes without a heartbeat for `silent` seconds, or that failed `ended` seconds ago."""
        ages = {rank: self._age(rank) for rank in range(self.world) if rank != self.rank}
        unanswered = time.monotonic() - self._read
        if unanswered > silent and 0 in ages:  # the store, which process 0 or torchrun's agent holds, does not answer
            ages = {0: unanswered}
        for end, limit in ((ERROR, ended), (LOST, ended), (None, silent)):
            ranks = [rank for rank, age in ages.items() if age >= limit and self._peers.get(rank, {}).get("end") == end]
            if not ranks:
                continue
            names = ", ".join(map(self._name, ranks[:4])) + " and more" * (len(ranks) > 4)
            if end is None:
                return LostProcessError(
                    f"no heartbeat of {names} for {ages[ranks[0]]:.0f} s: killed, stopped, or cut off from the "
                    f"network; {REMEDY}"
                )
            peer = self._peers[ranks[0]]
            if end == LOST:
                return LostProcessError(f"{names} gave up: {peer['text']}")
            # The first process of each other machine repeats what that process printed.
            repeats = peer["host"] != self._own["host"] and os.environ.get("LOCAL_RANK", "0") == "0"
            return LostProcessError(f"{names} stopped with an error: {peer['text']}", peer["reported"] and not repeats)
        return None

    def _age(self, rank: int) -> float:
        return self._read - self._seen.get(rank, self._started)

    def _all_ended(self) -> bool:
        return all(p["end"] or self._age(rank) > self.silent for rank, p in self._peers.items() if rank != self.rank)

    def _name(self, rank: int) -> str:
        peer = self._peers.get(rank)
        return f"process {rank} of {self.world}" + (f" (host {peer['host']}, pid {peer['pid']})" if peer else "")

    def _wait_until(self, condition: Callable[[], object], seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while not condition() and time.monotonic() < deadline:
            time.sleep(self.interval / 10)
        return bool(condition())

    def _run(self) -> None:
        """The thread."""
        try:
            self._beat()
            # Often at first: a process that is lost before it was seen could not be named.
            while not self._ending.wait(self.interval if len(self._peers) == self.world else self.interval / 20):
                self._beat()
                self._read_all()
                # A little before the timeout of the collectives, which could not say whom they wait for.
                if lost := self._lost(self.timeout - 2 * self.interval, GRACE_SECONDS):
                    self._exit(lost)
            self._beat()
        except RuntimeError:  # the store is gone, with the process or the agent that held it
            ended, left = self._lost(math.inf), self.timeout - (time.monotonic() - self._read)
            if not self._ending.wait(GRACE_SECONDS if ended else max(GRACE_SECONDS, left)):
                gone = f"the store of the job is gone, with {self._name(0)} or what started it; {REMEDY}"
                self._exit(ended or LostProcessError(gone))

    def _beat(self) -> None:
        self._own["number"] += 1
        self._store.set(str(self.rank), json.dumps(self._own))

    def _read_all(self) -> None:
        ranks = [rank for rank in range(self.world) if rank in self._peers or self._store.check([str(rank)])]
        beats = self._store.multi_get([str(rank) for rank in ranks])
        self._read = time.monotonic()
        for rank, beat in zip(ranks, map(json.loads, beats)):
            if rank not in self._peers or beat["number"] != self._peers[rank]["number"]:
                self._seen[rank] = self._read
                self._peers[rank] = beat

    def _exit(self, error: LostProcessError) -> None:
        """Ends this process: its main thread waits for one that will not come, and cannot be woken."""
        if self.end is not None:  # it ends by itself
            return
        self._own |= {"end": LOST, "text": str(error)}
        with suppress(RuntimeError):  # the store may be gone
            self._beat()
        if not error.reported:
            print(f"vmoe: {speaker(self.rank, self.world)}error: {escaped(error)}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(1)


def sentence(error: BaseException) -> str:
    """An error in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def speaker(rank: int, world: int) -> str:
    """The process that speaks, as the start of a message; "" for the only one."""
    return f"process {rank} of {world}: " if world > 1 else ""
