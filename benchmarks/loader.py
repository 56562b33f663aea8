"""Images per second of the shard loader beside torchvision's own ways: `python -m benchmarks.loader --help`.

All read the same JPEG files (in shards, and one by one in class folders), crop at random, resize to the same side,
flip, normalise, and hand over batches of (B, 3, side, side) float32 from the same number of worker processes. They run
in turn (A B C A B C ...), so that a drifting machine slows all. Images per second count from the first batch to the
last, so the start of the workers is not in them. CPU time is that of the workers and the main process together; other
work on the machine changes it little.

The images are made: smooth noise with sharp edges and grain, whose JPEG files have about the size of photographs of as
many pixels.
"""

import argparse
import gc
import io
import multiprocessing
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from vmoe.cli.write_shards import write_shards
from vmoe.data import (
    AugmentationConfig,
    LoaderConfig,
    SourceConfig,
    TrainLoader,
    build_dataset,
    build_transform,
    train_loader,
)
from vmoe.utils.allocator import keep_freed_memory

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OURS = "vmoe, shards"
PER_SHARD = 500
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)


def photograph(number: int) -> bytes:
    """A JPEG file (quality 90) of 300 to 500 pixels a side that follows from its number."""
    rng = np.random.default_rng(number)
    width, height = (int(side) for side in rng.integers(300, 501, 2))
    pixels = np.zeros((height, width, 3), np.float32)
    for cells, strength in ((4, 90), (16, 45), (64, 22)):  # coarse to fine, as photographs have it
        noise = rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8)
        resized = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
        pixels += (np.asarray(resized, np.float32) - 128) * (strength / 90)
    for _ in range(12):
        top, left = rng.integers(0, height - 20), rng.integers(0, width - 20)
        pixels[top : top + rng.integers(10, 120), left : left + rng.integers(10, 120)] += rng.normal(0, 40, 3)
    pixels += rng.normal(0, 6, pixels.shape)
    file = io.BytesIO()
    Image.fromarray((pixels + 128).clip(0, 255).astype(np.uint8)).save(file, "jpeg", quality=90)
    return file.getvalue()


def write(root: Path, count: int) -> None:
    """The same images as files in ten class folders and as shards."""
    for number in range(count):
        folder = root / "folders" / f"class{number % 10}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number:07}.jpg").write_bytes(photograph(number))
    write_shards(build_dataset(SourceConfig("image_folder", str(root / "folders"))), root / "shards", PER_SHARD)


class Decoded(torch.utils.data.Dataset):
    """torchvision's own JPEG decoder and transforms of tensors."""

    def __init__(self, root: str, transform: Callable) -> None:
        self.samples = torchvision.datasets.ImageFolder(root).samples
        self.transform = transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        path, label = self.samples[index]
        image = torchvision.io.decode_image(path, torchvision.io.ImageReadMode.RGB)
        return self.transform(image), label


def measure(start: Callable[[], Iterator], batches: int) -> tuple[float, float]:
    """(wall seconds, CPU seconds) for a batch."""

    def used() -> float:
        both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        return sum(one.ru_utime + one.ru_stime for one in both)

    cpu = used()
    iterator = start()
    next(iterator)
    began = time.perf_counter()
    for _ in range(batches):
        next(iterator)
    seconds = time.perf_counter() - began
    if isinstance(iterator, TrainLoader):
        iterator.close()
    del iterator
    gc.collect()  # the workers have ended, so their CPU time counts
    if multiprocessing.active_children():
        raise RuntimeError("worker processes are still there, so their CPU time is missing")
    return seconds / batches, (used() - cpu) / (batches + 1)


def make_loaders(root: Path, args: argparse.Namespace) -> dict[str, Callable[[], Iterator]]:
    """{name: starts a loader} of the same images in `root`, with the same changes."""
    shards = root / "shards"
    dataset = build_dataset(SourceConfig("shards", str(shards), class_names=str(shards / "classes.txt")))
    preprocess = {"input_size": (3, args.side, args.side), "mean": MEAN, "std": STD, "interpolation": "bilinear"}
    transform = build_transform(preprocess, AugmentationConfig(scale=SCALE, ratio=RATIO, hflip=0.5))
    config = LoaderConfig(batch_size=args.batch_size, num_workers=args.workers)
    crop = [v2.RandomResizedCrop(args.side, SCALE, RATIO, antialias=True), v2.RandomHorizontalFlip()]
    to_float = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    of_pil = torchvision.datasets.ImageFolder(str(root / "folders"), v2.Compose([*crop, v2.ToImage(), *to_float]))
    of_tensors = Decoded(str(root / "folders"), v2.Compose([*crop, *to_float]))

    def plain(data: torch.utils.data.Dataset) -> Callable[[], Iterator]:
        loader = DataLoader(data, args.batch_size, shuffle=True, drop_last=True, num_workers=args.workers)
        return lambda: iter(loader)

    return {
        OURS: lambda: train_loader(dataset, transform, None, config, seed=0),
        "torchvision ImageFolder (Pillow) + v2": plain(of_pil),
        "torchvision decode_image + v2": plain(of_tensors),
    }


def report(times: dict[str, list[tuple[float, float]]], batch_size: int) -> None:
    """Prints a line for each loader."""
    for name, taken in times.items():
        rate = [batch_size / wall for wall, _ in taken]
        cpu = statistics.median(cpu for _, cpu in taken) / batch_size
        line = f"{name:38} {statistics.median(rate):6.0f} images/s ({min(rate):.0f} to {max(rate):.0f})"
        line += f", {1e3 * cpu:5.2f} ms CPU"
        for index, what in ((0, "vmoe is as quick times"), (1, "in CPU time")) if name != OURS else ():
            ratios = sorted(other[index] / own[index] for own, other in zip(times[OURS], taken))
            line += f"; {what} {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        print(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--side", type=int, default=224, help="of the images handed over, pixels")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--batches", type=int, default=20, help="batches of a round")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    if args.images < args.batch_size * (args.batches + 1):
        parser.error(f"{args.images} images are too few for {args.batches + 1} batches of {args.batch_size}")
    torch.set_num_threads(1)
    keep_freed_memory()  # as the training command does; all loaders profit

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        os.environ["VMOE_CACHE"] = folder
        write(root, args.images)
        size = sum(file.stat().st_size for file in (root / "folders").rglob("*.jpg")) / args.images
        loaders = make_loaders(root, args)
        print(
            f"{args.images} JPEG files of {size / 1000:.0f} kB, {args.workers} workers, batches of {args.batch_size}, "
            f"side {args.side}, {len(os.sched_getaffinity(0))} cores (load {os.getloadavg()[0]:.1f}), "
            f"torch {torch.__version__}, torchvision {torchvision.__version__}"
        )
        times = {name: [] for name in loaders}
        for number in range(args.rounds + 1):
            for name, start in loaders.items():
                taken = measure(start, args.batches)
                if number:  # the first round warms up the page cache
                    times[name].append(taken)
        report(times, args.batch_size)


if __name__ == "__main__":
    main()
