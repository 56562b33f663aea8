"""Decoded images in memory: read once, before the first batch, and from then on instead of their files."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from vmoe.data.dataset import ImageDataset, Sample
from vmoe.data.images import BadSample, DataError
from vmoe.data.workers import leave_signals_to_the_main_process
from vmoe.utils.config import ConfigError

BLOCK = 32  # images that a worker hands over together
SAMPLED = 64  # images from which the size of all is estimated
SLACK = 1.2  # memory that is allocated beyond the estimate; the system provides it when it is used


class CacheTooSmall(ConfigError):
    """The decoded images do not fit: `reason` without the remedy."""

    def __init__(self, reason: str, remedy: str = "raise it, or ") -> None:
        self.reason = reason
        super().__init__(f"{reason}: {remedy}set data.cache to null, and images are read from their files")


class ImageCache(Sequence[Sample]):
    """The samples of a data set with the bytes of their images, for loaders; bad samples stay bad."""

    def __init__(self, num_bytes: float) -> None:
        """`num_bytes`: an estimate of their size."""
        # One tensor: forked workers share its memory, and PyTorch shares it with others.
        try:
            self._pixels = torch.empty(int(SLACK * num_bytes), dtype=torch.uint8)
        except RuntimeError as error:  # PyTorch's own has lines of C++
            reason = f"the decoded images need {num_bytes / 1e9:.3g} GB, which the system refuses to allocate"
            raise CacheTooSmall(reason, remedy="") from error
        self._starts = [0]
        self._samples: list[Sample | BadSample] = []  # with the image's (width, height) as its image

    @property
    def num_bytes(self) -> int:
        """What the images take."""
        return self._starts[-1]

    def add(self, pixels: torch.Tensor, samples: Sequence[Sample | BadSample]) -> None:
        """Adds the next samples, whose images are one after the other in `pixels`."""
        start, end = self.num_bytes, self.num_bytes + len(pixels)
        if end > len(self._pixels):
            self._pixels.resize_(int(SLACK * end))
        self._pixels[start:end] = pixels
        for sample in samples:
            size = 0 if isinstance(sample, BadSample) else 3 * math.prod(sample.image)
            self._starts.append(self._starts[-1] + size)
            self._samples.append(sample)

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Sample:
        """As the data set's, but the image is an array (H, W, 3) uint8 that must not be changed."""
        sample = self._samples[index]
        if isinstance(sample, BadSample):
            raise BadSample(sample.path, sample.reason)
        pixels = self._pixels.numpy()[self._starts[index] : self._starts[index + 1]]
        width, height = sample.image
        return sample._replace(image=pixels.reshape(height, width, 3))


class _Blocks(Dataset):
    """Maps indices to (pixels, samples) there, or to (None, why the data set cannot be read on)."""

    def __init__(self, dataset: ImageDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, indices: range) -> tuple[torch.Tensor | None, list[Sample | BadSample] | str]:
        images, samples = [np.empty(0, np.uint8)], []
        for index in indices:
            try:
                sample = self.dataset[index]
            except BadSample as error:
                samples.append(error)
            except DataError as error:  # as an exception it would arrive with a traceback
                return None, str(error)
            else:
                images.append(np.asarray(sample.image).reshape(-1))
                samples.append(sample._replace(image=sample.image.size))
        return torch.from_numpy(np.concatenate(images)), samples


def cache_images(
    datasets: dict[str, ImageDataset],
    max_bytes: float,
    num_workers: int = 0,
    progress: Callable[..., Iterable] = lambda blocks, total: blocks,
) -> int:
    """Reads the images of data sets, by the names of their settings, into memory, where loaders then take them from.

    Returns their bytes. `progress` shows how much of an iterable is done, as rich's `track`. CacheTooSmall: the images
    take more than `max_bytes`; those of one size are not read then. DataError: a data set cannot be read.
    """
    needed, caches = {name: _estimate(dataset) for name, dataset in datasets.items()}, {}
    if sum(needed.values()) > max_bytes:
        raise CacheTooSmall(_reason(needed, max_bytes))
    for name, dataset in datasets.items():
        cache = caches[name] = ImageCache(needed[name])
        indices = [range(len(dataset))[start : start + BLOCK] for start in range(0, len(dataset), BLOCK)]
        for done, block in enumerate(progress(_read(dataset, indices, num_workers), total=len(indices)), start=1):
            cache.add(*block)
            sizes = needed | {name: max(needed[name], cache.num_bytes)}
            if sum(sizes.values()) > max_bytes:  # the images are larger than those of the estimate
                raise CacheTooSmall(_reason(needed | {name: cache.num_bytes * len(indices) / done}, max_bytes))
        needed[name] = cache.num_bytes
    for name, dataset in datasets.items():
        dataset.cache = caches[name]
    return sum(needed.values())


def _reason(needed: dict[str, float], max_bytes: float) -> str:
    sizes = " and ".join(f"{math.ceil(size / 1e7) / 100:g} GB ({name})" for name, size in needed.items())
    return f"data.cache_gb is {max_bytes / 1e9:.3g}, and the decoded images need about {sizes}"


def _read(
    dataset: ImageDataset, indices: list[range], num_workers: int
) -> Iterator[tuple[torch.Tensor, list[Sample | BadSample]]]:
    loader = DataLoader(
        _Blocks(dataset),
        sampler=indices,
        batch_size=None,
        num_workers=min(num_workers, len(indices) // 16),  # a few images are read before processes have started
        collate_fn=tuple,  # leaves it as it is
        worker_init_fn=leave_signals_to_the_main_process,
        generator=torch.Generator(),  # else it would draw a number from the global generator
    )
    for pixels, samples in loader:
        if pixels is None:
            raise DataError(samples)
        yield pixels, samples


def _estimate(dataset: ImageDataset) -> float:
    """Bytes of all images, from those of some at equal distances."""
    total = sum(3 * math.prod(sample.image.size) for sample in dataset.examples(SAMPLED))
    return total * len(dataset) / min(SAMPLED, len(dataset))
