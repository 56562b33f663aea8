"""Checkpoint folders of a run: which there are, and whether all that was written into one is still there, bit by bit.

    RUN/checkpoints/step_000450/manifest.json    every other file of the folder with its size and SHA-256

The manifest is written last, and holds the hash of its own content. So a file that is truncated, changed, missing or
was added is found and named.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import stat
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from vmoe.utils.safe_json import parse_json

MANIFEST = "manifest.json"
FORMAT = 1
MAX_MANIFEST_BYTES = 2**28  # far more than the files of any checkpoint need
UNFINISHED = ".unfinished"
TRAINER, OLD_TRAINER = "trainer.json", "trainer.pt"  # the second one of versions without a manifest


def list_checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run's folder, oldest step first; not those that were never finished."""
    folders = (run / "checkpoints").glob("step_*")
    return sorted((f for f in folders if re.fullmatch(r"step_[0-9]+", f.name) and f.is_dir()), key=step_of)


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a run's checkpoint, be it damaged, or a copy of one with its manifest."""
    return _in_run(folder) or all((folder / name).exists() for name in (MANIFEST, TRAINER))


def _in_run(folder: Path) -> bool:
    folder = folder.resolve()
    return folder.parent.name == "checkpoints" and re.fullmatch(r"step_[0-9]+", folder.name) is not None


def step_of(checkpoint: Path) -> int:
    """The number of optimizer steps behind a checkpoint's folder."""
    return int(checkpoint.name.removeprefix("step_"))


def describe_files(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """{name: {"size": bytes, "sha256": hexadecimal}} of files, as the manifest lists them."""
    return {name: {"size": (folder / name).stat().st_size, "sha256": _sha256(folder / name)} for name in names}


def write_manifest(folder: Path, facts: dict[str, Any], files: dict[str, dict[str, Any]]) -> Path:
    """Writes the manifest of a folder.

    Args:
        folder: of the checkpoint.
        facts: JSON-able, of interest to readers (world size, mesh).
        files: of `describe_files`; all in the folder.

    Returns:
        The manifest's file.
    """
    file = folder / MANIFEST
    file.write_bytes(_encode({"format": FORMAT, **facts, "files": files}))
    return file


def read_manifest(folder: Path) -> dict[str, Any]:
    """The content of a folder's manifest.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged; the message says how.
    """
    file = folder / MANIFEST
    if not stat.S_ISREG(file.lstat().st_mode):
        raise ValueError("it is not a plain file")
    if file.stat().st_size > MAX_MANIFEST_BYTES:
        raise ValueError(f"it has {file.stat().st_size} bytes")
    content = file.read_bytes()
    try:
        manifest = parse_json(content.decode("utf-8"))
        # To the byte: a changed space is a changed file too.
        if _encode({key: value for key, value in manifest.items() if key != "sha256"}) != content:
            raise ValueError("its content does not have the SHA-256 that it names")
        if manifest["format"] != FORMAT:
            raise ValueError(f"its format is {manifest['format']!r}, this version of vmoe reads {FORMAT}")
        for name, entry in manifest["files"].items():
            if not (isinstance(name, str) and isinstance(entry["size"], int) and isinstance(entry["sha256"], str)):
                raise ValueError("its list of files cannot be read")
    except (AttributeError, KeyError, TypeError, RecursionError) as error:
        raise ValueError("it is not a manifest of vmoe") from error
    except UnicodeDecodeError as error:
        raise ValueError("it is not text") from error
    return manifest


def find_problems(folder: Path, share: tuple[int, int] = (0, 1), only: str = "") -> list[str]:
    """What is wrong with a checkpoint, a sentence for each file; none if it is as it was written.

    Args:
        folder: of the checkpoint. One of an older version of vmoe has no manifest, and nothing to compare with; in
            a run it is known by its trainer.pt.
        share: (process, number of processes): hashes this process's share of the files. Together they hash all.
        only: a file, or a folder of files, in `folder`; all else is not looked at.
    """
    if not (folder / MANIFEST).is_symlink() and not (folder / MANIFEST).exists():
        newer = any((folder / name).exists() for name in (TRAINER, "optimizer.safetensors", "model"))
        if newer or (_in_run(folder) and not (folder / OLD_TRAINER).is_file()):
            return [f"{MANIFEST} is missing"]
        return [] if (folder / "model.safetensors").is_file() else ["model.safetensors is missing"]
    try:
        manifest = read_manifest(folder)
    except OSError as error:
        return [f"{MANIFEST} cannot be read ({error.strerror})"]
    except ValueError as error:
        return [f"{MANIFEST} is damaged: {error}"]
    try:
        found = _files(folder)
    except OSError as error:
        return [f"{error.filename} cannot be read ({error.strerror})"]
    listed = manifest["files"]
    wanted = [name for name in {**found, **listed} if not only or name == only or name.startswith(f"{only}/")]
    problems, whole = [], []
    for name in sorted(wanted):
        status = found.get(name)
        if status is None:
            problems.append(f"{name} is missing")
        elif name not in listed:
            problems.append(f"{name} is not one of its files")
        elif not stat.S_ISREG(status.st_mode):
            problems.append(f"{name} is not a plain file")
        elif status.st_size != listed[name]["size"]:
            problems.append(f"{name} has {status.st_size} bytes instead of {listed[name]['size']}")
        else:
            whole.append(name)
    rank, world = share
    for name in sorted(whole, key=lambda name: -listed[name]["size"])[rank::world]:
        try:
            if _sha256(folder / name) != listed[name]["sha256"]:
                problems.append(f"{name} does not have the SHA-256 with which it was written")
        except OSError as error:
            problems.append(f"{name} cannot be read ({error.strerror})")
    return problems


def newest_whole(
    checkpoints: list[Path], logger: logging.Logger | None, find: Callable[[Path], list[str]] = find_problems
) -> Path | None:
    """The newest checkpoint in which nothing is wrong; damaged ones are named in a warning.

    Args:
        checkpoints: oldest first.
        logger: for the warnings; None: another process says them.
        find: gives what is wrong with a checkpoint.

    Returns:
        None if there is none.
    """
    found, damaged = None, []
    for checkpoint in reversed(checkpoints):
        problems = find(checkpoint)
        if not problems:
            found = checkpoint
            break
        more = f", and {len(problems) - 1} more" if len(problems) > 1 else ""
        damaged.append(f"{checkpoint} is damaged ({problems[0]}{more})")
    for damage in damaged if logger is not None else ():
        logger.warning("%s; %s", damage, f"{found.name} is used instead" if found else "there is no other one")
    return found


def _encode(manifest: dict[str, Any]) -> bytes:
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    return (json.dumps({**manifest, "sha256": digest}, sort_keys=True, indent=1) + "\n").encode()


def _files(folder: Path) -> dict[str, os.stat_result]:
    """{name below the folder, with "/": its status} of all that is no folder, but for the manifest; follows no link."""
    found = {}
    open_folders = [folder]
    while open_folders:
        with os.scandir(open_folders.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    open_folders.append(Path(entry.path))
                else:
                    name = Path(entry.path).relative_to(folder).as_posix()
                    found[name] = entry.stat(follow_symlinks=False)
    found.pop(MANIFEST, None)
    return found


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
