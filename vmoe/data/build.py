"""From a setting to a data set."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from vmoe.data.config import NOT_FROM_FILES, SourceConfig
from vmoe.data.dataset import ImageDataset
from vmoe.data.images import DEFAULT, MAX_PIXELS, Reading
from vmoe.data.sources.captions import PairsFile, PairsFolder
from vmoe.data.sources.cifar import VARIANTS as CIFAR
from vmoe.data.sources.cifar import Cifar
from vmoe.data.sources.emoji import EmojiGroups, EmojiPairs
from vmoe.data.sources.folder import ImageFolder, TorchvisionDataset
from vmoe.data.sources.huggingface import HuggingFace, ParquetRows
from vmoe.data.sources.imagenet import ImageNet, ImageNetReal, ImageNetSketch, ImageNetSubset, ImageNetV2
from vmoe.data.sources.imagenet_c import ImageNetC
from vmoe.data.sources.karpathy import KarpathyCaptions
from vmoe.data.sources.mixture import Mixture
from vmoe.data.sources.objectnet import ObjectNet
from vmoe.data.sources.webdataset import Shards


def build_dataset(source: SourceConfig) -> ImageDataset:
    """Opens the data set that the settings describe.

    Raises:
        ValueError: files, columns, names or splits are not there; the message says which.
        ModuleNotFoundError: an emoji data set without the packages of the extra `demo`.
    """
    dataset = _build(source)
    reading = Reading(bool(source.exif_orientation), source.max_pixels or MAX_PIXELS)
    if reading != DEFAULT:
        dataset.reading = reading
    return dataset


def applies_orientation(source: SourceConfig) -> bool:
    """Whether a data set, or one of a mixture, applies EXIF orientation."""
    return bool(source.exif_orientation) or any(map(applies_orientation, source.sources or ()))


def with_orientation(source: SourceConfig) -> SourceConfig:
    """The settings, with EXIF orientation applied where they do not say and images are read from files."""
    if source.type == "mixture":
        return replace(source, sources=[with_orientation(one) for one in source.sources])
    unset = source.exif_orientation is None and source.type not in (None, *NOT_FROM_FILES)
    return replace(source, exif_orientation=True) if unset else source


def _build(source: SourceConfig) -> ImageDataset:
    match source.type:
        case "emoji":
            return EmojiPairs(source.split, source.image_size)
        case "emoji_groups":
            return EmojiGroups(source.split, source.image_size)
        case "pairs" if Path(source.path).is_dir():
            return PairsFolder(source.path)
        case "pairs":
            return PairsFile(source.path, source.image_root, source.image_key, source.caption_key, source.delimiter)
        case "shards":
            return Shards(
                source.path,
                source.caption_key,
                source.class_names,
                source.shuffle_buffer or 100_000,
                source.streams or 1,
            )
        case "hf":
            keys = {"image_key": source.image_key, "caption_key": source.caption_key, "label_key": source.label_key}
            if not source.streaming:
                return HuggingFace(source.path, source.split, **keys)
            window, streams = source.shuffle_buffer or 1000, source.streams or 1
            return ParquetRows(source.path, source.split, **keys, shuffle_buffer=window, streams=streams)
        case "mixture":
            weights = [one.weight for one in source.sources]
            datasets = [build_dataset(one) for one in source.sources]
            return Mixture(datasets, None if None in weights else weights)
        case "image_folder":
            return ImageFolder(source.path, source.class_names)
        case "torchvision" if source.name in CIFAR:
            return Cifar(source.name, source.path, source.split)
        case "torchvision":
            return TorchvisionDataset(source.name, source.path, source.split)
        case "imagenet":
            return ImageNet(source.path, source.labels_file)
        case "imagenet_real":
            return ImageNetReal(source.path, source.labels_file)
        case "imagenet_v2":
            return ImageNetV2(source.path)
        case "imagenet_a" | "imagenet_r":
            return ImageNetSubset(source.path, source.type)
        case "imagenet_sketch":
            return ImageNetSketch(source.path)
        case "imagenet_c":
            return ImageNetC(source.path)
        case "objectnet":
            return ObjectNet(source.path)
        case "karpathy":
            return KarpathyCaptions(source.path, source.split, source.image_root)
    raise ValueError(f"type of a data source must be one of those in SourceConfig, got {source.type!r}")
