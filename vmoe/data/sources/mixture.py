"""Several data sets as one, each with its share of the samples that training draws."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vmoe.data.dataset import Captions, ImageDataset, Sample
from vmoe.data.sampler import MixedBatches
from vmoe.data.seeding import derive_seed


class Mixture(ImageDataset):
    """The samples of several data sets, one set after the other.

    Args:
        datasets: all with captions, or all with the same classes; where only some have captions (or labels), the
            mixture has none.
        weights: share of the samples that training draws from each, on any scale; None: in proportion to their sizes.

    Raises:
        ValueError: the data sets have neither captions nor classes in common.
    """

    def __init__(self, datasets: Sequence[ImageDataset], weights: Sequence[float] | None = None) -> None:
        self.datasets = datasets
        self.sizes = np.array([len(dataset) for dataset in datasets])
        self.ends = self.sizes.cumsum()
        self.weights = self.sizes.tolist() if weights is None else weights
        self.has_captions = all(dataset.has_captions for dataset in datasets)
        same = all(dataset.classes == datasets[0].classes for dataset in datasets)
        self.classes = datasets[0].classes if same else None
        if not self.has_captions and self.classes is None:
            raise ValueError("sources of a mixture must all have captions, or all the same classes in the same order")

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: int) -> Sample:
        source, number = self._find(index)
        sample = self.datasets[source][number]
        return sample._replace(
            label=sample.label if self.classes is not None else None,
            caption=sample.caption if self.has_captions else None,
        )

    @property
    def captions(self) -> Sequence[str] | None:
        if not self.has_captions:
            return None
        captions = [dataset.captions for dataset in self.datasets]

        def read(index: int) -> str:
            source, number = self._find(index)
            return captions[source][number]

        return Captions(len(self), read)

    def file_of(self, index: int) -> tuple[str, Path] | None:
        source, number = self._find(index)
        return self.datasets[source].file_of(number)

    def batches(self, seed: int, batch_size: int) -> MixedBatches:
        shuffles = [dataset.shuffle(derive_seed(seed, 0, n), batch_size) for n, dataset in enumerate(self.datasets)]
        return MixedBatches(shuffles, (self.ends - self.sizes).tolist(), self.weights, batch_size)

    def _find(self, index: int) -> tuple[int, int]:
        """(number of the data set, place in it) of a sample."""
        source = int(self.ends.searchsorted(index, side="right"))
        return source, index - int(self.ends[source] - self.sizes[source])
