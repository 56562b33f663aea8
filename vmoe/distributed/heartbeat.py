"""Which of a job's processes still live: each beats in the job's store, and a thread in each looks at all beats.

A process that was killed no longer beats, nor does one that was stopped or lost its machine; one that raised an error
leaves a note. So whoever waits for it in vain can say whom it waits for, and does not wait for ever: NCCL has no other
way to notice, and gloo knows addresses but no ranks.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from traceback import walk_stack, walk_tb
from types import FrameType, TracebackType
from typing import Any

import torch.distributed as dist

from vmoe.utils.printable import escaped

# Seconds between two beats; more in large jobs, where one store answers all processes.
INTERVAL, INTERVAL_PER_PROCESS = 1.0, 0.01
# A process is silent after so many intervals without a beat: long enough for a busy machine.
SILENT_INTERVALS = 4
# Seconds that a process has to end by itself after another one left with an error.
GRACE_SECONDS = 10.0
DONE, ERROR, LOST = "done", "error", "lost"  # how a process can leave; LOST: because of another one
BEATS, GENERATION = "beats", "vmoe_generation"  # keys in the store
PACKAGE = os.sep + "vmoe" + os.sep


class LostProcessError(RuntimeError):
    """Another process of the job died, hangs, or stopped with an error; the message says which.

    Attributes:
        told: that process has told its error itself, on this machine.
    """

    def __init__(self, message: str, told: bool = False) -> None:
        super().__init__(message)
        self.told = told


def current_generation(store: dist.Store, rank: int, world: int, timeout: float) -> int:
    """How often the processes of this job were started, by this count of the store.

    torchrun starts all processes again when one was lost, with the same store, in which the addresses of those before
    still stand. Process 0 opens a new generation; the others wait for one whose process 0 beats, and so lives.

    Raises:
        LostProcessError: process 0 did not come within `timeout` seconds.
    """
    if rank == 0:
        return store.add(GENERATION, 1)
    end, seen = time.monotonic() + timeout, {}
    pause = min(max(0.05, INTERVAL_PER_PROCESS * world / 4), timeout / 20)  # one store answers all
    while time.monotonic() < end:
        generation = store.add(GENERATION, 0)
        key = f"vmoe/{generation}/{BEATS}/0"
        if store.check([key]):
            news = json.loads(store.get(key))
            if news["end"] is None and seen.setdefault(generation, news["beat"]) != news["beat"]:
                return generation
        time.sleep(pause)
    raise LostProcessError(
        f"process 0 of {world} did not start within {timeout:g} s; see what was printed there, or raise "
        "parallel.timeout"
    )


@dataclass
class _Peer:
    """What is known of a process: its last news, and when that came (monotonic seconds)."""

    news: dict[str, Any]
    since: float
    place_since: float


class Watch:
    """The beats of this process, and a look at those of the others; a context manager around the job.

    Args:
        store: of the job.
        rank: of this process.
        world: number of processes.
        timeout: seconds after which a process that does not beat is given up, and this one ends.
    """

    def __init__(self, store: dist.Store, rank: int, world: int, timeout: float) -> None:
        self.rank, self.world, self.timeout = rank, world, timeout
        self.interval = min(max(INTERVAL, INTERVAL_PER_PROCESS * world), timeout / 20)
        own = store.clone()  # a connection of its own: the main thread may wait in the other one
        own.set_timeout(timedelta(seconds=timeout))
        self._store = dist.PrefixStore(BEATS, own)
        self._peers: dict[int, _Peer] = {}
        self._news = {"beat": 0, "host": socket.gethostname(), "pid": os.getpid(), "place": "", "end": None, "text": ""}
        self._started = time.monotonic()
        self._looked = self._started
        self._main = threading.main_thread().ident
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.leave(DONE if error is None else ERROR, "" if error is None else sentence(error))

    @property
    def end(self) -> str | None:
        """How this process left; None: it has not."""
        return self._news["end"]

    def leave(self, end: str, text: str = "", told: bool = True) -> None:
        """Tells the others that this process ends, and how; once.

        Args:
            end: DONE, ERROR or LOST.
            text: the error.
            told: this process tells its error itself.
        """
        if self._news["end"] is None:
            self._news |= {"end": end, "text": text, "told": told}
            if self.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
                # The store ends with this process; the others may take their grace, and must see first that it began.
                self._wait_until(self._all_ended, GRACE_SECONDS + SILENT_INTERVALS * self.interval)
            self._ending.set()
            self._thread.join(GRACE_SECONDS)  # the store's machine may be gone

    def first_says(self, text: str) -> bool:
        """Whether process 0 ends with the same error as this one; to be asked before `leave`."""

        def said() -> bool:
            return 0 in self._peers and self._peers[0].news["text"] == text

        return self.rank > 0 and self._wait_until(said, (SILENT_INTERVALS - 1) * self.interval)

    def explain(self, waiting: bool) -> LostProcessError | None:
        """Why the other processes do not answer; None if they all seem to do well.

        Args:
            waiting: something is certainly wrong: wait until silence tells who it is.
        """
        deadline = time.monotonic() + (SILENT_INTERVALS + 2) * self.interval if waiting else 0.0
        while True:
            found = self._failed() or self._silent(SILENT_INTERVALS * self.interval)
            if found is not None or time.monotonic() > deadline:
                return found
            time.sleep(self.interval / 4)

    def elsewhere(self, error: BaseException) -> str:
        """Where those other processes are that live, but not where this one's error came; those longest there first.

        Args:
            error: with its traceback.
        """
        here, now = "", time.monotonic()
        for frame, line in walk_tb(error.__traceback__):
            here = place(frame, line) or here
        stays = [
            (now - peer.place_since, rank, peer.news["place"])
            for rank, peer in self._peers.items()
            if rank != self.rank and peer.news["end"] is None and peer.news["place"] != here
        ]
        stays.sort(key=lambda stay: -stay[0])
        return "; ".join(f"{self._name(rank)} has been at {there} for {stay:.0f} s" for stay, rank, there in stays[:4])

    def _wait_until(self, condition: Callable[[], bool], seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while not condition() and time.monotonic() < deadline:
            time.sleep(self.interval / 10)
        return condition()

    def _all_ended(self) -> bool:
        gone = SILENT_INTERVALS * self.interval
        others = [peer for rank, peer in self._peers.items() if rank != self.rank]
        return all(peer.news["end"] is not None or self._looked - peer.since > gone for peer in others)

    # --- what the thread does ---

    def _run(self) -> None:
        left_since = None
        try:
            self._beat()
            # Often at first: a process that is lost before anybody has seen it could not be named.
            while not self._ending.wait(self.interval if len(self._peers) == self.world else self.interval / 20):
                self._beat()
                self._look()
                # A little before the processes would give up that wait for it: they could not say for whom.
                silent = self._silent(self.timeout - 2 * self.interval)
                left = self._failed() or self._gave_up()
                left_since = None if left is None else left_since or time.monotonic()
                if silent or (left and time.monotonic() - left_since > GRACE_SECONDS):
                    self._abandon(silent or left)
            self._beat()
        except RuntimeError:  # the store is gone, with the process or the agent that held it
            left = self._failed() or self._gave_up()
            silence = time.monotonic() - self._looked
            if not self._ending.wait(GRACE_SECONDS if left else max(GRACE_SECONDS, self.timeout - silence)):
                gone = f"the store of the job is gone, with {self._name(0)} or what started it; {REMEDY}"
                self._abandon(left or LostProcessError(gone))

    def _beat(self) -> None:
        self._news |= {"beat": self._news["beat"] + 1, "place": self._place()}
        self._store.set(str(self.rank), json.dumps(self._news))

    def _look(self) -> None:
        ranks = [rank for rank in range(self.world) if rank in self._peers or self._store.check([str(rank)])]
        texts = self._store.multi_get([str(rank) for rank in ranks])
        self._looked = now = time.monotonic()
        for rank, text in zip(ranks, texts):
            news, old = json.loads(text), self._peers.get(rank)
            if old is None or news["beat"] != old.news["beat"]:
                moved = old is None or news["place"] != old.news["place"]
                self._peers[rank] = _Peer(news, now, now if moved else old.place_since)

    def _place(self) -> str:
        """The innermost line of this package where the main thread is."""
        main = sys._current_frames().get(self._main)
        stack = () if main is None else walk_stack(main)
        return next((found for frame, line in stack if (found := place(frame, line))), "its start")

    def _abandon(self, error: LostProcessError) -> None:
        """Ends this process: its main thread waits for somebody who will not come, and cannot be woken."""
        if self._news["end"] is not None:  # it ends by itself
            return
        self._news |= {"end": LOST, "text": str(error)}
        with suppress(RuntimeError):  # the store may be gone
            self._beat()
        if not error.told:
            print(f"vmoe: {told_by(self.rank, self.world)}error: {escaped(error)}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(1)

    # --- what is known ---

    def _name(self, rank: int) -> str:
        peer = self._peers.get(rank)
        where = f" (host {peer.news['host']}, pid {peer.news['pid']})" if peer else ""
        return f"process {rank} of {self.world}{where}"

    def _failed(self) -> LostProcessError | None:
        for rank, peer in sorted(self._peers.items()):
            if rank != self.rank and peer.news["end"] == ERROR:
                # If it has told that itself, the first process of each other machine repeats it.
                repeats = peer.news["host"] != self._news["host"] and os.environ.get("LOCAL_RANK", "0") == "0"
                told = peer.news["told"] and not repeats
                return LostProcessError(f"{self._name(rank)} stopped with an error: {peer.news['text']}", told=told)
        return None

    def _gave_up(self) -> LostProcessError | None:
        """Another process ended because it waited in vain, perhaps for this one."""
        for rank, peer in sorted(self._peers.items()):
            if rank != self.rank and peer.news["end"] == LOST:
                return LostProcessError(f"{self._name(rank)} gave up: {peer.news['text']}")
        return None

    def _silent(self, limit: float) -> LostProcessError | None:
        now = time.monotonic()
        if now - self._looked > limit and 0 in self._peers and self.rank != 0:
            return LostProcessError(
                f"the store of the job has not answered for {now - self._looked:.0f} s: {self._name(0)}, or what "
                f"started it, is gone or hangs; {REMEDY}"
            )
        silent, absent = [], []
        for rank in range(self.world):
            peer = self._peers.get(rank)
            if rank == self.rank or (peer is not None and peer.news["end"] is not None):
                continue
            if peer is None and self._looked - self._started > limit:
                absent.append(rank)
            elif peer is not None and self._looked - peer.since > limit:
                silent.append(rank)
        if silent:
            longest = max(self._looked - self._peers[rank].since for rank in silent)
            place = self._peers[silent[0]].news["place"]
            return LostProcessError(
                f"{', '.join(map(self._name, silent[:4]))}{' and more' * (len(silent) > 4)} "
                f"{'has' if len(silent) == 1 else 'have'} not been heard of for {longest:.0f} s, last at {place}: "
                f"killed, stopped, or cut off from the network; {REMEDY}"
            )
        if absent:
            return LostProcessError(
                f"{', '.join(map(self._name, absent[:4]))}{' and more' * (len(absent) > 4)} did not start within "
                f"{self._looked - self._started:.0f} s; see what was printed there, or raise parallel.timeout"
            )
        return None


REMEDY = "the same command continues the run from its last checkpoint"


def place(frame: FrameType, line: int) -> str | None:
    """A line of this package as text; None if the frame is of another one, or of the watch itself."""
    file = frame.f_code.co_filename
    if PACKAGE not in file or file == __file__:
        return None
    return f"vmoe/{file.rpartition(PACKAGE)[2]}:{line} ({frame.f_code.co_name})"


def sentence(error: BaseException) -> str:
    """An error in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def told_by(rank: int, world: int) -> str:
    """The process that speaks, as the start of a message; "" where there is only one."""
    return f"process {rank} of {world}: " if world > 1 else ""
