"""Frozen features of pictures, kept on disk, for few-shot regression, the linear probe and nearest neighbours.

A classifier gives what its last linear layer reads (the pre-logits), as in the reference's few-shot evaluation; an
image-text model its image embedding at full length, as CLIP's linear probe takes it. The tasks that want rows of length
1 scale them.

Shapes, by suffix: N pictures, B batch, D features.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vmoe.config_io import ConfigError
from vmoe.data import ImageDataset, LoaderConfig, SourceConfig, build_dataset, eval_loader
from vmoe.data.emoji import cache_folder
from vmoe.evaluation.config import EvaluationConfig
from vmoe.evaluation.distributed import gather_lists, gather_rows, world
from vmoe.evaluation.inference import evaluating
from vmoe.evaluation.report import Progress, library_versions
from vmoe.evaluation.subject import Subject, weights_fingerprint
from vmoe.models.factory import is_contrastive, model_spec
from vmoe.moe.layer import SparseMoE

logger = logging.getLogger("vmoe.evaluation")

CACHE_FORMAT = 1  # raise it whenever the same model would give other features
TENSORS = ("features", "labels", "index")


class Features(NamedTuple):
    """Features of a data set, in its order, on the CPU.

    Attributes:
        features_ND: (N, D) float32.
        labels_N: (N,) long, classes.
        index_N: (N,) long, places in the data set (some are missing where pictures were skipped).
        skipped_paths: pictures that could not be read.
    """

    features_ND: Tensor
    labels_N: Tensor
    index_N: Tensor
    skipped_paths: list[str]


def extract_features(
    subject: Subject,
    dataset: ImageDataset,
    loader_config: LoaderConfig,
    *,
    cache: Path | None = None,
    console: Console | None = None,
    description: str = "features",
) -> Features:
    """Features of all pictures of a data set; all processes of `torchrun` share the work and get the same rows.

    With a cache the rows are read from disk if a file of the same key is there: weights, model and routing settings,
    transform, precision, kind of device, data and library versions. The ingredients of the key lie in the file's
    metadata. Only the first process reads and writes.

    Args:
        subject: the model.
        dataset: has classes.
        loader_config: batches and workers; the features do not depend on them, unless experts have limited room in
            evaluation (then the batch size is part of the key).
        cache: folder of the cache; None: no cache.
        console: for the progress bar; None: no bar.
        description: in front of the bar.

    Raises:
        ValueError: the data set has no classes or gave no picture, the features are no vectors or not finite, or the
            cache folder cannot be written to.
        BadSample: an unreadable picture, unless `loader_config.on_bad` is "skip".
    """
    if dataset.classes is None:
        raise ValueError("features are taken of pictures with labels, and this data set has no classes")
    first = world()[0] == 0
    file, key = None, ""
    if cache is not None:
        found = []
        if first:
            key = feature_key(subject, dataset, loader_config)
            file = _cache_file(cache, key)
            found = [_read(file, key)]
        cached = gather_lists(found)[0]
        if cached is not None:
            return cached
    features = _compute(subject, dataset, loader_config, console or Console(quiet=True), description)
    if file is not None:
        _write(features, file, key)
    return features


def _compute(
    subject: Subject, dataset: ImageDataset, loader_config: LoaderConfig, console: Console, description: str
) -> Features:
    loader = eval_loader(dataset, subject.transform, None, loader_config)
    index, labels, features = [torch.empty(0, dtype=torch.long)], [torch.empty(0, dtype=torch.long)], []
    with evaluating(subject.model, subject.device, subject.precision):
        for batch in Progress(loader, description, console):
            features.append(image_features(subject.model, batch["image"].to(subject.device)).float().cpu())
            index.append(batch["index"].cpu())
            labels.append(batch["label"].cpu())
    mine_ND = torch.cat(features) if features else torch.empty(0, 0)
    index_N, rows = gather_rows(torch.cat(index), features=mine_ND, labels=torch.cat(labels))
    skipped = sorted(gather_lists(list(loader.skipped_paths)))
    if not len(index_N):
        raise ValueError(f"nothing to take features of: the data set gave no picture ({len(skipped)} were skipped)")
    unusable = int((~rows["features"].isfinite()).any(1).sum())
    if unusable:
        raise ValueError(
            f"features must be finite, and those of {unusable} of {len(index_N)} pictures hold NaN or infinity; "
            f"precision is {subject.precision!r}, and float32 has the widest range"
        )
    return Features(rows["features"], rows["labels"], index_N, skipped)


def image_features(model: nn.Module, images_B3HW: Tensor) -> Tensor:
    """(B, D): pre-logits of a classifier, or the image embedding (not scaled to length 1) of an image-text model.

    Raises:
        ValueError: the model has neither, or gives something else than a vector per picture.
    """
    if is_contrastive(model):
        features_BD = model.encode_image(images_B3HW, normalize=False)
    elif hasattr(model, "forward_features") and hasattr(model, "forward_head"):
        features_BD = model.forward_head(model.forward_features(images_B3HW), pre_logits=True)
    else:
        raise ValueError(
            f"{type(model).__name__} gives no features: it needs forward_features and forward_head, as timm's models "
            "have them, or encode_image and encode_text, as open_clip's"
        )
    if features_BD.ndim != 2:
        raise ValueError(
            f"{type(model).__name__} gives features of shape {tuple(features_BD.shape)}, expected (batch, features): "
            "build it with a pooling layer"
        )
    return features_BD


# --- the pair of data sets that a task takes ---


def fit_and_test_features(
    config: EvaluationConfig,
    subject: Subject,
    train_source: SourceConfig,
    test_dataset: ImageDataset,
    console: Console,
    name: str = "",
) -> tuple[Features, Features]:
    """Features of what a classifier is fitted on and of what it is tested on.

    Args:
        config: the settings.
        subject: the model.
        train_source: what is fitted on.
        test_dataset: what is tested on.
        console: for the progress bars.
        name: of the pair, for messages; "" where there is only one.

    Raises:
        ConfigError: the two have other classes.
        ValueError: a class that is tested has no training example.
    """
    train_dataset = build_dataset(train_source)
    prefix = f"{name}: " if name else ""
    if train_dataset.classes is None or train_dataset.classes != test_dataset.classes:
        raise ConfigError(prefix + _difference(train_dataset.classes, test_dataset.classes))
    options = {"cache": feature_cache(config), "console": console}
    train, test = (
        extract_features(subject, dataset, config.loader, description=f"{prefix}{part} features", **options)
        for part, dataset in (("train", train_dataset), ("test", test_dataset))
    )
    absent = sorted(set(test.labels_N.tolist()) - set(train.labels_N.tolist()))
    if absent:
        names = ", ".join(repr(test_dataset.classes[label]) for label in absent[:5])
        raise ValueError(
            f"{prefix}{len(absent)} of the classes that are tested have no training example, among them {names}: "
            "add some, or leave these classes out of both data sets"
        )
    return train, test


def _difference(trained: list[str] | None, tested: list[str] | None) -> str:
    """One sentence on two lists of classes that are not the same."""
    if trained is None or tested is None:
        return f"{'train_data' if trained is None else 'data'} has no classes: give data with labels"
    only = [name for name in tested if name not in trained] + [name for name in trained if name not in tested]
    named = f"only one of them has {', '.join(map(repr, only[:5]))}" if only else "the order differs"
    return f"train_data has {len(trained)} classes and data {len(tested)}, and they must be the same: {named}"


def feature_cache(config: EvaluationConfig) -> Path | None:
    """The folder that `features.cache` stands for."""
    setting = config.features.cache
    return cache_folder() / "features" if setting == "auto" else None if setting is None else Path(setting)


# --- the files ---


def feature_key(subject: Subject, dataset: ImageDataset, loader_config: LoaderConfig) -> str:
    """All that the features of a data set depend on, as JSON text; equal texts mean equal features."""
    layers = {name: module for name, module in subject.model.named_modules() if isinstance(module, SparseMoE)}
    ingredients = {
        "format": CACHE_FORMAT,
        "weights": weights_fingerprint(subject.weights),
        "model": model_spec(subject.model),
        "routing": {name: dataclasses.asdict(layer.settings) for name, layer in layers.items()},
        "batch_size": loader_config.batch_size if any(map(_mixes_pictures, layers.values())) else None,
        "transform": " ".join(repr(subject.transform).split()),
        "precision": subject.precision,
        "device": subject.device.type,
        "data": dataset.fingerprint(),
        "on_bad": loader_config.on_bad or "fail",
        "versions": library_versions(),
    }
    return json.dumps(ingredients, indent=1, sort_keys=True)


def _mixes_pictures(layer: SparseMoE) -> bool:
    """Whether a picture's result may depend on what else is in its batch."""
    limits = (layer.capacity, layer.eval_capacity_factor, layer.group_size)
    return any(limit is not None for limit in limits)


