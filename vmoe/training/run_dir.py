"""Checks whether a run may start in its folder: equal settings in all processes, what the folder holds, its lock."""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vmoe.distributed.process_group import gather_lists
from vmoe.models.manifest import list_checkpoints
from vmoe.training.checkpoint import latest_checkpoint
from vmoe.training.config import Config, TrainConfig, changed_settings, flat_settings
from vmoe.training.signals import closed_in_fork
from vmoe.utils.config import ConfigError
from vmoe.utils.world import world


def check_same_settings(config: Config) -> None:
    """Raises ConfigError in all processes if more than their `device` differs, or they cannot share a batch evenly."""
    _, processes = world()
    if processes == 1:
        return
    found = {}
    first, *others = gather_lists([flat_settings(config)])
    for rank, own in enumerate(others, start=1):
        for key in {**first, **own}:
            ours, theirs = repr(first.get(key)), repr(own.get(key))
            if ours != theirs and key != "device":
                found.setdefault(key, f"{key} is {ours} in process 0, {theirs} in process {rank}")
    if found:
        raise ConfigError(
            f"the processes have different settings ({'; '.join(found.values())}); start all of them with the same "
            "config and arguments"
        )
    loader, augmentation = config.data.loader, config.data.augmentation
    each, why = (2, ", in pairs for mixup and cutmix") if augmentation.mixup or augmentation.cutmix else (1, "")
    for size in loader.batch_sizes.values():
        if size % (each * processes):
            which = "the batch sizes of " * (loader.naflex is not None) + loader.size_setting
            problem = f"{which} must be a multiple of {each * processes}, got {size}"
            raise ConfigError(f"{problem}: {processes} processes share each batch{why}")


def find_checkpoint(run: Path, config: Config) -> Path | None:
    """The checkpoint to continue from, or None; a ConfigError says why the folder cannot be used."""
    checkpoints = list_checkpoints(run)
    if not checkpoints and not any((run / name).exists() for name in ("metrics.jsonl", "summary.json")):
        return None
    if config.resume == "never":
        raise ConfigError(
            f"output_dir {run} already holds a run, and resume is 'never'; nothing was changed. Choose another "
            "output_dir, or continue that run with --resume auto"
        )
    if not checkpoints and (run / "summary.json").exists():
        raise ConfigError(f"output_dir {run} holds a finished run without its checkpoints; choose another output_dir")
    if not (run / "config.yaml").is_file():
        raise ConfigError(f"output_dir {run} holds other files, and no config.yaml of a run; choose another output_dir")
    try:
        changed = changed_settings(run / "config.yaml", config)
    except ConfigError as error:
        raise ConfigError(f"output_dir {run} holds no run to continue ({error}); choose another output_dir") from error
    if changed:
        listed = "; ".join(f"{key} was {old!r}, now {new!r}" for key, (old, new) in changed.items())
        raise ConfigError(
            f"output_dir {run} holds a run with other settings ({listed}); go back to those, or choose another "
            "output_dir"
        )
    return latest_checkpoint(run)  # None: it stopped before its first checkpoint


def finished_summary(run: Path, step: int, train: TrainConfig) -> dict[str, Any] | None:
    """summary.json of a run that has done all steps, or has stopped early by the same settings, else None."""
    file = run / "summary.json"
    if not file.is_file():
        return None
    summary = json.loads(file.read_text(encoding="utf-8"))
    stopped_early = step == summary["steps"] and summary.get("stopped_early") == early_stopping(train)
    return summary if stopped_early or min(step, summary["steps"]) >= train.steps else None


def early_stopping(train: TrainConfig) -> dict[str, Any]:
    """The settings that decide when a run stops early."""
    return {"keep_best": train.keep_best, "patience": train.patience}


@contextmanager
def locked_folder(run: Path) -> Iterator[None]:
    """Makes and locks the run's folder; a ConfigError if another process trains there."""
    try:
        run.mkdir(parents=True, exist_ok=True)
        lock = os.open(run, os.O_RDONLY)
    except OSError as error:
        raise ConfigError(f"output_dir {run} cannot be written to ({error.strerror}); choose another") from error
    closed_in_fork.add(lock)  # a data worker lives a few seconds longer than a killed run, and would keep the lock
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            taken = f"another process is training in output_dir {run}; wait for it or choose another"
            raise ConfigError(taken) from error
        yield
    finally:
        closed_in_fork.discard(lock)
        os.close(lock)
