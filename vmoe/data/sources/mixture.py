"""Several data sets as one, each with its share of the samples that training draws."""

from collections.abc import Sequence
from pathlib import Path

from vmoe.data.dataset import ConcatenatedDataset, ImageDataset, Sample
from vmoe.data.sampler import MixedBatches
from vmoe.data.seeding import derive_seed


class Mixture(ConcatenatedDataset):
    """The samples of several data sets, one set after the other; where only some have captions or labels, none has.

    `weights` are the shares of the samples that training draws from each, on any scale; None: in proportion to their
    sizes. ValueError: the data sets have neither captions nor classes in common.
    """

    def __init__(self, datasets: Sequence[ImageDataset], weights: Sequence[float | None] = (None,)) -> None:
        self.datasets = datasets
        self.set_sizes([len(dataset) for dataset in datasets])
        self.decoded = all(dataset.decoded for dataset in datasets)
        self.weights = self.sizes.tolist() if None in weights else weights
        self.has_captions = all(dataset.has_captions for dataset in datasets)
        same = all(dataset.classes == datasets[0].classes for dataset in datasets)
        self.classes = datasets[0].classes if same else None
        if all(dataset.synsets == datasets[0].synsets for dataset in datasets):
            self.synsets = datasets[0].synsets
        if not self.has_captions and self.classes is None:
            raise ValueError("sources of a mixture must all have captions, or all the same classes in the same order")

    def __getitem__(self, index: int) -> Sample:
        source, number = self.locate(index)
        sample = self.datasets[source][number]
        return sample._replace(
            label=sample.label if self.classes is not None else None,
            caption=sample.caption if self.has_captions else None,
        )

    def caption(self, index: int) -> str:
        source, number = self.locate(index)
        return self.datasets[source].caption(number)

    def name_of(self, index: int) -> str:
        source, number = self.locate(index)
        return self.datasets[source].name_of(number)

    def file_of(self, index: int) -> tuple[str, Path] | None:
        source, number = self.locate(index)
        return self.datasets[source].file_of(number)

    def batches(self, seed: int, batch_size: int) -> MixedBatches:
        shuffles = [dataset.shuffle(derive_seed(seed, 0, n), batch_size) for n, dataset in enumerate(self.datasets)]
        return MixedBatches(shuffles, (self.ends - self.sizes).tolist(), self.weights, batch_size)
