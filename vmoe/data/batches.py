"""Reads the samples of one batch; the part of a loader that runs in its worker processes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from vmoe.data.dataset import ImageDataset, Sample
from vmoe.data.images import BadSample, DataError
from vmoe.data.sampler import BatchKey
from vmoe.data.seeding import derive_seed, isolated_randomness, seed_process
from vmoe.data.texts import Tokenizer, cut_rows
from vmoe.data.transforms import Transform

# With a bad share of 0.9 all of these fail once in 37,000 samples; a data set worse than that is no data set.
MAX_REPLACEMENTS = 100
MAX_CACHED_CAPTIONS = 100_000


class Batch(NamedTuple):
    """What a worker hands over.

    Attributes:
        tensors: "image" (float32, or uint8 (B, H, W, 3) before `Transform.normalize`), "index", "label", "text".
        bad: (path, reason) of every bad sample met.
        num_read: samples read, the bad ones and their replacements included.
        seconds: that reading and augmenting them took.
        cut: the captions that are longer than the tokenizer's context.
        error: why the data set cannot be read on, or None. (An exception would reach the main process as a traceback.)
    """

    tensors: dict[str, torch.Tensor]
    bad: list[tuple[str, str]]
    num_read: int
    seconds: float = 0.0
    cut: tuple[str, ...] = ()
    error: str | None = None


class BatchReader(Dataset):
    """Maps a BatchKey to its Batch; a pure function of key and seed, in whichever process it runs.

    Args:
        dataset: the samples.
        transform: picture to float tensor; a vmoe Transform is taken apart, so that it runs on bytes up to the end.
        tokenizer: list of captions to (B, L) long; None: no "text" in the batches.
        seed: of augmentation and replacements.
        replace_bad: whether another sample takes a bad one's place; else it is left out.

    Raises:
        ValueError: a tokenizer is given, but the data set has no captions.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        transform: Callable[[Image.Image], torch.Tensor],
        tokenizer: Tokenizer | None,
        seed: int,
        replace_bad: bool,
    ) -> None:
        if tokenizer is not None and not dataset.has_captions:
            raise ValueError(
                f"{type(dataset).__name__} has no captions: training on text needs a data source with captions, "
                "such as pairs or shards"
            )
        self.dataset = dataset
        self.transform = transform
        self.tokenizer = tokenizer
        self.seed = seed
        self.replace_bad = replace_bad
        self.normalize_later = isinstance(transform, Transform) and transform.erase is None
        self._tokens: dict[str, tuple[torch.Tensor, bool]] = {}

    def __getitem__(self, key: BatchKey) -> Batch:
        started = time.perf_counter()
        samples, bad = [], []
        try:
            with isolated_randomness():
                for index, epoch in zip(key.indices, key.epochs, strict=True):
                    sample = self._read(epoch, index, bad)
                    if sample is not None:
                        samples.append((index, *sample))
        except DataError as error:
            return Batch({}, bad, 0, error=str(error))
        num_read = len(key.indices) + (len(bad) if self.replace_bad else 0)
        tensors, cut = self._stack(samples) if samples else ({}, ())
        return Batch(tensors, bad, num_read, time.perf_counter() - started, cut)

    def _stack(
        self, samples: list[tuple[int, np.ndarray | torch.Tensor, int | None, str | None]]
    ) -> tuple[dict[str, torch.Tensor], tuple[str, ...]]:
        """(tensors of the batch, the captions that were cut)."""
        indices, images, labels, captions = zip(*samples)
        image = torch.from_numpy(np.stack(images)) if self.normalize_later else torch.stack(images)
        tensors = {"image": image, "index": torch.tensor(indices)}
        if self.dataset.classes is not None:
            tensors["label"] = torch.tensor(labels)
        if self.tokenizer is None:
            return tensors, ()
        tokens, is_cut = zip(*(self._tokenize(caption) for caption in captions))
        tensors["text"] = torch.stack(tokens)
        return tensors, tuple(caption for caption, cut in zip(captions, is_cut) if cut)

    def _read(
        self, epoch: int, index: int, bad: list[tuple[str, str]]
    ) -> tuple[np.ndarray | torch.Tensor, int | None, str | None] | None:
        """(image, label, caption) of a sample or its replacement; None where it is left out."""
        candidate = index
        for attempt in range(1, MAX_REPLACEMENTS + 1):
            try:
                sample = self.dataset[candidate]
            except BadSample as error:
                bad.append((error.path, error.reason))
            else:
                seed_process(derive_seed(self.seed, epoch, index))
                return self._image(sample), sample.label, sample.caption
            if not self.replace_bad:
                return None
            candidate = derive_seed(self.seed, epoch, index, attempt) % len(self.dataset)
        return None

    def _image(self, sample: Sample) -> np.ndarray | torch.Tensor:
        if self.normalize_later:
            return np.asarray(self.transform.geometry(sample.image))  # (H, W, 3) uint8; copied once, into the batch
        return self.transform(sample.image)

    def _tokenize(self, caption: str) -> tuple[torch.Tensor, bool]:
        """((L,) long, whether it is cut); kept, since tokenizing takes longer than drawing the picture's crop."""
        found = self._tokens.get(caption)
        if found is None:
            tokens_1L = self.tokenizer([caption])
            found = tokens_1L[0], bool(cut_rows(self.tokenizer, [caption], tokens_1L))
            if len(self._tokens) < MAX_CACHED_CAPTIONS:
                self._tokens[caption] = found
        return found
