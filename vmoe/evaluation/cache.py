"""Extracted features on disk, in a file per key: the key is the JSON of all that they depend on."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vmoe.data import ImageDataset, LoaderConfig
from vmoe.evaluation.loaded_model import LoadedModel, weights_fingerprint
from vmoe.evaluation.results_file import library_versions
from vmoe.models.spec import model_spec
from vmoe.moe import SparseMoE
from vmoe.utils.files import atomic_file

logger = logging.getLogger("vmoe.evaluation")


def feature_key(loaded: LoadedModel, dataset: ImageDataset, loader_config: LoaderConfig) -> str:
    """All that the features of a data set depend on; equal texts mean equal features."""
    layers = [module for module in loaded.model.modules() if isinstance(module, SparseMoE)]
    # With one of these an image's features may depend on the rest of its batch.
    limited = any(layer.capacity or layer.eval_capacity_factor or layer.group_size for layer in layers)
    package = Path(__file__).parents[1]
    code = sorted(file for name in ("data", "models", "moe") for file in (package / name).rglob("*.py"))
    code.append(package / "evaluation" / "features.py")
    facts = {
        "weights": weights_fingerprint(loaded.weights),
        "model": model_spec(loaded.model),
        "routing": [asdict(layer.settings) for layer in layers],
        "precision": loaded.precision,
        "device": loaded.device.type,
        "transform": " ".join(repr(loaded.transform).split()),
        "data": dataset.fingerprint(),
        "reading": dataset.reading._asdict(),
        "on_bad": loader_config.on_bad or "fail",
        "batch_size": loader_config.batch_size if limited else None,
        "versions": library_versions(),
        "code": hashlib.sha256(b"".join(file.read_bytes() for file in code)).hexdigest(),
    }
    return json.dumps(facts, indent=1, sort_keys=True)


def cache_file(folder: Path, key: str) -> Path:
    return folder / f"features_{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"


def read_cache(file: Path, key: str) -> dict[str, Any] | None:
    """What `write_cache` got; None if there is no file, or (with a warning) a damaged one."""
    if not file.exists():
        return None
    try:
        with safe_open(file, "pt") as stream:
            metadata = stream.metadata() or {}
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118  (no mapping)
        if metadata["sha256"] != _checksum(key, tensors, metadata["skipped_paths"]):
            raise ValueError("its checksum is wrong")
        return {**tensors, "skipped_paths": json.loads(metadata["skipped_paths"])}
    except (OSError, SafetensorError, ValueError, TypeError, KeyError) as error:
        logger.warning("%s cannot be used (%s) and is made again", file, error)
        return None


def write_cache(file: Path, key: str, tensors: dict[str, Tensor], skipped_paths: list[str]) -> None:
    """Writes a file atomically, with the key in clear; a warning says if it cannot be written."""
    skipped = json.dumps(skipped_paths)
    metadata = {"key": key, "skipped_paths": skipped, "sha256": _checksum(key, tensors, skipped)}
    try:
        with atomic_file(file) as temporary:
            save_file(tensors, temporary, metadata)
    except (OSError, SafetensorError) as error:
        logger.warning("%s cannot be written (%s): the features will be computed again", file, error)


def _checksum(key: str, tensors: dict[str, Tensor], skipped: str) -> str:
    digest = hashlib.sha256(f"{key}{skipped}".encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(memoryview(tensor.contiguous().numpy()).cast("B"))
    return digest.hexdigest()
