"""Frozen features of images, for few-shot regression, the linear probe and nearest neighbours.

A classifier gives what its last linear layer reads (the pre-logits), as in the reference's few-shot evaluation; an
image-text model its image embedding, not normalised, as CLIP's linear probe takes it.

Shapes, by suffix: N images, B batch, D features.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from torch import Tensor, nn

from vmoe.data import ImageDataset, LoaderConfig, build_dataset, eval_loader
from vmoe.data.sources.emoji import cache_folder
from vmoe.distributed.process_group import gather_lists
from vmoe.evaluation.cache import cache_file, feature_key, read_cache, write_cache
from vmoe.evaluation.classification import num_skipped
from vmoe.evaluation.config import EvaluationConfig
from vmoe.evaluation.inference import evaluating
from vmoe.evaluation.loaded_model import LoadedModel
from vmoe.evaluation.results_file import Outcome, Progress, make_writable
from vmoe.evaluation.synchronized import Rows
from vmoe.models.factory import is_contrastive
from vmoe.utils.config import ConfigError
from vmoe.utils.world import world


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
    description: str = "features",
) -> Features:
    """Features of all images of a data set; all processes of `torchrun` share the work and get the same rows.

    They do not depend on the batch size, unless experts have a capacity in evaluation. `cache` is the folder where the
    first process looks for a file of the same key, or writes it; None: no cache.

    Raises:
        ValueError: the data set has no classes or gave no image, or the features are no vectors or not finite.
        ConfigError: the cache folder cannot be written to.
        BadSample: an unreadable image, unless `loader_config.on_bad` is "skip".
    """
    if dataset.classes is None:
        raise ValueError("features are taken of images with labels, and this data set has no classes")
    file, cached = None, []
    if cache is not None and world()[0] == 0:
        if not make_writable(cache):
            raise ConfigError(f"features.cache {cache} cannot be written to: give another folder, or null for no cache")
        key = feature_key(loaded, dataset, loader_config)
        file = cache_file(cache, key)
        cached = [read_cache(file, key)]
    [stored] = gather_lists(cached) or [None]
    if stored is not None:
        return Features(**stored)
    loader = eval_loader(dataset, loaded.transform, None, loader_config)
    rows = Rows()
    with evaluating(loaded.model, loaded.device, loaded.precision):
        for batch in Progress(loader, description, console or Console(quiet=True)):
            features_BD = image_features(loaded.model, batch["image"].to(loaded.device)).float()
            rows.add(batch["index"], features_ND=features_BD, labels_N=batch["label"])
    index_N, columns = rows.gather()
    num_skipped(loader, len(index_N))
    if unusable := int((~columns["features_ND"].isfinite()).any(1).sum()):
        raise ValueError(
            f"features must be finite, and those of {unusable} of {len(index_N)} images hold NaN or infinity; "
            f"precision is {loaded.precision!r}, and float32 has the widest range"
        )
    tensors, skipped_paths = {**columns, "index_N": index_N}, sorted(gather_lists(list(loader.skipped_paths)))
    if file is not None:
        write_cache(file, key, tensors, skipped_paths)
    return Features(**tensors, skipped_paths=skipped_paths)


def image_features(model: nn.Module, images_B3HW: Tensor) -> Tensor:
    """(B, D): pre-logits of a classifier, or the image embedding (not normalised) of an image-text model."""
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


def fit_and_test_features(
    config: EvaluationConfig, loaded: LoadedModel, test_dataset: ImageDataset, console: Console
) -> tuple[Features, Features]:
    """Features of `train_data`, that a classifier is fitted on, and of the data that it is tested on.

    Raises:
        ConfigError: the two have other classes.
        ValueError: a class that is tested has no training example.
    """
    train_dataset = build_dataset(config.train_data)
    trained, tested = train_dataset.classes, test_dataset.classes
    if trained is None:
        raise ConfigError("train_data has no classes: give data with labels")
    if trained != tested:
        only = [name for name in tested if name not in trained] + [name for name in trained if name not in tested]
        named = f"only one of them has {', '.join(map(repr, only[:5]))}" if only else "the order differs"
        raise ConfigError(
            f"train_data has {len(trained)} classes and data {len(tested)}, and they must be the same: {named}"
        )
    folder = config.features.cache
    cache = cache_folder() / "features" if folder == "auto" else Path(folder) if folder else None
    options = {"cache": cache, "console": console}
    train, test = (
        extract_features(loaded, dataset, config.loader, description=f"{part} features", **options)
        for part, dataset in (("train", train_dataset), ("test", test_dataset))
    )
    absent = sorted(set(test.labels_N.tolist()) - set(train.labels_N.tolist()))
    if absent:
        names = ", ".join(repr(tested[label]) for label in absent[:5])
        raise ValueError(
            f"{len(absent)} of the classes that are tested have no training example, among them {names}: "
            "add some, or remove these classes from both data sets"
        )
    return train, test


def feature_outcome(results: dict[str, float | int], details: dict, train: Features, test: Features) -> Outcome:
    """The outcome of a task on features, with its counts of samples and its skipped images."""
    counts = {"num_samples": len(test.labels_N), "num_skipped": len(test.skipped_paths)}
    skipped = {"num_train_samples": len(train.labels_N), "skipped": train.skipped_paths + test.skipped_paths}
    return Outcome(results | counts, details | skipped)
