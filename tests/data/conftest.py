"""Small data sets and a tokenizer, made on the spot."""

import numpy as np
import pytest
import torch
from PIL import Image

from vmoe.data.dataset import ImageDataset, Sample
from vmoe.data.images import BadSample

PREPROCESS = {
    "input_size": (3, 8, 8),
    "mean": (0.5, 0.4, 0.3),
    "std": (0.5, 0.6, 0.7),
    "interpolation": "bicubic",
    "crop_pct": 1.0,
}


class Images(ImageDataset):
    """`size` noise images with captions; those whose index is in `bad` cannot be read."""

    has_captions = True
    classes = ("even", "odd")

    def __init__(self, size, bad=()):
        self.size = size
        self.bad = set(bad)

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        if index in self.bad:
            raise BadSample(f"image {index}", "made bad")
        pixels = np.random.default_rng(index).integers(0, 256, (12, 10, 3), dtype=np.uint8)
        return Sample(Image.fromarray(pixels), index % 2, f"image number {index}", f"image {index}")


def tokenize(captions):
    """(B, 4) long; the last token is the number at the caption's end."""
    return torch.tensor([[1, 2, 3, int(caption.split()[-1])] for caption in captions])


@pytest.fixture
def photo():
    """A smooth 20 x 10 RGB image."""
    ramp = np.linspace(0, 255, 20, dtype=np.uint8)
    return Image.fromarray(
        np.stack([np.tile(ramp, (10, 1)), np.full((10, 20), 100), np.zeros((10, 20))], 2).astype("u1")
    )
