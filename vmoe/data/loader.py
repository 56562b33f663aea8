"""Batches for training (endless, at an exact position) and for evaluation (once, in order)."""

import itertools
import logging
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Self

import numpy as np
import torch
from PIL import Image
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, Dataset

from vmoe.data.config import LoaderConfig
from vmoe.data.dataset import ImageDataset
from vmoe.data.images import BadSample, DataError
from vmoe.data.naflex import NaFlexTransform
from vmoe.data.sampler import BatchKey, EpochBatches, MixedBatches, NaFlexBatches
from vmoe.data.seeding import derive_seed, isolated_randomness, seed_process
from vmoe.data.texts import Tokenizer, cut_message, cut_rows, warn_once
from vmoe.data.transforms import Transform
from vmoe.data.workers import leave_signals_to_the_main_process, own_cores
from vmoe.utils.printable import printable
from vmoe.utils.world import world

logger = logging.getLogger("vmoe.data")

MIN_READ_FOR_SHARE = 1000  # before, a share of bad samples means little (or all of them, where there are fewer)
MAX_REPLACEMENTS = 100  # with a bad share of 0.9 all of these fail once in 37,000 samples
MAX_CACHED_CAPTIONS = 100_000


class TooManyBadSamples(RuntimeError):
    """More of the samples are bad than `max_bad_share` allows."""


class Batch(NamedTuple):
    """What a worker hands over."""

    # "image" (float32, or uint8 (B, H, W, 3) to normalize, or the dict of a NaFlexTransform), "index", "label", "text"
    tensors: dict[str, torch.Tensor]
    bad: Sequence[tuple[str, str]] = ()  # (path, reason) of every bad sample met
    num_read: int = 0  # samples, the bad ones and their replacements included
    missing: int = 0  # samples for which there is none
    seconds: float = 0.0  # that reading and augmenting them took
    cut: tuple[str, ...] = ()  # captions that are longer than the tokenizer's context
    error: str | None = None  # why the data set cannot be read on (an exception would arrive with a traceback)


