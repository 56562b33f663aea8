"""Frozen features of images, for few-shot regression, the linear probe and nearest neighbours.

Shapes, by suffix: N images, B batch, D features.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple
from zipfile import BadZipFile

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn

from vmoe.data import ImageDataset, LoaderConfig, build_dataset, eval_loader
from vmoe.data.sources.emoji import cache_folder
from vmoe.distributed.process_group import gather_lists
from vmoe.evaluation.class_names import check_same_classes
from vmoe.evaluation.classification import num_skipped
from vmoe.evaluation.config import EvaluationConfig
from vmoe.evaluation.inference import evaluating
from vmoe.evaluation.loaded_model import LoadedModel, weights_fingerprint
from vmoe.evaluation.results_file import Outcome, Progress, library_versions
from vmoe.evaluation.synchronized import Rows
from vmoe.models.factory import is_contrastive
from vmoe.models.spec import model_spec
from vmoe.moe import SparseMoE
from vmoe.utils.config import ConfigError
from vmoe.utils.files import atomic_file, is_writable
from vmoe.utils.world import world

logger = logging.getLogger("vmoe.evaluation")


class Features(NamedTuple):
    """Features of a data set, in its order, on the CPU."""

    features_ND: Tensor  # float32
    labels_N: Tensor  # long, classes
    index_N: Tensor  # long, positions in the data set (those of skipped images are missing)
    skipped_paths: list[str]  # images that could not be read


def extract_features(
    loaded: LoadedModel,
    dataset: ImageDataset,
    loader_config: LoaderConfig,
    *,
    cache: Path | None = None,
    console: Console | None = None,
) -> Features:
    """Features of all images of a data set; all processes of `torchrun` share the work and get the same rows.

    `cache` is the folder where the first process looks for features of the same key, or writes them; None: no cache.

    Raises:
        ValueError: the data set has no classes or gave no image, or the features are no vectors or not finite.
        ConfigError: the cache folder cannot be written to.
        BadSample: an unreadable image, unless `loader_config.on_bad` is "skip".
    """
    if dataset.classes is None:
        raise ValueError("features are taken of images with labels, and this data set has no classes")
    file, cached = None, []
    if cache is not None and world()[0] == 0:
        if not is_writable(cache):
            raise ConfigError(f"features.cache {cache} cannot be written to: give another folder, or null for no cache")
        key = features_key(loaded, dataset, loader_config)
        file = cache / f"features_{hashlib.sha256(key.encode()).hexdigest()[:32]}.npz"
        cached = [_read(file)]
    for stored in gather_lists(cached):
        if stored is not None:
            return stored
    loader = eval_loader(dataset, loaded.transform, None, loader_config)
    rows = Rows()
    with evaluating(loaded.model, loaded.device, loaded.precision):
        for batch in Progress(loader, "features", console or Console(quiet=True)):
            features_BD = image_features(loaded.model, batch["image"].to(loaded.device)).float()
            rows.add(batch["index"], features_ND=features_BD, labels_N=batch["label"])
    index_N, columns = rows.gather()
    num_skipped(loader, len(index_N))
    if unusable := int((~columns["features_ND"].isfinite()).any(1).sum()):
        problem = f"those of {unusable} of {len(index_N)} images hold NaN or infinity"
        raise ValueError(f"features must be finite, and {problem}; precision is {loaded.precision!r}: try float32")
    found = Features(**columns, index_N=index_N, skipped_paths=sorted(gather_lists(list(loader.skipped_paths))))
    if file is not None:
        _write(file, key, found)
    return found


def image_features(model: nn.Module, images_B3HW: Tensor) -> Tensor:
    """(B, D) features.

    A classifier gives what its last linear layer reads (the pre-logits), as in the reference's few-shot evaluation, an
    ensemble the mean of its members'; an image-text model its image embedding, not normalised, as CLIP's linear probe
    takes it.
    """
    if is_contrastive(model):
        features_BD = model.encode_image(images_B3HW, normalize=False)
    else:
        features_BD = model.forward_head(model.forward_features(images_B3HW), pre_logits=True)
        if (copies := getattr(model, "ensemble_size", 1)) > 1:
            features_BD = features_BD.unflatten(0, (-1, copies)).mean(1)
    if features_BD.ndim != 2:
        shape = tuple(features_BD.shape)
        raise ValueError(f"features must be (batch, features), got {shape}: build the model with a pooling layer")
    return features_BD


def fit_and_test_features(
    config: EvaluationConfig, loaded: LoadedModel, test_dataset: ImageDataset, console: Console
) -> tuple[Features, Features]:
    """Features of `train_data`, that a classifier is fitted on, and of the data that it is tested on.

    ConfigError: their classes differ. ValueError: a class that is tested has no training example.
    """
    train_dataset = build_dataset(config.train_data, "train_data")
    trained, tested = train_dataset.classes, test_dataset.classes
    if trained is None:
        raise ConfigError("train_data has no classes: give data with labels")
    check_same_classes("data", tested, "train_data", trained)
    folder = config.features.cache
    cache = cache_folder() / "features" if folder == "auto" else Path(folder) if folder else None
    train, test = (
        extract_features(loaded, dataset, config.loader, cache=cache, console=console)
        for dataset in (train_dataset, test_dataset)
    )
    absent = sorted(set(test.labels_N.tolist()) - set(train.labels_N.tolist()))
    if absent:
        names = ", ".join(repr(tested[label]) for label in absent[:5])
        problem = f"{len(absent)} of the classes that are tested have no training example, among them {names}"
        raise ValueError(f"{problem}: add some, or remove these classes from both data sets")
    return train, test


def feature_outcome(results: dict[str, float | int], details: dict, train: Features, test: Features) -> Outcome:
    """The outcome of a task on features, with its counts of samples and its skipped images."""
    counts = {"num_samples": len(test.labels_N), "num_skipped": len(test.skipped_paths)}
    skipped = {"num_train_samples": len(train.labels_N), "skipped": train.skipped_paths + test.skipped_paths}
    return Outcome(results | counts, details | skipped)


# --- the cache: a file for each key, which is the JSON of all that the features depend on ---


def features_key(loaded: LoadedModel, dataset: ImageDataset, loader_config: LoaderConfig) -> str:
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


def _read(file: Path) -> Features | None:
    """What `_write` got; None if there is no file, or (with a warning) a damaged one, as zip's checksums tell."""
    if not file.exists():
        return None
    try:
        with np.load(file) as content:
            tensors = {name: torch.from_numpy(content[name]) for name in Features._fields[:3]}
            return Features(**tensors, skipped_paths=json.loads(str(content["skipped_paths"])))
    except (OSError, EOFError, BadZipFile, RuntimeError, ValueError, TypeError, KeyError) as error:
        logger.warning("%s cannot be used (%s) and is made again", file, error)
        return None


def _write(file: Path, key: str, features: Features) -> None:
    """Writes a file atomically, with the key; a warning says if it cannot be written."""
    arrays = {name: tensor.numpy() for name, tensor in zip(Features._fields, features[:3])}
    try:
        with atomic_file(file) as temporary:
            np.savez(temporary, key=key, skipped_paths=json.dumps(features.skipped_paths), **arrays)
    except OSError as error:
        logger.warning("%s cannot be written (%s): the features will be computed again", file, error)
