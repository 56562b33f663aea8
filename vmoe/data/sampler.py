"""The order of samples in training: pure functions of the seed and the step, for any number of processes.

A `Shuffle` is the order of one data set, a new one in every epoch. `EpochBatches` cuts it into batches; `MixedBatches`
draws batches from several data sets by weight, and `NaFlexBatches` batches of several sizes. Only what saves time is
kept between calls.
"""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import torch

from vmoe.data.seeding import derive_seed


class BatchKey(NamedTuple):
    """Names a batch: all that is in it follows from this and the seed."""

    indices: tuple[int, ...]  # of its samples in the data set
    epochs: tuple[int, ...]  # for each of them how many epochs of its source are complete
    seq_len: int | None = None  # patches that an image is resized to, of NaFlexBatches


class ShuffledSamples:
    """All samples in any order, another one in each epoch of `size` samples."""

    def __init__(self, seed: int, num_samples: int) -> None:
        self.seed = seed
        self.size = num_samples
        self._order: tuple[int | None, np.ndarray] = (None, np.empty(0, np.int64))

    def indices(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """(stop - start,) int64, the samples of an epoch at positions start to stop; 0 <= start <= stop <= size."""
        if self._order[0] != epoch:
            self._order = epoch, _permutation(self.size, self.seed, epoch)
        return self._order[1][start:stop]


class ShuffledShards:
    """An order that reads shards (files of many samples) nearly one after the other.

    The shards are shuffled and concatenated to a row. The row is cut into `streams` equal parts, each of which gives an
    equal part of every batch; the remainder is skipped in this epoch. Within a stream, windows of `window` consecutive
    samples are shuffled. Memory is that of the shards' sizes and of a window per stream.
    """

    def __init__(self, seed: int, sizes: Sequence[int], streams: int, window: int) -> None:
        if streams > sum(sizes):
            raise ValueError(f"streams must be at most the data set's number of samples, {sum(sizes)}, got {streams}")
        self.seed = seed
        self.sizes = np.asarray(sizes, np.int64)
        self.starts = self.sizes.cumsum() - self.sizes
        self.streams = streams
        self.window = window
        self.length = int(self.sizes.sum()) // streams  # of a stream
        self.size = self.length * streams
        self._row: tuple[int | None, np.ndarray, np.ndarray] = (None, self.starts, self.starts)
        self._windows: dict[int, tuple[tuple[int, int], np.ndarray]] = {}

    def indices(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """As of `ShuffledSamples`; those of a stream are adjacent, so that parts of a batch are parts of streams."""
        if self._row[0] != epoch:
            shards = _permutation(len(self.sizes), self.seed, epoch)
            self._row = epoch, shards, self.sizes[shards].cumsum()
        _, shards, ends = self._row
        parts = []
        for stream in range(self.streams):
            # Positions go round the streams: position p is number p // streams of stream p % streams.
            first, last = -((stream - start) // self.streams), -((stream - stop) // self.streams)
            parts.append(stream * self.length + self._within(epoch, stream, first, last))
        row = np.concatenate(parts)
        at = ends.searchsorted(row, side="right")
        shard = shards[at]
        return self.starts[shard] + row - (ends[at] - self.sizes[shard])

    def _within(self, epoch: int, stream: int, start: int, stop: int) -> np.ndarray:
        """Positions in the row of a stream's samples number start to stop, counted from its first."""
        parts = [np.empty(0, np.int64)]
        while start < stop:
            number, offset = divmod(start, self.window)
            base = number * self.window
            size = min(self.window, self.length - base)
            key, order = self._windows.get(stream, (None, None))
            if key != (epoch, number):
                order = _permutation(size, self.seed, epoch, stream, number)
                self._windows[stream] = (epoch, number), order
            count = min(size - offset, stop - start)
            parts.append(base + order[offset : offset + count])
            start += count
        return np.concatenate(parts)


Shuffle = ShuffledSamples | ShuffledShards


class EpochBatches:
    """Batches of one data set; an epoch's last, incomplete batch is dropped."""

    def __init__(self, shuffle: Shuffle, batch_size: int) -> None:
        self.shuffle = shuffle
        self.batch_size = batch_size
        self.steps_per_epoch = shuffle.size // batch_size

    def batch(self, step: int) -> BatchKey:
        """The batch of a step (from 0, without end)."""
        epoch, position = divmod(step, self.steps_per_epoch)
        indices = self.shuffle.indices(epoch, position * self.batch_size, (position + 1) * self.batch_size)
        return BatchKey(tuple(indices.tolist()), (epoch,) * len(indices))


class MixedBatches:
    """Batches from several data sets, each with its share of the samples by weight (on any scale), exact to a few.

    Every data set goes through its own epochs: a sample comes again only when all others of its set have come.
    `steps_per_epoch` is that of all sets together. Samples are numbered one set after the other, from `starts`.
    """

    def __init__(
        self, shuffles: Sequence[Shuffle], starts: Sequence[int], weights: Sequence[float], batch_size: int
    ) -> None:
        self.shuffles = shuffles
        self.starts = starts
        self.weights = [Fraction(weight) for weight in weights]
        self.batch_size = batch_size
        self.steps_per_epoch = sum(shuffle.size for shuffle in shuffles) // batch_size

    def batch(self, step: int) -> BatchKey:
        """The batch of a step (from 0, without end); every part of it has each set's share of the samples."""
        before, after = (self._given(number * self.batch_size) for number in (step, step + 1))
        indices, epochs, ranks = [], [], []
        for shuffle, first, start, stop in zip(self.shuffles, self.starts, before, after):
            ranks.append((np.arange(stop - start) + 0.5) / max(1, stop - start))
            while start < stop:
                epoch, position = divmod(start, shuffle.size)
                count = min(shuffle.size - position, stop - start)
                indices.append(first + shuffle.indices(epoch, position, position + count))
                epochs.append(np.full(count, epoch))
                start += count
        dealt = np.argsort(np.concatenate(ranks), kind="stable")
        return BatchKey(*(tuple(np.concatenate(parts)[dealt].tolist()) for parts in (indices, epochs)))

    def _given(self, total: int) -> list[int]:
        """How many of the first `total` samples each set gives: each takes its share of what those before it left."""
        counts, weight_left = [], sum(self.weights)
        for weight in self.weights[:-1]:
            counts.append(total * weight // weight_left)
            total -= counts[-1]
            weight_left -= weight
        return [*counts, total]


class NaFlexBatches:
    """Batches of one data set, each with a sequence length, drawn at random, and the batch size that belongs to it.

    The lengths are those of timm's NaFlex loader: drawn once, and shuffled in each epoch. Samples that are left when
    the next batch would be too large are dropped in this epoch. `sizes` is {sequence length: batch size}.
    """

    def __init__(self, shuffle: Shuffle, sizes: Mapping[int, int], seed: int) -> None:
        self.shuffle, self.seed = shuffle, seed
        most = shuffle.size // min(sizes.values())
        generator = torch.Generator().manual_seed(derive_seed(seed, most))
        drawn = np.asarray(list(sizes.items()))[torch.randint(len(sizes), (most,), generator=generator).numpy()]
        self.steps_per_epoch = steps = int(drawn[:, 1].cumsum().searchsorted(shuffle.size, side="right"))
        self.drawn = drawn[:steps]  # (steps, 2) sequence lengths and batch sizes
        self.batch_size = float(self.drawn[:, 1].mean())

    def batch(self, step: int) -> BatchKey:
        """The batch of a step (from 0, without end)."""
        epoch, position = divmod(step, self.steps_per_epoch)
        order = _permutation(self.steps_per_epoch, self.seed, epoch, self.steps_per_epoch)[: position + 1]
        lengths, sizes = self.drawn[order].T
        stop = int(sizes.sum())
        indices = self.shuffle.indices(epoch, stop - int(sizes[-1]), stop)
        return BatchKey(tuple(indices.tolist()), (epoch,) * len(indices), int(lengths[-1]))


def _permutation(size: int, *seed: int) -> np.ndarray:
    generator = torch.Generator().manual_seed(derive_seed(*seed))
    return torch.randperm(size, generator=generator).numpy()
