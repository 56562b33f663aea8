"""Tensors that a model computed, cached on disk under a key that says all that they depend on.

A file holds its key in clear and a checksum; one that is damaged or of another key is computed again. Files may be
deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vmoe.utils.files import atomic_file

logger = logging.getLogger("vmoe.evaluation")


def read_tensors(file: Path, key: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """(tensors, notes) as `write_tensors` got them; None if there is no file, or (with a warning) no usable one."""
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
        logger.warning("%s cannot be used (%s) and is made again", file, error)
        return None


def write_tensors(file: Path, key: str, tensors: Mapping[str, Tensor], notes: Mapping[str, Any] | None = None) -> None:
    """Writes a file atomically, with notes as JSON; a warning says if it cannot be written."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(notes or {})
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(file) as temporary:
            metadata = {"key": key, "notes": text, "sha256": _checksum(tensors, text)}
            save_file(tensors, temporary, metadata=metadata)
    except (OSError, SafetensorError) as error:
        logger.warning("%s cannot be written (%s): it will be computed again", file, error)


def _checksum(tensors: Mapping[str, Tensor], notes: str) -> str:
    digest = hashlib.sha256(notes.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(memoryview(tensor.contiguous().numpy()).cast("B"))
    return digest.hexdigest()
