"""Settings of the data: where it comes from, how it is augmented, how it is read. Every field is shown by `--help`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from vmoe.utils.config import ConfigError, check_numbers, check_types

# A setting that the type does not read is a mistake.
FIELDS_OF_SOME_TYPES = {
    **{"name": ("torchvision",), "delimiter": ("pairs",), "label_key": ("hf",)},
    **{"image_root": ("pairs", "karpathy"), "image_key": ("pairs", "hf"), "caption_key": ("pairs", "shards", "hf")},
    **{"class_names": ("image_folder", "shards"), "labels_file": ("imagenet", "imagenet_real")},
    **{"shuffle_buffer": ("shards",), "streams": ("shards",), "sources": ("mixture",)},
}
# Types whose images are not read from files, or by torchvision, or by the sources of a mixture.
NOT_FROM_FILES = ("emoji", "emoji_groups", "torchvision", "mixture")

General = Literal["emoji", "emoji_groups", "pairs", "shards", "hf", "mixture", "image_folder", "torchvision"]
ImageNetSets = Literal["imagenet", "imagenet_v2", "imagenet_a", "imagenet_r", "imagenet_sketch", "imagenet_real"]
SPLITS = {
    **{"emoji": ("train", "held_out", "all"), "karpathy": ("train", "val", "test")},
    **dict.fromkeys(("emoji_groups", "tiny_imagenet"), ("train", "val")),
}


@dataclass
class SourceConfig:
    """One data set.

    Args:
        type: "emoji" (images with their names), "emoji_groups" (emoji with their Unicode group as class), "pairs"
            (images with captions), "shards" (tar files in the layout of WebDataset and img2dataset), "hf" (Hugging Face
            datasets), "mixture" (several of these), "image_folder" (one folder per class), "torchvision" (a data set of
            torchvision), "tiny_imagenet" (Tiny-ImageNet-200), "karpathy" (COCO or Flickr30k with captions), or a
            published test set, as it is downloaded.
        path: "pairs": a .csv, .tsv or .jsonl file, or a folder of images with .txt files beside them. "shards": a .tar
            file, a folder, a glob or a brace pattern such as data/{00000..00099}.tar, or several with "::" between
            them. "hf": a folder of Parquet or Arrow files, or one that save_to_disk wrote. "torchvision": its `root`.
            "karpathy": dataset_coco.json or dataset_flickr30k.json. Others: the folder that docs/evaluation.md draws.
        split: "emoji": "train", "held_out" (400 compositions never seen in training) or "all". "emoji_groups",
            "tiny_imagenet": "train" or "val". "karpathy": "train" (with "restval"), "val" or "test". "torchvision",
            "hf": what the data set has.
        name: "torchvision": the class name in torchvision.datasets, for example "FashionMNIST".
        image_size: emoji types: side in pixels at which the images are drawn, once.
        image_root: "pairs" file, "karpathy": the folder that relative image paths start from (default: the file's).
        image_key: "pairs" file: the column or key of the image path (default: image, path, filepath, ...). "hf": the
            column of the images (default: image, jpg, png, webp or img).
        caption_key: "pairs" file and "hf": the column or key of the caption (default: caption, title, text or txt).
            "shards": the key of the caption in the .json members (default: the .txt member, else "caption").
        delimiter: "pairs" in a .csv or .tsv file: the character between columns (default: "," in .csv, a tab in .tsv).
        class_names: "shards": a .txt or .json file with the names of the classes that .cls members number from 0
            (default: samples have no labels). "image_folder": the same in the order of the sorted folders, or a .json
            file of {folder: name} (default: the folder names, or WordNet's words for ImageNet's synsets).
        labels_file: "imagenet" with all images in one folder: the file of their labels (default: the one found in that
            folder or the one above). "imagenet_real": real.json (default: timm's copy).
        label_key: "hf": the column of the label (default: the one of type ClassLabel, if there is just one).
        shuffle_buffer: "shards": samples of neighbouring files that are shuffled together (default: 100000).
        streams: "shards": positions of the data that are read side by side, each giving an equal part of every batch
            (default: 1). The number of machines, so that each reads files of its own.
        exif_orientation: whether images are turned as their EXIF data say; not for the emoji types and "torchvision"
            (default: as the model was trained, or data.train in a training; else false, as in torchvision and timm).
        max_pixels: the largest image, in pixels (default: 89478485). A JPEG file of up to 4 times as many is read at
            half its size; a larger image is a bad sample.
        sources: "mixture": the data sets, each a section as this one, with its weight.
        weight: share of the samples of a mixture, on any scale; set it for all of its sources or for none (then all
            samples are equally frequent).
    """

    type: Literal[General, ImageNetSets, "imagenet_c", "objectnet", "tiny_imagenet", "karpathy"] | None = None
    path: str | None = None
    split: str = "train"
    name: str | None = None
    image_size: int = 48
    image_root: str | None = None
    image_key: str | None = None
    caption_key: str | None = None
    delimiter: str | None = None
    class_names: str | None = None
    labels_file: str | None = None
    label_key: str | None = None
    shuffle_buffer: int | None = None
    streams: int | None = None
    exif_orientation: bool | None = None
    max_pixels: int | None = None
    sources: list[SourceConfig] | None = None
    weight: float | None = None

    def __post_init__(self) -> None:
        check_types(self)
        if self.type not in (None, "emoji", "emoji_groups", "mixture") and not self.path:
            raise ValueError(f"data source of type {self.type!r} needs a path: set `path` to its file or folder")
        if self.type == "torchvision" and not self.name:
            raise ValueError("data source of type 'torchvision' needs a name: set `name`, for example FashionMNIST")
        for name, types in FIELDS_OF_SOME_TYPES.items():
            if getattr(self, name) is not None and self.type is not None and self.type not in types:
                raise ValueError(f"{name} is for {' and '.join(types)}, and type is {self.type!r}; leave it out")
        if self.type in NOT_FROM_FILES and (self.exif_orientation, self.max_pixels) != (None, None):
            raise ValueError(f"exif_orientation and max_pixels are for image files, and type is {self.type!r}")
        check_numbers(self, dict.fromkeys(("shuffle_buffer", "streams", "max_pixels", "image_size"), 1))
        if self.delimiter == r"\t":  # as a shell gives it
            self.delimiter = "\t"
        if self.delimiter is not None and (len(self.delimiter) != 1 or self.delimiter in '"\r\n\0'):
            raise ValueError(f"delimiter must be one character, such as ';' or '\\t', got {self.delimiter!r}")
        if self.weight is not None and not 0 < self.weight < math.inf:
            raise ValueError(f"weight must be > 0, got {self.weight}; leave a source out to draw nothing from it")
        if self.type == "mixture":
            self._check_mixture()
        if self.type in SPLITS and self.split not in SPLITS[self.type]:
            splits = ", ".join(SPLITS[self.type])
            raise ValueError(f"split of data source {self.type!r} must be one of {splits}, got {self.split!r}")

    def _check_mixture(self) -> None:
        if not self.sources:
            raise ValueError("data source of type 'mixture' needs sources: list its data sets, each with type and path")
        if self.path:
            raise ValueError(f"a mixture has no path of its own, got {self.path!r}; set those of its sources")
        # From a command line or a YAML file they come as dictionaries.
        given, self.sources = self.sources, []
        for index, one in enumerate(given):
            try:
                source = one if isinstance(one, SourceConfig) else SourceConfig(**one)
                if source.type in (None, "mixture"):
                    raise ValueError(f"type must be that of a plain data set, got {source.type!r}")
            except ValueError as error:
                raise ValueError(f"sources[{index}]: {error}") from error
            self.sources.append(source)
        missing = [source for source in self.sources if source.weight is None]
        if missing and len(missing) < len(self.sources):
            first = f"{missing[0].type!r} {missing[0].path}"
            raise ValueError(f"weight must be set for all sources of a mixture or for none; {first} has none")


@dataclass
class AugmentationConfig:
    """Augmentation of training images, named as in timm. The defaults are light, as is usual for image-text training.

    Args:
        scale: share of the image's area that a random crop takes, smallest and largest.
        ratio: width / height of that crop, smallest and largest.
        crop_padding: crop the input's size out of the image with so many black pixels around it (4: the usual crop of
            CIFAR), instead of a crop by scale and ratio.
        hflip: probability of a left-right flip.
        vflip: probability of an upside-down flip.
        color_jitter: strength of random brightness, contrast and saturation (0: none; unused with auto_augment).
        grayscale_prob: probability that an image loses its colours.
        auto_augment: timm's policy string, such as "rand-m9-mstd0.5-inc1" (RandAugment), or none.
        re_prob: probability of random erasing.
        re_mode: what fills an erased box: "const" (zero), "rand" (one random colour) or "pixel" (noise).
        re_count: most boxes erased in one image.
        interpolation: "bicubic", "bilinear" or "random" (one of the two per image), or none (the model's own).
        mixup: alpha of mixup (0: off); classification only.
        cutmix: alpha of cutmix (0: off); classification only.
        mixup_prob: probability that a batch is mixed at all.
        mixup_switch_prob: probability of cutmix where mixup and cutmix are both on.
        label_smoothing: share of the target that is distributed over all classes; classification only.
    """

    scale: tuple[float, float] = (0.8, 1.0)
    ratio: tuple[float, float] = (0.9, 1.1)
    crop_padding: int | None = None
    hflip: float = 0.0
    vflip: float = 0.0
    color_jitter: float = 0.0
    grayscale_prob: float = 0.0
    auto_augment: str | None = None
    re_prob: float = 0.0
    re_mode: Literal["const", "rand", "pixel"] = "pixel"
    re_count: int = 1
    interpolation: Literal["bicubic", "bilinear", "random"] | None = None
    mixup: float = 0.0
    cutmix: float = 0.0
    mixup_prob: float = 1.0
    mixup_switch_prob: float = 0.5
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        check_types(self)
        shares = ("hflip", "vflip", "grayscale_prob", "re_prob", "mixup_prob", "mixup_switch_prob")
        least = {"color_jitter": 0, "mixup": 0, "cutmix": 0, "re_count": 1, "crop_padding": 0}
        check_numbers(self, dict.fromkeys(shares, (0, 1, "")) | least)
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1), got {self.label_smoothing}")
        for name, largest in (("scale", 1), ("ratio", math.inf)):
            low, high = getattr(self, name)
            if not 0 < low <= high <= largest:
                bound = " <= 1" if largest == 1 else ""
                raise ValueError(f"{name} must be 0 < smallest <= largest{bound}, got {getattr(self, name)}")
        if self.crop_padding is not None and (self.scale, self.ratio) != (type(self).scale, type(self).ratio):
            raise ValueError("crop_padding replaces scale and ratio: leave these out, or crop_padding")


@dataclass
class NaFlexConfig:
    """Images of their own shape, as patches: for models of timm's NaFlexVit, such as vmoe_naflex_base_patch16.

    Args:
        seq_lens: numbers of patches in a sequence, one of which is drawn for each batch. Images are resized to the most
            patches that it holds. Evaluation takes the largest.
        tokens_per_batch: patches in a batch of training, all processes together, padding included: a batch has at most
            tokens_per_batch / (patches in a sequence) images, and a multiple of 8 from 8 images on.
    """

    seq_lens: list[int] = field(default_factory=lambda: [128, 256, 576, 784, 1024])
    tokens_per_batch: int = 16384

    def __post_init__(self) -> None:
        check_types(self, "naflex.")
        if not self.seq_lens or min(self.seq_lens) < 1 or len(set(self.seq_lens)) < len(self.seq_lens):
            raise ValueError(f"seq_lens must be whole numbers >= 1, each once, got {self.seq_lens}")
        if self.tokens_per_batch < (longest := max(self.seq_lens)):
            problem = f"must hold the longest of seq_lens, {longest} patches"
            raise ValueError(f"tokens_per_batch {problem}, got {self.tokens_per_batch}")


@dataclass
class LoaderConfig:
    """How samples are read and put into batches.

    Args:
        batch_size: samples in a batch, all processes together; each has an equal part of it.
        num_workers: processes that read in the background; 0 reads in the main process. The batches are the same.
        on_bad: what happens to an unreadable image or an empty caption: "replace" (by another sample; the default in
            training), "skip" (and count; in evaluation) or "fail" (the default in evaluation).
        max_bad_share: training stops when more than this share of the samples read is bad.
        naflex: see there. With it, tokens_per_batch replaces batch_size in training. null: all images have the model's
            one size.
        pin_memory: keep batches in page-locked memory, for quicker copies to a GPU (unused without one).
    """

    batch_size: int = 256
    num_workers: int = 1
    on_bad: Literal["replace", "skip", "fail"] | None = None
    max_bad_share: float = 0.01
    pin_memory: bool = True
    naflex: NaFlexConfig | None = None

    def __post_init__(self) -> None:
        check_types(self)
        check_numbers(self, {"batch_size": 1, "num_workers": 0, "max_bad_share": (0, 1, "")})

    def check_evaluation(self, one_size: bool = False) -> None:
        """ConfigError: a setting that only training has; with `one_size`, images of their own shapes."""
        if self.on_bad == "replace":
            raise ConfigError("loader.on_bad must be 'fail' or 'skip' here, got 'replace'")
        if one_size and self.naflex is not None:
            raise ConfigError("loader.naflex is for train.py and eval.py, all images have one size here: leave it out")

    @property
    def batch_sizes(self) -> dict[int | None, int]:
        """{patches in a sequence: images in a batch of training}; {None: batch_size} without naflex."""
        if self.naflex is None:
            return {None: self.batch_size}
        # Processes share a batch equally, and there are mostly 2, 4 or 8. The sizes do not follow from their number, so
        # that a run may continue with another.
        most = {seq_len: self.naflex.tokens_per_batch // seq_len for seq_len in self.naflex.seq_lens}
        return {seq_len: size - size % 8 if size >= 8 else size for seq_len, size in most.items()}

    def size_text(self, seq_len: int | None) -> str:
        """The batch of a sequence length, for messages."""
        size = self.batch_sizes[seq_len]
        return f"batch_size {size}" if seq_len is None else f"a batch of {size} images of {seq_len} patches"

    @property
    def size_setting(self) -> str:
        """The setting that the sizes follow from, for messages."""
        return f"data.loader.{'batch_size' if self.naflex is None else 'naflex.tokens_per_batch'}"
