"""Class embeddings kept on disk: the prompts of one model and one list of names are encoded once."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vmoe.data.emoji import cache_folder
from vmoe.evaluation.inference import evaluating
from vmoe.evaluation.report import library_versions
from vmoe.evaluation.subject import Subject, weights_fingerprint
from vmoe.evaluation.zero_shot import Template, check_class_names, encode_classes, fill, resolve_templates
from vmoe.models.factory import model_spec
from vmoe.moe import SparseMoE

logger = logging.getLogger("vmoe.evaluation")

CACHE_FORMAT = 1  # raise it whenever `encode_classes` changes
TENSOR = "class_embeddings_DC"


def cached_classes(
    subject: Subject, class_names: Sequence[str], templates: Sequence[Template] | str | None = None
) -> Tensor:
    """What `encode_classes` gives for a checkpoint, kept in the cache folder ($VMOE_CACHE, else ~/.cache/vmoe).

    A file that cannot be read is made anew; a folder that cannot be written to only costs the time.

    Args:
        subject: an image-text model, its weights as in its file.
        class_names: see `encode_classes`.
        templates: see `resolve_templates`.

    Returns:
        (D, C) float32 on the subject's device, unit columns.

    Raises:
        ValueError: bad names or templates.
    """
    names, texts = check_class_names(class_names), resolve_templates(templates)
    file = cache_folder() / "zero_shot" / f"{cache_key(subject, names, texts)}.safetensors"
    kept_DC = _read(file, len(names))
    if kept_DC is not None:
        return kept_DC.to(subject.device)
    with evaluating(subject.model, subject.device, subject.precision):
        weights_DC = encode_classes(subject.model, subject.tokenizer, names, texts, subject.device)
    try:
        _write(file, weights_DC)
    except OSError as error:
        logger.warning("class embeddings are not kept: cannot write %s (%s)", file, error.strerror)
    return weights_DC


def cache_key(subject: Subject, names: Sequence[str], templates: Sequence[Template]) -> str:
    """SHA-256, in hexadecimal, of all that class embeddings depend on.

    These are the weights' file, the model's settings as they are now, the prompts, how the tokenizer reads the names,
    and the arithmetic: precision, kind of device, versions of the libraries, and this package's own code of models.
    """
    layers = {name: layer for name, layer in subject.model.named_modules() if isinstance(layer, SparseMoE)}
    content = {
        "format": CACHE_FORMAT,
        "weights": weights_fingerprint(subject.weights),
        "model": model_spec(subject.model),
        "layers": {name: dataclasses.asdict(layer.settings) for name, layer in layers.items()},
        "prompts": [[fill(template, name) for template in templates] for name in names],
        "tokens": subject.tokenizer(list(names)).tolist(),
        "precision": subject.precision,
        "device": subject.device.type,
        "versions": {name: library_versions()[name] for name in ("torch", "timm", "open_clip_torch")},
        "code": _code_fingerprint(),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


@functools.cache
def _code_fingerprint() -> str:
    """SHA-256 of the source of vmoe.models and vmoe.moe."""
    package = Path(__file__).parents[1]
    files = sorted(file for name in ("models", "moe") for file in (package / name).glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _read(file: Path, num_classes: int) -> Tensor | None:
    """The embeddings in a cache file; None if there is none or it is broken."""
    if not file.is_file():
        return None
    try:
        weights_DC = load_file(file)[TENSOR]
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        logger.warning("%s is broken (%s) and is written anew", file, error)
        return None
    fits = weights_DC.ndim == 2 and weights_DC.shape[1] == num_classes and weights_DC.dtype == torch.float32
    return weights_DC if fits else None


def _write(file: Path, weights_DC: Tensor) -> None:
    """Writes the file whole or not at all, also when several processes do it at once."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=".zero_shot_", suffix=".safetensors")
    os.close(handle)
    try:
        save_file({TENSOR: weights_DC.cpu().contiguous()}, temporary)
        os.replace(temporary, file)
    finally:
        Path(temporary).unlink(missing_ok=True)