class BatchReader(Dataset):
    """Maps a BatchKey to its Batch; a pure function of key and seed, in whichever worker process it runs.

    A bad sample is replaced by another with `replace_bad`, else skipped.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        transform: Callable[[Image.Image], torch.Tensor] | NaFlexTransform,
        tokenizer: Tokenizer | None,
        seed: int,
        replace_bad: bool,
    ) -> None:
        self.dataset, self.transform, self.tokenizer = dataset, transform, tokenizer
        self.seed, self.replace_bad = seed, replace_bad
        self.naflex = transform if isinstance(transform, NaFlexTransform) else None
        # Images stay bytes until the main process has the batch.
        self.normalize_later = isinstance(transform, Transform) and transform.erase is None
        self._tokens: dict[str, tuple[torch.Tensor, bool]] = {}

    def __getitem__(self, key: BatchKey) -> Batch:
        samples, bad, began = [], [], time.perf_counter()
        try:
            with isolated_randomness():
                for index, epoch in zip(key.indices, key.epochs, strict=True):
                    if sample := self._read(epoch, index, bad, key.seq_len):
                        samples.append(sample)
        except DataError as error:
            return Batch({}, bad, 0, error=str(error))
        num_read = len(key.indices) + (len(bad) if self.replace_bad else 0)
        batch = self._stack(samples, key.seq_len) if samples else Batch({})
        counts = {"num_read": num_read, "missing": len(key.indices) - len(samples)}
        return batch._replace(bad=bad, **counts, seconds=time.perf_counter() - began)

    def _read(self, epoch: int, index: int, bad: list[tuple[str, str]], seq_len: int | None) -> tuple | None:
        """(index, image, label, caption) of a sample or its replacement; None where it is skipped."""
        for attempt in range(MAX_REPLACEMENTS if self.replace_bad else 1):
            candidate = derive_seed(self.seed, epoch, index, attempt) % len(self.dataset) if attempt else index
            try:
                samples = self.dataset if self.dataset.cache is None else self.dataset.cache
                image, label, caption, path = samples[candidate]
                if self.naflex is not None:
                    self.naflex.check(image, path)
            except BadSample as error:
                bad.append((error.path, error.reason))
                continue
            pixels = self._augment(image, derive_seed(self.seed, epoch, index), seq_len)
            return index, pixels, label, caption
        return None

    def _augment(self, image: Image.Image | np.ndarray, seed: int, seq_len: int | None) -> np.ndarray | torch.Tensor:
        """(H, W, 3) uint8, which is copied once, into the batch; or a tensor, if it is not normalised later."""
        if isinstance(image, np.ndarray):  # from memory
            if self.normalize_later and self.transform.quick and image.shape == self.transform.quick.shape:
                return self.transform.quick(image, seed)
            image = Image.fromarray(image)
        seed_process(seed)
        if self.naflex is not None:
            return self.naflex.by_length[seq_len](image)
        return np.asarray(self.transform.geometry(image)) if self.normalize_later else self.transform(image)

    def _stack(self, samples: list[tuple], seq_len: int | None) -> Batch:
        """The batch of (index, image, label, caption) tuples."""
        indices, images, labels, captions = zip(*samples)
        if self.naflex is not None:
            image = self.naflex.stack(images, seq_len)
        else:
            image = torch.from_numpy(np.stack(images)) if self.normalize_later else torch.stack(images)
        tensors = {"image": image, "index": torch.tensor(indices)}
        if self.dataset.classes is not None:
            tensors["label"] = torch.tensor(labels)
        if self.tokenizer is None:
            return Batch(tensors)
        tokens, is_cut = zip(*map(self._tokenize, captions))
        tensors["text"] = torch.stack(tokens)
        return Batch(tensors, cut=tuple(caption for caption, cut in zip(captions, is_cut) if cut))

    def _tokenize(self, caption: str) -> tuple[torch.Tensor, bool]:
        """((L,) long, whether it is cut); kept, since tokenizing takes longer than cropping the image."""
        if caption in self._tokens:
            return self._tokens[caption]
        tokens_1L = self.tokenizer([caption])
        found = tokens_1L[0], bool(cut_rows(self.tokenizer, [caption], tokens_1L))
        if len(self._tokens) < MAX_CACHED_CAPTIONS:
            self._tokens[caption] = found
        return found


class _Loader:
    """What both loaders share: the worker processes, and what is done with a batch that arrives."""

    def __init__(self, reader: BatchReader, config: LoaderConfig, on_bad: str, device: torch.device | str | None):
        if reader.tokenizer is not None and not reader.dataset.has_captions:
            name = type(reader.dataset).__name__
            raise ValueError(f"{name} has no captions: text needs a data source with captions, such as pairs or shards")
        self.reader, self.config, self.device = reader, config, device
        self.fail = on_bad == "fail"
        self.num_cut = 0

    def _start(self) -> Iterator[Batch]:
        """The batches of the keys, in their order; warns once if there are more workers than cores."""
        if world()[0] == 0 and self.config.num_workers > own_cores():
            workers = f"num_workers is {self.config.num_workers}, more than"
            warn_once(f"{workers} the CPU cores of this process ({own_cores()}), which may make reading slower")
        with warnings.catch_warnings():  # PyTorch says the same for each loader, twice
            warnings.filterwarnings("ignore", message="This DataLoader will create")
            loader = DataLoader(
                self.reader,
                sampler=self._keys(),
                batch_size=None,  # a key is a batch
                num_workers=self.config.num_workers,
                pin_memory=self.config.pin_memory and torch.cuda.is_available(),
                worker_init_fn=leave_signals_to_the_main_process,
                generator=torch.Generator(),  # else every start would draw a number from the global generator
            )
            return iter(loader)

    def _check(self, batch: Batch) -> None:
        """Raises a batch's error; counts the captions that were cut, and logs the first batch with one."""
        if batch.error is not None:
            raise DataError(batch.error)
        if batch.bad and self.fail:
            raise BadSample(*batch.bad[0])
        if batch.cut and not self.num_cut:
            num_captions = len(batch.tensors["text"])
            logger.warning("%s", cut_message(len(batch.cut), num_captions, "captions of a batch", batch.cut[0]))
        self.num_cut += len(batch.cut)

    def _finish(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if self.device is not None:
            tensors = tree_map(lambda tensor: tensor.to(self.device, non_blocking=True), tensors)
        if self.reader.normalize_later:
            tensors = {**tensors, "image": self.reader.transform.normalize(tensors["image"])}
        return tensors


def batches_of(dataset: ImageDataset, config: LoaderConfig, seed: int) -> EpochBatches | MixedBatches | NaFlexBatches:
    """The batches of a training; ValueError: they do not suit the data set."""
    sizes = config.batch_sizes
    if len(dataset) < sizes[largest := max(sizes, key=sizes.get)]:
        problem = f"{config.size_text(largest)} is more than the data set's {len(dataset)} samples"
        raise ValueError(f"{problem}: make {config.size_setting} smaller")
    if config.naflex is None:
        return dataset.batches(seed, config.batch_size)
    plain = dataset.batches(seed, math.gcd(*sizes.values()))
    if not isinstance(plain, EpochBatches):
        raise ValueError("data.loader.naflex takes one data set, and data.train is a mixture: choose one of them")
    return NaFlexBatches(plain.shuffle, sizes, seed)


class TrainLoader(_Loader):
    """Endless batches in a shuffled order, new in every epoch.

    An iterator of {"image": (B, 3, H, W) float32, "index": (B,) long, "label": (B,) long where the data set has
    classes, "text": (B, L) long where there is a tokenizer}. "index" is that of the sample asked for, also where
    another one replaces it because it is bad.

    With `config.naflex` the transform is a NaFlexTransform, and "image" the dict that it gives.

    Order and augmentation follow from (seed, epoch, index) alone. Process r of W hands out rows r * B/W to
    (r+1) * B/W of each batch, so a position is the same for any number of processes.

    Args:
        transform: see `build_transform`; any callable from PIL image to (3, H, W) float tensor will do.
        tokenizer: list of captions to (B, L) long; None: no text in the batches.
        device: where the batches go; images travel as bytes and are normalised there. None: they stay on the CPU.
        part: (r, W): hand out part r of W of each batch. None: this process's own.

    `step` counts the batches handed out; `num_read` and `num_bad` the samples that this process read, replacements
    included, and the bad ones; `num_cut` the captions that are longer than the tokenizer's context.

    ValueError: the batch size does not suit the data set or the number of processes, or there are no captions.
    TooManyBadSamples, DataError: while iterating: more than `max_bad_share` are bad, or a file is broken.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        transform: Callable[[Image.Image], torch.Tensor],
        tokenizer: Tokenizer | None,
        config: LoaderConfig,
        seed: int,
        device: torch.device | str | None = None,
        part: tuple[int, int] | None = None,
    ) -> None:
        on_bad = config.on_bad or "replace"
        _, processes = self.part = world() if part is None else part
        if on_bad == "skip":
            raise ValueError("on_bad must be replace or fail in training, got skip: batches must be complete")
        for seq_len, size in config.batch_sizes.items():
            if size % processes:
                problem = f"no multiple of the {processes} processes that share each batch"
                raise ValueError(f"{config.size_text(seq_len)} is {problem}: change {config.size_setting}")
        super().__init__(BatchReader(dataset, transform, tokenizer, seed, on_bad == "replace"), config, on_bad, device)
        self.batches = batches_of(dataset, config, seed)
        self.steps_per_epoch = self.batches.steps_per_epoch
        self.step = self.num_read = self.num_bad = 0
        self._seconds, self._samples = 0.0, 0
        self.bad_paths: dict[str, str] = {}  # {path: reason}
        self._batches: Iterator[Batch] | None = None

    def __iter__(self) -> Self:
        return self

    @property
    def samples_per_second(self) -> float:
        """Samples per second that this process's workers can read together; NaN before the first."""
        workers = max(1, self.config.num_workers)
        return workers * self._samples / self._seconds if self._samples else math.nan

    def __next__(self) -> dict[str, torch.Tensor]:
        if self._batches is None:
            self._batches = self._start()
        batch = next(self._batches)
        self.step += 1
        self._check(batch)
        self._count(batch)
        return self._finish(batch.tensors)

    def _keys(self) -> Iterator[BatchKey]:
        """Keys of this process's part of the coming batches, without end."""
        # Without `self`: a cycle would leave the workers to the garbage collector, which cannot stop them at once.
        batches, (rank, processes), first = self.batches, self.part, self.step

        def part(indices: tuple[int, ...], epochs: tuple[int, ...], seq_len: int | None) -> BatchKey:
            rows = slice(rank * len(indices) // processes, (rank + 1) * len(indices) // processes)
            return BatchKey(indices[rows], epochs[rows], seq_len)

        return (part(*batches.batch(number)) for number in itertools.count(first))

    def _count(self, batch: Batch) -> None:
        self.num_read += batch.num_read
        self._seconds += batch.seconds
        self._samples += batch.num_read
        self.num_bad += len(batch.bad)
        for path, reason in batch.bad:
            if path not in self.bad_paths:
                self.bad_paths[path] = reason
                logger.warning("bad sample replaced by another: %s: %s", printable(path), reason)
        enough = self.num_read >= min(MIN_READ_FOR_SHARE, len(self.reader.dataset))
        if batch.missing or (enough and self.num_bad > self.config.max_bad_share * self.num_read):
            # A run that continues knows from before the stop how many were bad, but not which.
            last = next(reversed(batch.bad or list(self.bad_paths.items())), None)
            which = f"; the last is {printable(last[0])}: {last[1]}" if last else ", all from before this start"
            raise TooManyBadSamples(
                f"{self.num_bad} of {self.num_read} samples read are bad ({self.num_bad / self.num_read:.1%}), more "
                f"than max_bad_share {self.config.max_bad_share} allows{which}. Repair or remove the files that the "
                "log names, or raise max_bad_share"
            )

    def state_dict(self) -> dict[str, int]:
        """Position of the batches handed out so far, for any number of processes; the counts are this process's own."""
        counts = {"step": self.step, "num_read": self.num_read, "num_bad": self.num_bad, "seed": self.reader.seed}
        sizes = self.config.batch_sizes
        size = sizes.get(None, [list(pair) for pair in sizes.items()])
        return {**counts, "batch_size": size, "num_samples": len(self.reader.dataset)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continues exactly behind the batches that `state` counts; ValueError: it is of other data or settings."""
        mine = self.state_dict()
        for name in ("seed", "batch_size", "num_samples"):
            if state[name] != mine[name]:
                differs = f"the data position was saved with {name} {state[name]}, but it is now {mine[name]}"
                raise ValueError(f"{differs}: continue with the old setting, or start a new run in another folder")
        self.close()
        self.step = state["step"]
        # One process counts on for all, so that their sum stays right.
        self.num_read, self.num_bad = (state["num_read"], state["num_bad"]) if self.part[0] == 0 else (0, 0)

    def close(self) -> None:
        """Stops the worker processes; the next batch starts them again."""
        self._batches = None


class EvalLoader(_Loader):
    """All samples once, in order; the last batch may be smaller. Arguments and batches as for `TrainLoader`.

    Where torch.distributed runs, each process reads its share of the same batches: number rank, rank + world, ... A bad
    sample raises BadSample, or with `on_bad="skip"` is skipped and counted. `indices` are of the samples that all
    processes read together, in this order (default: all). `skipped_paths` and `num_cut` are of the last pass.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        transform: Callable[[Image.Image], torch.Tensor],
        tokenizer: Tokenizer | None,
        config: LoaderConfig,
        device: torch.device | str | None = None,
        indices: Sequence[int] | None = None,
    ) -> None:
        on_bad = config.on_bad or "fail"
        if on_bad == "replace":
            raise ValueError("on_bad must be fail or skip in evaluation, got replace: metrics must be of the samples")
        super().__init__(BatchReader(dataset, transform, tokenizer, 0, replace_bad=False), config, on_bad, device)
        self.indices = range(len(dataset)) if indices is None else indices
        self.skipped_paths: list[str] = []

    @property
    def num_skipped(self) -> int:
        return len(self.skipped_paths)

    def __len__(self) -> int:
        """Number of this process's batches (one fewer for each whose samples are all skipped)."""
        return len(self._keys())

    def _keys(self) -> list[BatchKey]:
        rank, num_processes = world()
        starts = range(0, len(self.indices), self.config.batch_size)[rank::num_processes]
        batches = [tuple(self.indices[start : start + self.config.batch_size]) for start in starts]
        seq_len = self.reader.naflex and max(self.reader.naflex.by_length)
        return [BatchKey(indices, (0,) * len(indices), seq_len) for indices in batches]

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        self.skipped_paths, self.num_cut = [], 0
        for batch in self._start():
            self._check(batch)
            for path, reason in batch.bad:
                self.skipped_paths.append(path)
                logger.warning("bad sample skipped: %s: %s", printable(path), reason)
            if batch.tensors:
                yield self._finish(batch.tensors)


train_loader, eval_loader = TrainLoader, EvalLoader
