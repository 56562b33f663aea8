"""CIFAR-10 and CIFAR-100 from their binary version. The Python version, which torchvision reads, consists of pickles.

Layout: https://www.cs.toronto.edu/~kriz/cifar.html, "Binary version".
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from vmoe.data.dataset import ImageDataset, Sample

PIXELS = 3 * 32 * 32


class Variant(NamedTuple):
    """One of the two data sets.

    Attributes:
        archive: the download.
        folder: what it unpacks to.
        files: of each split.
        names: file with the names of the classes.
        label_bytes: in front of each picture; the last one is the label.
    """

    archive: str
    folder: str
    files: dict[str, tuple[str, ...]]
    names: str
    label_bytes: int


VARIANTS = {
    "CIFAR10": Variant(
        "cifar-10-binary.tar.gz",
        "cifar-10-batches-bin",
        {"train": tuple(f"data_batch_{number}.bin" for number in range(1, 6)), "test": ("test_batch.bin",)},
        "batches.meta.txt",
        1,
    ),
    "CIFAR100": Variant(
        "cifar-100-binary.tar.gz",
        "cifar-100-binary",
        {"train": ("train.bin",), "test": ("test.bin",)},
        "fine_label_names.txt",
        2,
    ),
}


class Cifar(ImageDataset):
    """CIFAR-10 or CIFAR-100 (its 100 fine classes).

    Args:
        name: "CIFAR10" or "CIFAR100".
        path: the folder that holds the unpacked binary version.
        split: "train" or "test".

    Raises:
        ValueError: no such split, a file is not there, or it is not as long as a number of pictures.
    """

    def __init__(self, name: str, path: str | Path, split: str = "train") -> None:
        variant = VARIANTS[name]
        if split not in variant.files:
            raise ValueError(f"split of {name} must be train or test, got {split!r}")
        folder = Path(path) / variant.folder
        self.name = f"{name}/{split}"
        row = variant.label_bytes + PIXELS
        parts = []
        try:
            for file in variant.files[split]:
                content = np.fromfile(folder / file, np.uint8)
                if not len(content) or len(content) % row:
                    raise ValueError(
                        f"{folder / file}: has {len(content)} bytes, no multiple of {row}; unpack it again"
                    )
                parts.append(content.reshape(-1, row))
            lines = (folder / variant.names).read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError as error:
            raise ValueError(
                f"{error.filename}: cannot be read ({error.strerror}); the Python version of {name} consists of "
                f"pickles, which could run code and are never opened, so unpack {variant.archive} (the binary version, "
                f"from https://www.cs.toronto.edu/~kriz/cifar.html) in {path}"
            ) from None
        self.rows = np.concatenate(parts)
        self.classes = [line.strip() for line in lines if line.strip()]
        self.labels = self.rows[:, variant.label_bytes - 1].tolist()
        if max(self.labels) >= len(self.classes):
            raise ValueError(
                f"{folder}: has label {max(self.labels)}, and {variant.names} names {len(self.classes)} classes; "
                "unpack it again"
            )

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        pixels = self.rows[index, -PIXELS:].reshape(3, 32, 32).transpose(1, 2, 0)
        image = Image.fromarray(np.ascontiguousarray(pixels))
        return Sample(image, self.labels[index], None, f"{self.name}[{index}]")
