"""Writes corrupted copies of small photos: `python -m experiments.corrupt data/cifar10/test data/cifar10_corrupted`.

Five corruptions of CIFAR-10-C (arXiv 1903.12261) at its fifth severity, of the first photos of each class folder. They
follow from the photos and their order alone.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

PER_CLASS = 200


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="experiments.corrupt", description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="a folder with a folder of photos for each class")
    parser.add_argument("target", type=Path, help="a new folder")
    args = parser.parse_args(argv)
    classes = sorted(folder for folder in args.source.glob("*") if folder.is_dir())
    if not classes or args.target.exists():
        problem = f"{args.target} is there already" if classes else f"{args.source} holds no class folders"
        print(f"experiments.corrupt: error: {problem}", file=sys.stderr)
        return 1
    count = sum(corrupt_class(folder, args.target / folder.name) for folder in classes)
    print(f"{count} images in {args.target}")
    return 0


def corrupt_class(source: Path, target: Path) -> int:
    """Writes the copies of a class; returns how many."""
    import numpy as np
    from PIL import Image

    target.mkdir(parents=True)
    files = sorted(file for file in source.iterdir() if file.suffix.lower() in (".jpg", ".jpeg", ".png"))[:PER_CLASS]
    for number, file in enumerate(files):
        pixels = np.asarray(Image.open(file).convert("RGB"), dtype=np.float32) / 255
        for name, changed in corruptions(pixels, seed=number).items():
            image = Image.fromarray((changed.clip(0, 1) * 255).round().astype(np.uint8))
            image.save(target / f"{name}_{file.stem}.png")
    return len(list(target.iterdir()))


def corruptions(pixels, seed: int) -> dict:
    """{name: (H, W, 3) float} of a photo (H, W, 3) in 0..1; the results may lie outside."""
    import io

    import numpy as np
    from PIL import Image, ImageFilter

    image, encoded = Image.fromarray((pixels * 255).round().astype(np.uint8)), io.BytesIO()
    image.save(encoded, "JPEG", quality=40)
    noise = np.random.default_rng(seed).normal(scale=0.1, size=pixels.shape)
    mean = pixels.mean(axis=(0, 1), keepdims=True)
    return {
        "gaussian_noise": pixels + noise,
        "gaussian_blur": np.asarray(image.filter(ImageFilter.GaussianBlur(1.0)), dtype=np.float32) / 255,
        "brightness": pixels + 0.3,
        "contrast": (pixels - mean) * 0.15 + mean,
        "jpeg_compression": np.asarray(Image.open(encoded), dtype=np.float32) / 255,
    }


if __name__ == "__main__":
    sys.exit(main())
