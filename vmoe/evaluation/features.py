"""Frozen features of pictures, kept on disk, for few-shot regression, the linear probe and nearest neighbours.

A classifier gives what its last linear layer reads (the pre-logits), as in the reference's few-shot evaluation; an
image-text model its image embedding at full length, as CLIP's linear probe takes it. The tasks that want rows of length
1 scale them.

Shapes, by suffix: N pictures, B batch, D features.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from torch import Tensor, nn

from vmoe.data import ImageDataset, LoaderConfig, SourceConfig, build_dataset, eval_loader
from vmoe.data.sources.emoji import cache_folder
from vmoe.evaluation.config import EvaluationConfig
from vmoe.evaluation.feature_cache import file_of_key, key_text, read_tensors, subject_facts, write_tensors
from vmoe.evaluation.gather import gather_lists, gather_rows
from vmoe.evaluation.inference import evaluating
from vmoe.evaluation.loaded_model import Subject
from vmoe.evaluation.results_file import Progress
from vmoe.models.factory import is_contrastive
from vmoe.moe import SparseMoE
from vmoe.utils.config import ConfigError
from vmoe.utils.world import world

CACHE_FORMAT = 1  # raise it whenever `image_features` changes


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
    transform, precision, kind of device, data, library versions and this package's code. The key lies in clear in the
    file's metadata. Only the first process reads and writes.

    Args:
        subject: the model.
        dataset: has classes.
        loader_config: batches and workers; the features do not depend on them, unless experts have limited room in
            evaluation (then the batch size is part of the key).
        cache: folder of the cache; None: no cache.
        console: for the progress bar; None: no bar.
        description: in front of the bar.

    Raises:
        ValueError: the data set has no classes or gave no picture, or the features are no vectors or not finite.
        ConfigError: the cache folder cannot be written to.
        BadSample: an unreadable picture, unless `loader_config.on_bad` is "skip".
    """
    if dataset.classes is None:
        raise ValueError("features are taken of pictures with labels, and this data set has no classes")
    first = world()[0] == 0
    file, key = None, ""
    if cache is not None:
        found = []
        if first:
            _check_writable(cache)
            key = feature_key(subject, dataset, loader_config)
            file = file_of_key(cache, "features", key)
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
    """All that the features of a data set depend on; equal texts mean equal features."""
    layers = [module for module in subject.model.modules() if isinstance(module, SparseMoE)]
    # The number of processes is no part of the key: the loader deals out whole batches, which are the same for any.
    return key_text(
        {
            "format": CACHE_FORMAT,
            **subject_facts(subject),
            "batch_size": loader_config.batch_size if any(map(_mixes_pictures, layers)) else None,
            "transform": " ".join(repr(subject.transform).split()),
            "data": dataset.fingerprint(),
            "reading": dataset.reading._asdict(),
            "on_bad": loader_config.on_bad or "fail",
        }
    )


def _mixes_pictures(layer: SparseMoE) -> bool:
    """Whether a picture's result may depend on what else is in its batch."""
    limits = (layer.capacity, layer.eval_capacity_factor, layer.group_size)
    return any(limit is not None for limit in limits)


def _check_writable(folder: Path) -> None:
    """Raises ConfigError if the cache cannot be written to; better said before the features are computed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        usable = os.access(folder, os.W_OK)
    except OSError:
        usable = False
    if not usable:
        raise ConfigError(f"features.cache {folder} cannot be written to: give another folder, or null for no cache")


def _read(file: Path, key: str) -> Features | None:
    kept = read_tensors(file, key)
    if kept is None:
        return None
    tensors, notes = kept
    return Features(tensors["features"], tensors["labels"], tensors["index"], notes["skipped_paths"])


def _write(features: Features, file: Path, key: str) -> None:
    tensors = {"features": features.features_ND, "labels": features.labels_N, "index": features.index_N}
    write_tensors(file, key, tensors, {"skipped_paths": features.skipped_paths})
