"""What a data set is here: a list of samples, each a picture with a label, a caption or both."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from vmoe.data.fingerprint import Fingerprint
from vmoe.data.images import BadSample, Reading, load_image
from vmoe.data.sampler import EpochBatches, MixedBatches, Shuffle, ShuffledSamples

_UNUSABLE = re.compile("[\0\ud800-\udfff]")


class Sample(NamedTuple):
    """One sample before augmentation.

    Attributes:
        image: 8-bit RGB picture of any size.
        label: index into the data set's `classes`, or None.
        caption: text that describes the picture, or None.
        path: file of the picture, or another name of the sample; for messages.
    """

    image: Image.Image
    label: int | None
    caption: str | None
    path: str


def clean_caption(caption: object, name: str) -> str:
    """A caption without the white space around it.

    Args:
        caption: what a data set has in its place.
        name: of the sample, for messages.

    Raises:
        BadSample: it is missing, empty or no text, or holds what tokenizers and files cannot take: NUL, or half of a
            surrogate pair, which JSON can write (`"\\ud800"`).
    """
    if not isinstance(caption, str | None):
        raise BadSample(name, f"its caption is of type {type(caption).__name__}, not a text")
    if not (caption := (caption or "").strip()):
        raise BadSample(name, "empty caption")
    if found := _UNUSABLE.search(caption):
        raise BadSample(name, f"its caption holds the character {found[0]!a}, which is no text")
    return caption


def caption_or_empty(caption: object) -> str:
    """As `clean_caption`, with "" for a caption that cannot be used."""
    try:
        return clean_caption(caption, "")
    except BadSample:
        return ""


class Captions(Sequence):
    """Captions that are read when they are asked for, so that those of a large data set need no memory.

    Args:
        length: how many there are.
        read: the caption of a sample; "" where it is missing.
    """

    def __init__(self, length: int, read: Callable[[int], str]) -> None:
        self.length = length
        self.read = read

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self.read(one) for one in range(*index.indices(self.length))]
        return self.read(range(self.length)[index])


class ImageDataset(ABC):
    """Base class of all data sets: `len(dataset)` and `dataset[i]`, without augmentation.

    All attributes but the first two are None where they do not apply.

    Attributes:
        classes: class names as they are shown, where samples have labels; else None.
        has_captions: whether samples have captions.
        labels: each sample's label, where it is known without reading the pictures.
        prompt_names: names of the classes for zero-shot prompts, where they differ from `classes`.
        class_columns: for each class the outputs of an ImageNet-1k classifier that stand for it. A class's score is the
            largest of them; the other outputs are left aside.
        label_sets: for each sample all of its right labels; its `label` is the first of them.
        conditions: names of the conditions that samples were made under, as "gaussian_noise/3".
        condition_of: for each sample the index of its condition.
        image_ids: for each sample which picture it shows; samples with equal ids are captions of one picture.
        left_out: {reason: pictures} that the data set's own rules leave out of an evaluation.
        crop_pct: share of the picture's side that an evaluation keeps, where the data set says so and not the model
            (ImageNet-C: 1, its pictures are cropped already).
        reading: how image files are read.
    """

    classes: list[str] | None = None
    has_captions: bool = False
    labels: Sequence[int] | None = None
    prompt_names: list[str] | None = None
    class_columns: list[list[int]] | None = None
    label_sets: list[tuple[int, ...]] | None = None
    conditions: list[str] | None = None
    condition_of: Sequence[int] | None = None
    image_ids: list[str] | None = None
    left_out: dict[str, int] | None = None
    crop_pct: float | None = None
    reading: Reading = Reading()
    _fingerprint: str | None = None

    @property
    def captions(self) -> Sequence[str] | None:
        """All captions, one per sample ("" where it is missing), or None where samples have none."""
        return None

    @abstractmethod
    def __len__(self) -> int:
        """Number of samples."""

    @abstractmethod
    def __getitem__(self, index: int) -> Sample:
        """The sample at `index`.

        Raises:
            BadSample: its picture is unreadable or its caption is empty.
        """

    def load(self, path: str | Path, content: bytes | None = None) -> Image.Image:
        """The image in a file, read as this data set's `reading` says; see `load_image`."""
        return load_image(path, content, self.reading)

    def shuffle(self, seed: int, batch_size: int) -> Shuffle:
        """The order in which training meets the samples, if `batch_size` of them are taken at a time.

        Raises:
            ValueError: the batch size does not suit a setting of the data set.
        """
        return ShuffledSamples(seed, len(self))

    def batches(self, seed: int, batch_size: int) -> EpochBatches | MixedBatches:
        """The batches of training; raises as `shuffle`."""
        return EpochBatches(self.shuffle(seed, batch_size), batch_size)

    def file_of(self, index: int) -> tuple[str, Path] | None:
        """A picture's file: its name within the data set (with `/`), and where it lies; or None."""
        return None

    def fingerprint(self) -> str:
        """Says which data this is: 64 hexadecimal digits, the same on every machine, made once.

        They follow from the order of the samples, their labels, captions and the other attributes, the class names, and
        each picture's file (name within the data set, size, first and last 4 KiB) or, without files, its pixels.
        """
        if self._fingerprint is None:
            self._fingerprint = self._make_fingerprint()
        return self._fingerprint

    def _make_fingerprint(self) -> str:
        facts = Fingerprint()
        for name in ("classes", "prompt_names", "class_columns", "conditions", "left_out"):
            facts.add(name, getattr(self, name))
        lists = [self.labels, self.captions, self.label_sets, self.condition_of, self.image_ids]
        last_file = None
        for index in range(len(self)):
            facts.add("sample", [None if values is None else values[index] for values in lists])
            file = self.file_of(index)
            if file is not None:
                if file == last_file:  # another caption of the same picture
                    facts.add("file", file[0])
                else:
                    facts.add_file(*file)
                last_file = file
                continue
            try:
                sample = self[index]
            except BadSample:
                facts.add("unreadable", None)
            else:
                facts.add("label and caption", [sample.label, sample.caption])
                facts.add_picture(sample.image)
        return facts.hexdigest()
