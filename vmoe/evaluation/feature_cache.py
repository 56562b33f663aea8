"""Tensors that a model made, kept on disk under a key: the text of all that they depend on.

A file holds its key in clear and a checksum, so that it is either just what is asked for, or it is made anew. Files may
be deleted at any time.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vmoe.evaluation.loaded_model import Subject, weights_fingerprint
from vmoe.evaluation.results_file import library_versions
from vmoe.models.spec import model_spec
from vmoe.moe import SparseMoE

logger = logging.getLogger("vmoe.evaluation")


def subject_facts(subject: Subject) -> dict[str, Any]:
    """All of a model and its surroundings that its results depend on, as JSON can hold it."""
    layers = {name: layer for name, layer in subject.model.named_modules() if isinstance(layer, SparseMoE)}
    return {
        "weights": weights_fingerprint(subject.weights),
        "model": model_spec(subject.model),
        "routing": {name: dataclasses.asdict(layer.settings) for name, layer in layers.items()},
        "precision": subject.precision,
        "device": subject.device.type,
        "versions": library_versions(),
        "code": _code_fingerprint(),
    }


@functools.cache
def _code_fingerprint() -> str:
    """SHA-256 of the source of models, layers and data."""
    package = Path(__file__).parents[1]
    files = sorted(file for name in ("data", "models", "moe") for file in (package / name).glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def key_text(facts: Mapping[str, Any]) -> str:
    """The facts as a key: equal facts give equal text."""
    return json.dumps(facts, indent=1, sort_keys=True)


def file_of_key(folder: Path, kind: str, key: str) -> Path:
    """Where the tensors of a key lie."""
    return folder / f"{kind}_{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"


def read_tensors(file: Path, key: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """(tensors, notes) as `write_tensors` got them; None if there is no file, or (with a warning) none to trust."""
    if not file.exists():
        return None
    try:
        with safe_open(file, "pt") as stream:
            metadata = stream.metadata() or {}
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118  (no mapping)
        if metadata.get("key") != key:
            raise ValueError("it is of another key")
        if metadata.get("sha256") != _checksum(tensors, metadata["notes"]):
            raise ValueError("its checksum is wrong")
        return tensors, json.loads(metadata["notes"])
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        logger.warning("%s cannot be used (%s) and is made anew", file, error)
        return None


def write_tensors(file: Path, key: str, tensors: Mapping[str, Tensor], notes: Mapping[str, Any] | None = None) -> None:
    """Writes a file whole or not at all; if it cannot be written, a warning says so.

    Args:
        file: see `file_of_key`.
        key: see `key_text`.
        tensors: on any device; written as they are on the CPU.
        notes: JSON-able, kept beside them.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(notes or {})
    metadata = {"key": key, "notes": text, "sha256": _checksum(tensors, text)}
    temporary = None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
        os.close(handle)
        save_file(tensors, temporary, metadata=metadata)
        os.chmod(temporary, 0o644)
        os.replace(temporary, file)
    except (OSError, SafetensorError) as error:
        logger.warning("%s cannot be written (%s): it will be computed again", file, error)
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def _checksum(tensors: Mapping[str, Tensor], notes: str) -> str:
    """SHA-256 of the notes and of the tensors' names, types, shapes and bytes."""
    digest = hashlib.sha256(notes.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(memoryview(tensor.contiguous().numpy()).cast("B"))
    return digest.hexdigest()
