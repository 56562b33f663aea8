"""The base classes of all data sets: a list of samples, each an image with a label, a caption or both."""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from vmoe.data.fingerprint import Fingerprint
from vmoe.data.images import BadSample, Reading, load_image
from vmoe.data.sampler import EpochBatches, MixedBatches, Shuffle, ShuffledSamples

_UNUSABLE = re.compile("[\0\ud800-\udfff]")


class Sample(NamedTuple):
    """One sample before augmentation."""

    image: Image.Image  # 8-bit RGB, of any size
    label: int | None  # index into the data set's `classes`
    caption: str | None  # text that describes the image
    path: str  # file of the image, or another name of the sample; for messages


def clean_caption(caption: object, name: str) -> str:
    """A caption without the white space around it, of the sample `name`; BadSample: it is missing, empty or no text.

    Tokenizers and files cannot take NUL, or half of a surrogate pair, which JSON can write (`"\\ud800"`).
    """
    if not isinstance(caption, str | None):
        raise BadSample(name, f"its caption is of type {type(caption).__name__}, not a text")
    if not (caption := (caption or "").strip()):
        raise BadSample(name, "empty caption")
    if found := _UNUSABLE.search(caption):
        raise BadSample(name, f"its caption holds the character {found[0]!a}, which is no text")
    return caption


class ImageDataset(ABC):
    """Base class of all data sets: `len(dataset)` and `dataset[i]`, without augmentation."""

    classes: list[str] | None = None  # class names as they are shown, where samples have labels
    has_captions: bool = False
    labels: Sequence[int] | None = None  # each sample's label, where it is known without reading the images
    synsets: list[str] | None = None  # of the classes, where each is one of WordNet's, as ImageNet's are
    prompt_names: list[str] | None = None  # of the classes for zero-shot prompts, where they differ from `classes`
    # For each class the outputs of an ImageNet-1k classifier that stand for it, the largest of which is its score.
    class_columns: list[list[int]] | None = None
    label_sets: list[tuple[int, ...]] | None = None  # for each sample all right labels, its `label` first
    conditions: list[str] | None = None  # that samples were made under, as "gaussian_noise/3"
    condition_of: Sequence[int] | None = None  # for each sample the index of its condition
    image_ids: list[str] | None = None  # for each sample; samples with equal ids are captions of one image
    left_out: dict[str, int] | None = None  # {reason: images} that the data set's own rules exclude
    # Share of the image's side that an evaluation keeps, where the data set says so (ImageNet-C is cropped already).
    crop_pct: float | None = None
    reading: Reading = Reading()  # how image files are read
    decoded: bool = False  # images are in memory already, as arrays
    cache: Sequence[Sample] | None = None  # all samples, where loaders find them; see vmoe/data/cache.py
    _fingerprint: str | None = None

    @abstractmethod
    def __len__(self) -> int:
        """Number of samples."""

    @abstractmethod
    def __getitem__(self, index: int) -> Sample:
        """The sample at `index`; BadSample: its image is unreadable or its caption is empty."""

    def caption(self, index: int) -> str:
        """A sample's caption; data sets that can do so find it without reading the image. Raises BadSample."""
        return self[index].caption

    def read_captions(self, indices: Iterable[int]) -> list[str]:
        """The captions of some samples, "" for one that cannot be used."""
        captions = []
        for index in indices:
            try:
                captions.append(self.caption(index))
            except BadSample:
                captions.append("")
        return captions

    @property
    def captions(self) -> list[str] | None:
        """All captions, read now, as `read_captions`; None where the data set has none."""
        return self.read_captions(range(len(self))) if self.has_captions else None

    def spread(self, number: int) -> list[int]:
        """The indices of so many samples at equal distances, from the first to the last; of all if there are fewer."""
        last = len(self) - 1
        return torch.linspace(0, last, min(number, len(self))).round().long().clamp(max=last).tolist()

    def examples(self, number: int) -> Iterator[Sample]:
        """The samples of `spread` that can be read."""
        for index in self.spread(number):
            with suppress(BadSample):
                yield self[index]

    def file_of(self, index: int) -> tuple[str, Path] | None:
        """An image's file: its name within the data set (with `/`), and its path; None where it has no file."""
        return None

    def name_of(self, index: int) -> str:
        """What `Sample.path` is, found without reading the image: its file, or another name of the sample."""
        file = self.file_of(index)
        return f"sample {index}" if file is None else str(file[1])

    def load(self, path: str | Path, content: bytes | None = None) -> Image.Image:
        """The image in a file, read as this data set's `reading` says; see `load_image`."""
        return load_image(path, content, self.reading)

    def shuffle(self, seed: int, batch_size: int) -> Shuffle:
        """The order of training; ValueError: the batch size does not suit a setting of the data set."""
        return ShuffledSamples(seed, len(self))

    def batches(self, seed: int, batch_size: int) -> EpochBatches | MixedBatches:
        """The batches of training; raises as `shuffle`."""
        return EpochBatches(self.shuffle(seed, batch_size), batch_size)

    def fingerprint(self) -> str:
        """64 hexadecimal digits that identify the data, the same on every machine; computed once.

        They follow from the samples' order and attributes, the class names, and each image's file or its pixels.
        """
        if self._fingerprint is None:
            facts = Fingerprint()
            self._add_facts(facts)
            self._fingerprint = facts.hexdigest()
        return self._fingerprint

    def _add_facts(self, facts: Fingerprint) -> None:
        for name in ("classes", "prompt_names", "class_columns", "conditions", "left_out"):
            facts.add(name, getattr(self, name))
        lists = [self.labels, self.captions, self.label_sets, self.condition_of, self.image_ids]
        last_file = None
        for index in range(len(self)):
            facts.add("sample", [None if values is None else values[index] for values in lists])
            file = self.file_of(index)
            if file is not None and file == last_file:  # another caption of the same image
                facts.add("file", file[0])
            elif file is not None:
                facts.add_file(*file)
            else:
                try:
                    image, label, caption, _ = self[index]
                    facts.add("label and caption", [label, caption])
                    facts.add_image(image)
                except BadSample:
                    facts.add("unreadable", None)
            last_file = file


