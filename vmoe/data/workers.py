"""The processes that read data."""

import os
import signal

GRACE_SECONDS = 5


def cpu_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def own_cores() -> int:
    """CPU cores for each of the job's processes on this machine, at least 1."""
    return max(1, cpu_cores() // local_processes())


def local_processes() -> int:
    """Processes of the job on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def leave_signals_to_the_main_process(_worker: int) -> None:
    """A signal to the process group must not end the step in progress: a worker outlives SIGTERM by GRACE_SECONDS."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGALRM"):  # not on Windows
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        signal.signal(signal.SIGALRM, lambda *_: os._exit(0))
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE_SECONDS))