def _cache_file(folder: Path, key: str) -> Path:
    """Where the features of a key lie.

    Raises:
        ValueError: the folder cannot be written to; better said before the features are computed.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        usable = os.access(folder, os.W_OK)
    except OSError:
        usable = False
    if not usable:
        raise ValueError(f"features.cache {folder} cannot be written to: give another folder, or null for no cache")
    return folder / f"features_{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"


def _read(file: Path, key: str) -> Features | None:
    """What a file holds; None if there is none, or (with a warning) if it is not a whole file of this key."""
    if not file.exists():
        return None
    try:
        with safe_open(file, "pt") as stream:
            metadata = stream.metadata() or {}
            tensors = {name: stream.get_tensor(name) for name in TENSORS}
        if metadata.get("key") != key:
            raise ValueError("it is of another model or other data")
        if metadata.get("sha256") != _digest(tensors):
            raise ValueError("its checksum is wrong")
        skipped = json.loads(metadata["skipped_paths"])
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        logger.warning("cached features in %s cannot be used (%s); they are made anew", file, error)
        return None
    return Features(tensors["features"], tensors["labels"], tensors["index"], skipped)


def _write(features: Features, file: Path, key: str) -> None:
    """Writes a file whole or not at all; if it cannot be written, a warning says so and the features are used."""
    tensors = dict(zip(TENSORS, (features.features_ND, features.labels_N, features.index_N), strict=True))
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    metadata: dict[str, Any] = {
        "key": key,
        "skipped_paths": json.dumps(features.skipped_paths),
        "sha256": _digest(tensors),
    }
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
        os.close(handle)
        save_file(tensors, temporary, metadata=metadata)
        os.chmod(temporary, 0o644)
        os.replace(temporary, file)
    except (OSError, SafetensorError) as error:
        logger.warning("features could not be kept in %s (%s); they will be computed again", file, error)
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def _digest(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of the tensors' bytes, types and shapes."""
    digest = hashlib.sha256()
    for name in TENSORS:
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(memoryview(tensor.contiguous().numpy()).cast("B"))
    return digest.hexdigest()
