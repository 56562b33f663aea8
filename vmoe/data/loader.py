"""Batches for training (endless, at an exact position) and for evaluation (once, in order)."""

from __future__ import annotations

import logging
import math
import os
import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader

from vmoe.data.batches import Batch, BatchReader
from vmoe.data.config import LoaderConfig
from vmoe.data.dataset import ImageDataset
from vmoe.data.images import BadSample, DataError
from vmoe.data.sampler import BatchKey
from vmoe.data.texts import Tokenizer, cut_message
from vmoe.utils.printable import printable
from vmoe.utils.world import world

logger = logging.getLogger("vmoe.data")

# The share of bad samples means little before this many are read (or all of them, where there are fewer).
MIN_READ_FOR_SHARE = 1000
# How long a worker goes on after SIGTERM.
GRACE_SECONDS = 5


class TooManyBadSamples(RuntimeError):
    """More of the samples are bad than `max_bad_share` allows."""


class TrainLoader:
    """Endless batches in a shuffled order, new in every epoch.

    Order and augmentation follow from (seed, epoch, index) alone: they do not depend on `num_workers`, on the process's
    random state, or on where a run was stopped. An epoch's last, incomplete batch is dropped. Made by `train_loader`.

    `config.batch_size` counts the samples of all processes. Process r of W hands out its part of each batch, rows
    r * B/W to (r+1) * B/W; so the batches of a run, and a position in it, are the same for any number of processes.

    Attributes:
        step: batches handed out so far.
        steps_per_epoch: whole batches in the data set.
        part: (number of this process, number of processes).
        num_read: samples that this process read for its part, bad ones and replacements included.
        num_bad: bad samples among these (one that is met twice counts twice).
        bad_paths: {path: reason} of the bad samples met by this object.
        num_cut: captions so far that are longer than the tokenizer's context; the first batch with one is logged.
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
        if on_bad == "skip":
            raise ValueError("on_bad must be replace or fail in training, got skip: batches must be whole")
        if len(dataset) < config.batch_size:
            raise ValueError(
                f"batch_size {config.batch_size} is more than the data set's {len(dataset)} samples: make it smaller"
            )
        self.part = world() if part is None else part
        if config.batch_size % self.part[1]:
            raise ValueError(
                f"batch_size {config.batch_size} is no multiple of the {self.part[1]} processes that share each batch: "
                "set data.loader.batch_size to one"
            )
        self.reader = BatchReader(dataset, transform, tokenizer, seed, replace_bad=on_bad == "replace")
        self.config = config
        self.seed = seed
        self.device = device
        self.fail = on_bad == "fail"
        self.batches = dataset.batches(seed, config.batch_size)
        self.steps_per_epoch = self.batches.steps_per_epoch
        self.step = 0
        self.num_read = 0
        self.num_bad = 0
        self.bad_paths: dict[str, str] = {}
        self.num_cut = 0
        self._read_seconds, self._read_samples = 0.0, 0
        self._batches: Iterator[Batch] | None = None

    @property
    def samples_per_second(self) -> float:
        """What the reading processes can give, measured: samples read, by the time that a worker took for one.

        Samples per second of all workers of this process together, as if none ever had to wait; NaN before the first.
        """
        if not self._read_samples:
            return math.nan
        return max(1, self.config.num_workers) * self._read_samples / self._read_seconds

    def __iter__(self) -> TrainLoader:
        return self

    def __next__(self) -> dict[str, torch.Tensor]:
        if self._batches is None:
            self._batches = iter(_data_loader(self.reader, self._keys(self.step), self.config))
        batch = next(self._batches)
        self.step += 1
        self._count(batch)
        return _finish(batch.tensors, self.reader, self.device)

    def _keys(self, step: int) -> Iterator[BatchKey]:
        """Keys of this process's part of the batches from `step` on, without end."""
        rank, processes = self.part
        rows = slice(*(number * self.config.batch_size // processes for number in (rank, rank + 1)))
        while True:
            key = self.batches.batch(step)
            yield BatchKey(key.indices[rows], key.epochs[rows])
            step += 1

    def _count(self, batch: Batch) -> None:
        if batch.error is not None:
            raise DataError(batch.error)
        if batch.bad and self.fail:
            raise BadSample(*batch.bad[0])
        self.num_read += batch.num_read
        self.num_bad += len(batch.bad)
        self.num_cut = _count_cut(batch, self.num_cut)
        self._read_seconds += batch.seconds
        self._read_samples += batch.num_read
        for path, reason in batch.bad:
            if path not in self.bad_paths:
                self.bad_paths[path] = reason
                logger.warning("bad sample replaced by another: %s: %s", printable(path), reason)
        whole = batch.tensors and len(batch.tensors["image"]) == self.config.batch_size // self.part[1]
        enough = self.num_read >= min(MIN_READ_FOR_SHARE, len(self.reader.dataset))
        if not whole or (enough and self.num_bad > self.config.max_bad_share * self.num_read):
            # A run that continues knows from before the stop how many were bad, but not which.
            last = next(reversed(batch.bad or list(self.bad_paths.items())), None)
            raise TooManyBadSamples(
                f"{self.num_bad} of {self.num_read} samples read are bad ({self.num_bad / self.num_read:.1%}), more "
                f"than max_bad_share {self.config.max_bad_share} allows"
                + (f"; the last is {printable(last[0])}: {last[1]}. " if last else ", all from before this start. ")
                + "Repair or remove the files that the log names, or raise max_bad_share"
            )

    def state_dict(self) -> dict[str, int]:
        """Position of the batches handed out so far, and what it is a position in; plain integers.

        It may be loaded by any number of processes. `num_read` and `num_bad` are this process's own.
        """
        return {
            "step": self.step,
            "num_read": self.num_read,
            "num_bad": self.num_bad,
            "seed": self.seed,
            "batch_size": self.config.batch_size,
            "num_samples": len(self.reader.dataset),
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continues exactly behind the batches that `state` counts.

        Raises:
            ValueError: the seed, the batch size or the data set's size is another, so there is no such position.
        """
        mine = self.state_dict()
        for name in ("seed", "batch_size", "num_samples"):
            if state[name] != mine[name]:
                raise ValueError(
                    f"the data position was saved with {name} {state[name]}, but it is now {mine[name]}: "
                    "continue with the old setting, or start a new run in another folder"
                )
        self.close()
        self.step = state["step"]
        # One process counts on for all, so that their sum stays right.
        self.num_read, self.num_bad = (state["num_read"], state["num_bad"]) if self.part[0] == 0 else (0, 0)

    def close(self) -> None:
        """Stops the worker processes; the next batch starts them again."""
        self._batches = None


class EvalLoader:
    """All samples once, in order; the last batch may be smaller. Made by `eval_loader`.

    Where torch.distributed runs, each process reads its share of the same batches: number rank, rank + world, ... Rows
    are told apart by "index". A bad sample raises BadSample, which names it, or with `on_bad="skip"` is left out and
    counted.

    Attributes:
        indices: places in the data set of the samples that are read, by all processes together.
        num_samples: how many they are.
        num_skipped: bad samples left out in the current or last pass.
        skipped_paths: their paths.
        num_cut: captions in that pass that are longer than the tokenizer's context.
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
            raise ValueError("on_bad must be fail or skip in evaluation, got replace: figures must be of the samples")
        self.reader = BatchReader(dataset, transform, tokenizer, seed=0, replace_bad=False)
        self.config = config
        self.device = device
        self.fail = on_bad == "fail"
        self.indices = range(len(dataset)) if indices is None else indices
        self.num_samples = len(self.indices)
        self.num_skipped = 0
        self.skipped_paths: list[str] = []
        self.num_cut = 0

    def __len__(self) -> int:
        """Number of this process's batches (one fewer for each whose samples are all skipped)."""
        return len(self._keys())

    def _keys(self) -> list[BatchKey]:
        size = self.config.batch_size
        starts = range(0, len(self.indices), size)
        rank, num_processes = world()
        batches = [tuple(self.indices[start : start + size]) for start in starts[rank::num_processes]]
        return [BatchKey(indices, (0,) * len(indices)) for indices in batches]

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        self.num_skipped, self.skipped_paths, self.num_cut = 0, [], 0
        for batch in _data_loader(self.reader, self._keys(), self.config):
            if batch.error is not None:
                raise DataError(batch.error)
            if batch.bad and self.fail:
                raise BadSample(*batch.bad[0])
            self.num_skipped += len(batch.bad)
            for path, reason in batch.bad:
                self.skipped_paths.append(path)
                logger.warning("bad sample skipped: %s: %s", printable(path), reason)
            self.num_cut = _count_cut(batch, self.num_cut)
            if batch.tensors:
                yield _finish(batch.tensors, self.reader, self.device)


def train_loader(
    dataset: ImageDataset,
    transform: Callable[[Image.Image], torch.Tensor],
    tokenizer: Tokenizer | None,
    loader: LoaderConfig,
    seed: int,
    device: torch.device | str | None = None,
    part: tuple[int, int] | None = None,
) -> TrainLoader:
    """Endless training batches.

    Args:
        dataset: see `build_dataset`.
        transform: see `build_transform`; any callable from PIL picture to (3, H, W) float tensor will do.
        tokenizer: list of captions to (B, L) long; None: no text in the batches.
        loader: batch size, workers, bad samples.
        seed: with epoch and index, all that order and augmentation depend on.
        device: where the batches go; pictures travel as bytes and are normalised there. None: they stay on the CPU.
        part: (r, W): hand out part r of W of each batch. None: this process's own where torch.distributed runs, else
            all.

    Returns:
        An iterator of {"image": (B, 3, H, W) float32, "index": (B,) long, "label": (B,) long where the data set has
        classes, "text": (B, L) long where there is a tokenizer}, where B is this process's part of `batch_size`.
        "index" is the position asked for, also where another sample took a bad one's place.

    Raises:
        ValueError: the batch is larger than the data set or no multiple of the number of processes, or text is asked
            for where there are no captions.
        TooManyBadSamples: while iterating, see LoaderConfig.max_bad_share.
        DataError: while iterating, a file of many samples is broken or has changed.
    """
    return TrainLoader(dataset, transform, tokenizer, loader, seed, device, part)


def eval_loader(
    dataset: ImageDataset,
    transform: Callable[[Image.Image], torch.Tensor],
    tokenizer: Tokenizer | None,
    loader: LoaderConfig,
    device: torch.device | str | None = None,
    indices: Sequence[int] | None = None,
) -> EvalLoader:
    """Batches for evaluation; arguments and batches as for `train_loader`.

    Args:
        indices: places in the data set of the samples to read, in this order; None: all.

    Raises:
        BadSample: while iterating, at the first bad sample, unless `loader.on_bad` is "skip".
    """
    return EvalLoader(dataset, transform, tokenizer, loader, device, indices)


def _data_loader(reader: BatchReader, keys: Any, config: LoaderConfig) -> Iterator[Batch]:
    """The batches of the keys, in their order, read by worker processes; says once if these are too many."""
    if world()[0] == 0 and config.num_workers > own_cores():
        _warn_of_workers(config.num_workers, own_cores())
    with warnings.catch_warnings():  # PyTorch says the same for each loader, twice
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        loader = DataLoader(
            reader,
            sampler=keys,
            batch_size=None,  # a key is a whole batch
            collate_fn=_as_it_is,
            num_workers=config.num_workers,
            pin_memory=config.pin_memory and torch.cuda.is_available(),
            worker_init_fn=_leave_signals_to_the_main_process,
            generator=torch.Generator(),  # else every start would draw a number from the global generator
        )
        return iter(loader)


def own_cores() -> int:
    """CPU cores for each of the job's processes on this machine, at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


@cache
def _warn_of_workers(num_workers: int, cores: int) -> None:
    logger.warning(
        "num_workers is %d, more than the CPU cores of this process (%d): reading may be slower than with %d",
        num_workers,
        cores,
        cores,
    )


def _leave_signals_to_the_main_process(_worker: int) -> None:
    """A terminal or a scheduler signals the whole group; a worker that dies of it takes the step in progress with it.

    So a worker outlives SIGTERM for long enough to let the main process finish its step, and then leaves quietly.
    """
    for name in ("SIGINT", "SIGUSR1"):
        if hasattr(signal, name):  # Windows has no SIGUSR1
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "SIGALRM"):  # not on Windows
        signal.signal(signal.SIGALRM, lambda *_: os._exit(0))
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE_SECONDS))


def _as_it_is(batch: Batch) -> Batch:
    return batch


def _count_cut(batch: Batch, num_cut: int) -> int:
    """The number of captions that were cut, with those of a batch; the first such batch is logged."""
    if batch.cut and not num_cut:
        num_captions = len(batch.tensors["text"])
        logger.warning("%s", cut_message(len(batch.cut), num_captions, "captions of a batch", batch.cut[0]))
    return num_cut + len(batch.cut)


def _finish(
    tensors: dict[str, torch.Tensor], reader: BatchReader, device: torch.device | str | None
) -> dict[str, torch.Tensor]:
    if device is not None:
        tensors = {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}
    if reader.normalize_later:
        tensors = {**tensors, "image": reader.transform.normalize(tensors["image"])}
    return tensors
