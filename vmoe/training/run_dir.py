"""The folder of a run: whether it holds one to continue, and the lock that keeps other commands out of it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from vmoe.training.checkpoint import latest_checkpoint, list_checkpoints
from vmoe.training.config import Config, changed_settings
from vmoe.utils.atomic import whole_file
from vmoe.utils.config import ConfigError

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None

# Open run folders' locks; see lock_folder.
_locks: set[int] = set()


def find_checkpoint(run: Path, config: Config) -> Path | None:
    """The checkpoint to continue from; None starts anew.

    Raises:
        ConfigError: the folder holds a run that may not be touched (`resume: never`), was made with other settings, or
            has lost its checkpoints.
    """
    checkpoints = list_checkpoints(run)
    holds_run = bool(checkpoints) or any((run / name).exists() for name in ("metrics.jsonl", "summary.json"))
    if holds_run and config.resume == "never":
        raise ConfigError(
            f"output_dir {run} already holds a run, and resume is 'never'; nothing was changed. Choose another "
            "output_dir, or continue that run with --resume auto"
        )
    if not checkpoints:
        if (run / "summary.json").exists():
            raise ConfigError(
                f"output_dir {run} holds a finished run without its checkpoints; choose another output_dir"
            )
        if not holds_run:
            return None
    if not (run / "config.yaml").is_file():
        raise ConfigError(f"output_dir {run} holds other files, and no config.yaml of a run; choose another output_dir")
    changed = changed_settings(run / "config.yaml", config)
    if changed:
        listed = "; ".join(f"{key} was {old!r}, now {new!r}" for key, (old, new) in changed.items())
        raise ConfigError(
            f"output_dir {run} holds a run with other settings ({listed}); go back to those, or choose another "
            "output_dir"
        )
    return latest_checkpoint(run)  # None: it stopped before its first checkpoint


def lock_folder(run: Path) -> int:
    """Makes the run's folder and keeps other processes out of it until the returned descriptor is closed.

    Raises:
        ConfigError: the folder cannot be written to, or another process trains in it.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
        lock = os.open(run if fcntl else os.devnull, os.O_RDONLY)
    except OSError as error:
        raise ConfigError(f"output_dir {run} cannot be written to ({error.strerror}); choose another") from error
    if fcntl is not None:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(lock)
            raise ConfigError(
                f"another process is training in output_dir {run}; wait for it or choose another"
            ) from error
    _locks.add(lock)
    return lock


def unlock_folder(lock: int) -> None:
    """Lets others into the folder that `lock_folder` locked."""
    _locks.discard(lock)
    os.close(lock)


def _close_locks() -> None:
    """In a forked child: a data worker lives a few seconds longer than a killed run, and would keep its folder."""
    while _locks:
        os.close(_locks.pop())


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_close_locks)


def finished_summary(run: Path, step: int, steps: int) -> dict[str, Any] | None:
    """summary.json of a run that has done all `steps` already, else None."""
    file = run / "summary.json"
    if step < steps or not file.is_file():
        return None
    summary = json.loads(file.read_text(encoding="utf-8"))
    return summary if summary["steps"] >= steps else None


def write_text(file: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    with whole_file(file) as draft:
        draft.write_text(text, encoding="utf-8")
