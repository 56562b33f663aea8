"""A run's checkpoints: which there are, and whether every file is still as it was written.

RUN/checkpoints/step_000450/manifest.json is written last: the size and SHA-256 of every other file, and its own hash.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import stat
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from vmoe.utils.files import parse_json

MANIFEST, TRAINER = "manifest.json", "trainer.json"
FORMAT = 1
MAX_MANIFEST_BYTES = 2**28  # far more than any checkpoint needs
UNFINISHED = ".unfinished"


def list_checkpoints(run: Path) -> list[Path]:
    """The finished checkpoints of a run's folder, oldest step first."""
    return sorted((f for f in (run / "checkpoints").glob("step_*") if _in_run(f) and f.is_dir()), key=step_of)


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a run's checkpoint, even a damaged one, or a copy of one with its manifest."""
    return _in_run(folder.resolve()) or all((folder / name).exists() for name in (MANIFEST, TRAINER))


def _in_run(folder: Path) -> bool:
    return folder.parent.name == "checkpoints" and re.fullmatch(r"step_[0-9]+", folder.name) is not None


def step_of(checkpoint: Path) -> int:
    """The optimizer steps done when a checkpoint was written."""
    return int(checkpoint.name.removeprefix("step_"))


def describe_files(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """{name: {"size": bytes, "sha256": hexadecimal}} of files, as the manifest lists them."""
    return {name: {"size": (folder / name).stat().st_size, "sha256": _sha256(folder / name)} for name in names}


def write_manifest(folder: Path, facts: dict[str, Any], files: dict[str, dict[str, Any]]) -> Path:
    """Writes a folder's manifest: facts for its readers, and the `describe_files` of all its files."""
    file = folder / MANIFEST
    file.write_bytes(_encode({"format": FORMAT, **facts, "files": files}))
    return file


def read_manifest(folder: Path) -> dict[str, Any]:
    """A folder's manifest; an OSError or ValueError says why it cannot be read or how it is damaged."""
    file = folder / MANIFEST
    if not stat.S_ISREG(file.lstat().st_mode):
        raise ValueError("it is not a plain file")
    if file.stat().st_size > MAX_MANIFEST_BYTES:
        raise ValueError(f"it has {file.stat().st_size} bytes")
    content = file.read_bytes()
    try:
        manifest = parse_json(content)
        # To the byte: a changed space is a changed file too.
        if _encode({key: value for key, value in manifest.items() if key != "sha256"}) != content:
            raise ValueError("its content does not have the SHA-256 that it names")
        if manifest["format"] != FORMAT:
            raise ValueError(f"its format is {manifest['format']!r}, this version of vmoe reads {FORMAT}")
        for entry in manifest["files"].values():
            if not (isinstance(entry["size"], int) and isinstance(entry["sha256"], str)):
                raise ValueError("its list of files cannot be read")
    except (AttributeError, KeyError, TypeError, RecursionError) as error:
        raise ValueError("it is not a manifest of vmoe") from error
    return manifest


def find_problems(folder: Path, share: tuple[int, int] = (0, 1), only: str = "") -> list[str]:
    """What is wrong with a checkpoint, a sentence for each file. A folder that no run wrote needs no manifest. `share`
    is (rank, number of processes) that hash the files together, `only` the file or folder in `folder` to check."""
    if not (folder / MANIFEST).is_symlink() and not (folder / MANIFEST).exists():
        of_a_run = any((folder / name).exists() for name in (TRAINER, "optimizer.safetensors", "model"))
        if of_a_run or _in_run(folder.resolve()):
            return [f"{MANIFEST} is missing"]
        return [] if (folder / "model.safetensors").is_file() else ["model.safetensors is missing"]
    try:
        listed = read_manifest(folder)["files"]
        files = [each for each in folder.rglob("*") if each.is_symlink() or not each.is_dir()]
        found = {each.relative_to(folder).as_posix(): each.lstat() for each in files}
    except OSError as error:  # also files that the run that wrote them removed meanwhile
        return [f"{Path(error.filename or MANIFEST).name} cannot be read ({error.strerror})"]
    except ValueError as error:
        return [f"{MANIFEST} is damaged: {error}"]
    problems, to_hash = [], []
    for name in sorted({*found, *listed} - {MANIFEST}):
        status, expected = found.get(name), listed.get(name)
        if only and name != only and not name.startswith(f"{only}/"):
            continue
        if status is None:
            problems.append(f"{name} is missing")
        elif expected is None:
            problems.append(f"{name} is not one of its files")
        elif not stat.S_ISREG(status.st_mode):
            problems.append(f"{name} is not a plain file")
        elif status.st_size != expected["size"]:
            problems.append(f"{name} has {status.st_size} bytes instead of {expected['size']}")
        else:
            to_hash.append(name)
    rank, world = share
    for name in sorted(to_hash, key=lambda name: -listed[name]["size"])[rank::world]:
        try:
            if _sha256(folder / name) != listed[name]["sha256"]:
                problems.append(f"{name} does not have the SHA-256 with which it was written")
        except OSError as error:
            problems.append(f"{name} cannot be read ({error.strerror})")
    return problems


def newest_complete(
    checkpoints: list[Path], logger: logging.Logger | None, find: Callable[[Path], list[str]] = find_problems
) -> Path | None:
    """The newest of some checkpoints, oldest first, without problems, or None. Damaged ones are named in warnings, but
    without a logger, where another process gives them."""
    damaged: dict[Path, list[str]] = {}
    found = next((each for each in reversed(checkpoints) if not damaged.setdefault(each, find(each))), None)
    instead = f"{found.name} is used instead" if found else "there is no other one"
    for checkpoint, problems in damaged.items():
        if problems and logger is not None:
            more = f", and {len(problems) - 1} more" if problems[1:] else ""
            logger.warning("%s is damaged (%s%s); %s", checkpoint, problems[0], more, instead)
    return found


def _encode(manifest: dict[str, Any]) -> bytes:
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    return (json.dumps({**manifest, "sha256": digest}, sort_keys=True, indent=1) + "\n").encode()


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
