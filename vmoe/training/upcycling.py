"""`model.upcycle` of a config: vmoe.upcycle, also from several checkpoints or from clusters of the training data."""

from typing import Any

import torch
from torch import nn

from vmoe.data import build_transform
from vmoe.data.dataset import ImageDataset
from vmoe.models.factory import create_model, get_tokenizer, is_contrastive, preprocess_config
from vmoe.models.upcycle import upcycle
from vmoe.training.config import ModelConfig
from vmoe.utils.config import ConfigError

BATCH = 64  # examples of the calibration set in a forward pass


def make_sparse(model: nn.Module, config: ModelConfig, data: ImageDataset, kwargs: dict[str, Any]) -> nn.Module:
    """The dense model upcycled as the config says; `kwargs` are those of the model. A ConfigError names a mistake."""
    settings, others, clusters = _read(config.upcycle)
    try:
        if torch.get_default_device().type == "meta":  # another process has the weights
            return same_layers(model, config.upcycle)
        models = [model, *(_like(model, create_model(config.name, source, **kwargs)) for source in others)]
        calibration = examples(model, data, clusters) if clusters else None
        return upcycle(models, calibration=calibration, **settings)
    except ValueError as error:
        message = str(error)
        for number, source in enumerate([config.pretrained or config.name, *(f"others: [{each}]" for each in others)]):
            message = message.replace(f"models[{number}]", source)
        raise ConfigError(f"model.upcycle: {message}") from error


def same_layers(model: nn.Module, given: dict[str, Any]) -> nn.Module:
    """The dense model with the sparse layers of `make_sparse`, made without other weights or data."""
    settings, others, _ = _read(given)
    return upcycle([model] * (1 + len(others)), **settings)


def _read(given: dict[str, Any]) -> tuple[dict[str, Any], list[str], int]:
    """`model.upcycle` as (arguments of vmoe.upcycle, others, clusters)."""
    for name, instead in (("models", "others"), ("calibration", "clusters")):
        if name in given:
            raise ConfigError(f"model.upcycle.{name}: give {instead}")
    settings = dict(given)
    others, clusters = settings.pop("others", []), settings.pop("clusters", 0)
    if not isinstance(others, list) or not all(isinstance(source, str) for source in others):
        raise ConfigError(f"model.upcycle.others must be a list of dense models' files or folders, got {others!r}")
    if type(clusters) is not int or clusters < 0:
        raise ConfigError(f"model.upcycle.clusters must be a whole number of examples, got {clusters!r}")
    if others and clusters:
        raise ConfigError(
            "model.upcycle.clusters are of one model's tokens, and others are more: leave one of them out"
        )
    return settings, others, clusters


def _like(first: nn.Module, other: nn.Module) -> nn.Module:
    """The other model, whose new tensors, such as a classifier for other classes, are those of the first."""
    new = getattr(other, "vmoe_loaded", {}).get("new", ())
    own = first.state_dict()
    other.load_state_dict({name: own[name] for name in new}, strict=False)
    return other


def examples(model: nn.Module, data: ImageDataset, number: int) -> list[Any]:
    """Batches of readable examples from everywhere in a data set, as the model evaluates them: (B, C, H, W) images,
    for image-text models with the tokens of their captions."""
    transform = build_transform(preprocess_config(model), None)
    pairs = [(transform(sample.image), sample.caption) for sample in data.examples(number)]
    if not pairs:
        raise ValueError(f"none of {number} examples for the clusters can be read")
    images, captions = zip(*pairs)
    batches = torch.stack(images).split(BATCH)
    if not is_contrastive(model):
        return list(batches)
    return list(zip(batches, get_tokenizer(model)(list(captions)).split(BATCH), strict=True))