class ImageFiles(ImageDataset):
    """Images in files below the folder `root`, with `/` in their names; bad captions are found when they are read."""

    def __init__(
        self, root: str | Path, names: Sequence[str], labels: Sequence[int] | None = None, captions: list | None = None
    ) -> None:
        self.root, self.names, self.labels, self._captions = Path(root), names, labels, captions
        self.has_captions = captions is not None

    def __len__(self) -> int:
        return len(self.names)

    def file_of(self, index: int) -> tuple[str, Path]:
        return self.names[index], self.root / self.names[index]

    def caption(self, index: int) -> str:
        return clean_caption(self._captions[index], str(self.file_of(index)[1]))

    def __getitem__(self, index: int) -> Sample:
        path = self.file_of(index)[1]
        caption = self.caption(index) if self.has_captions else None
        label = None if self.labels is None else self.labels[index]
        return Sample(self.load(path), label, caption, str(path))


class ConcatenatedDataset(ImageDataset):
    """Samples in several parts, one part after the other."""

    sizes: np.ndarray  # samples in each part
    ends: np.ndarray  # for each part the number of samples up to its end

    def set_sizes(self, sizes: Sequence[int]) -> None:
        """Sets `sizes` and what follows from them."""
        self.sizes = np.asarray(sizes, np.int64)
        self.ends = self.sizes.cumsum()

    def __len__(self) -> int:
        return int(self.ends[-1])

    def locate(self, index: int) -> tuple[int, int]:
        """(part, index in it) of a sample."""
        part = int(self.ends.searchsorted(index, side="right"))
        return part, index - int(self.ends[part] - self.sizes[part])
