"""From a setting to a data set."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from vmoe.data.config import NOT_FROM_FILES, SourceConfig
from vmoe.data.dataset import ImageDataset
from vmoe.data.images import MAX_PIXELS, DataError, Reading
from vmoe.data.sources.captions import PairsFile, PairsFolder
from vmoe.data.sources.emoji import EmojiImages
from vmoe.data.sources.folder import ImageFolder
from vmoe.data.sources.huggingface import HuggingFace
from vmoe.data.sources.imagenet import ImageNet, ImageNetC, ImageNetReal
from vmoe.data.sources.karpathy import KarpathyCaptions
from vmoe.data.sources.mixture import Mixture
from vmoe.data.sources.objectnet import ObjectNet
from vmoe.data.sources.tiny_imagenet import TinyImageNet
from vmoe.data.sources.torchvision import TorchvisionDataset
from vmoe.data.sources.webdataset import Shards
from vmoe.utils.config import ConfigError

SOURCES: dict[str, Callable[[SourceConfig], ImageDataset]] = {
    **dict.fromkeys(("emoji", "emoji_groups"), EmojiImages),
    "pairs": lambda source: (PairsFolder if Path(source.path).is_dir() else PairsFile)(source),
    "shards": Shards,
    "hf": HuggingFace,
    "mixture": lambda source: Mixture(
        [build_dataset(one, f"sources[{index}]") for index, one in enumerate(source.sources)],
        [one.weight for one in source.sources],
    ),
    "image_folder": ImageFolder,
    "torchvision": TorchvisionDataset,
    **dict.fromkeys(("imagenet", "imagenet_v2", "imagenet_a", "imagenet_r", "imagenet_sketch"), ImageNet),
    "imagenet_real": ImageNetReal,
    "imagenet_c": ImageNetC,
    "objectnet": ObjectNet,
    "tiny_imagenet": TinyImageNet,
    "karpathy": KarpathyCaptions,
}


def build_dataset(source: SourceConfig, setting: str = "") -> ImageDataset:
    """Opens the data set that the settings describe; `setting` is their section, such as "data.train", for errors.

    ValueError: files, columns, names or splits are not there. ConfigError: there is no type.
    """
    if source.type is None and setting:
        raise ConfigError(f"{setting}.type is missing: give one of {', '.join(SOURCES)}")
    try:
        if source.type not in SOURCES:
            raise ValueError(f"type of a data source must be one of {', '.join(SOURCES)}, got {source.type!r}")
        dataset = SOURCES[source.type](source)
    except ValueError as error:
        if not setting:
            raise
        is_path = source.path is not None and str(error).startswith(tuple(source.path + end for end in ":/ "))
        raise DataError(f"{setting}{'.path ' if is_path else ': '}{error}") from error
    dataset.reading = Reading(bool(source.exif_orientation), source.max_pixels or MAX_PIXELS)
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
