"""Class embeddings kept on disk: the prompts of one model and one list of names are encoded once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from vmoe.data.sources.emoji import cache_folder
from vmoe.data.texts import CutTexts, warn_once
from vmoe.evaluation.feature_cache import file_of_key, key_text, read_tensors, subject_facts, write_tensors
from vmoe.evaluation.inference import evaluating
from vmoe.evaluation.loaded_model import Subject
from vmoe.evaluation.zero_shot import Template, check_class_names, encode_classes, fill, resolve_templates

CACHE_FORMAT = 3  # raise it whenever `encode_classes` changes
TENSOR = "class_embeddings_DC"


def cached_classes(
    subject: Subject, class_names: Sequence[str], templates: Sequence[Template] | str | None = None
) -> Tensor:
    """What `encode_classes` gives for a checkpoint, kept in the cache folder ($VMOE_CACHE, else ~/.cache/vmoe).

    The key is the weights' file, the model's settings as they are now, the prompts, how the tokenizer reads the names,
    and the arithmetic; see `subject_facts`.

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
    key = key_text(
        {
            **subject_facts(subject),
            "format": CACHE_FORMAT,
            "class_names": names,
            "prompts": _digest([[fill(template, name) for template in texts] for name in names]),
            "tokens": _digest(subject.tokenizer(names).tolist()),
        }
    )
    file = file_of_key(cache_folder() / "zero_shot", "classes", key)
    kept = read_tensors(file, key)
    if kept is not None:
        warn_once(kept[1]["cut"])
        return kept[0][TENSOR].to(subject.device)
    tokenizer = CutTexts(subject.tokenizer)
    with evaluating(subject.model, subject.device, subject.precision):
        weights_DC = encode_classes(subject.model, tokenizer, names, texts, subject.device)
    write_tensors(file, key, {TENSOR: weights_DC}, {"cut": tokenizer.message("prompts")})
    return weights_DC


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
