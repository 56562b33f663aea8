"""Tensors that a model computed, cached on disk under a key: the JSON of all that they depend on.

A file holds its key in clear and a checksum; one that is damaged or of another key is computed again. Files may be
deleted at any time.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vmoe.evaluation.loaded_model import LoadedModel, weights_fingerprint
from vmoe.evaluation.results_file import library_versions
from vmoe.models.spec import model_spec
from vmoe.moe import SparseMoE
from vmoe.utils.files import atomic_file

logger = logging.getLogger("vmoe.evaluation")


def model_facts(loaded: LoadedModel) -> dict[str, Any]:
    """All that the outputs of a loaded model depend on, as JSON can hold it."""
    layers = {name: layer for name, layer in loaded.model.named_modules() if isinstance(layer, SparseMoE)}
    return {
        "weights": weights_fingerprint(loaded.weights),
        "model": model_spec(loaded.model),
        "routing": {name: dataclasses.asdict(layer.settings) for name, layer in layers.items()},
        "precision": loaded.precision,
        "device": loaded.device.type,
        "versions": library_versions(),
        "code": _code_fingerprint(),
    }


@functools.cache
def _code_fingerprint() -> str:
    """SHA-256 of the source of models, layers and data."""
    package = Path(__file__).parents[1]
    files = sorted(file for name in ("data", "models", "moe") for file in (package / name).rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def key_text(facts: Mapping[str, Any]) -> str:
    """The facts as a key: equal facts give equal text."""
    return json.dumps(facts, indent=1, sort_keys=True)


def file_of_key(folder: Path, kind: str, key: str) -> Path:
    """The file that caches the tensors of a key."""
    return folder / f"{kind}_{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"


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
    """Writes a file of `file_of_key` atomically, with notes as JSON; a warning says if it cannot be written."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(notes or {})
    metadata = {"key": key, "notes": text, "sha256": _checksum(tensors, text)}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(file) as temporary:
            save_file(tensors, temporary, metadata=metadata)
    except (OSError, SafetensorError) as error:
        logger.warning("%s cannot be written (%s): it will be computed again", file, error)


def _checksum(tensors: Mapping[str, Tensor], notes: str) -> str:
    """SHA-256 of the notes and of the tensors' names, types, shapes and bytes."""
    digest = hashlib.sha256(notes.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(memoryview(tensor.contiguous().numpy()).cast("B"))
    return digest.hexdigest()
