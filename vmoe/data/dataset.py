"""What a data set is here: a list of samples, each a picture with a label, a caption or both."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

from PIL import Image


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


class ImageDataset(ABC):
    """Base class of all data sets: `len(dataset)` and `dataset[i]`, without augmentation.

    Attributes:
        classes: class names, where samples have labels; else None.
        has_captions: whether samples have captions.
    """

    classes: list[str] | None = None
    has_captions: bool = False

    @property
    def captions(self) -> list[str] | None:
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
