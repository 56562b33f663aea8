"""Means, and differences between runs that share seeds and images."""

from __future__ import annotations

import base64
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

FEWEST_SEEDS = 3  # for a difference to be clear
EXACT_BELOW = 25  # images of which only one run is right


class Estimate(NamedTuple):
    """A mean over seeds, and its standard error, None with one seed."""

    mean: float
    error: float | None
    seeds: int

    @property
    def has_enough(self) -> bool:
        """Whether there are seeds enough to call a difference clear or not."""
        return self.seeds >= FEWEST_SEEDS

    @property
    def is_clear(self) -> bool:
        """Whether it is more than two standard errors from 0, which two seeds cannot tell."""
        return self.has_enough and abs(self.mean) > 2 * self.error


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of values, one for each seed, and their standard deviation (n - 1) divided by the root of n."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return Estimate(statistics.fmean(values), error, len(values))


def difference(own: Mapping[int, float], base: Mapping[int, float]) -> Estimate | None:
    """Of {seed: value} of two runs, paired by seed; None if they share no seed."""
    shared = sorted(own.keys() & base.keys())
    return estimate([own[seed] - base[seed] for seed in shared]) if shared else None


def unpacked(correct: str) -> np.ndarray:
    """One integer for each image, 1 if it was right; the last bits may be padding, which is always 0."""
    return np.unpackbits(np.frombuffer(base64.b64decode(correct), dtype=np.uint8)).astype(np.int64)


def image_test(own: Mapping[int, str], base: Mapping[int, str]) -> float | None:
    """Probability that two runs which are equally good differ so much by the choice of the images, two-sided.

    With one seed it is McNemar's test (1947, without correction): of n images that only one of the two gets right, the
    difference has the variance n; below 25 of them it is exact, by the binomial distribution. With several, an image
    counts with its sum over the seeds, since the same images are in all: z = sum(d) / sqrt(sum(d²)), d the difference
    of an image. None if no seed is shared or no image differs. ValueError: a run has other images.
    """
    shared = sorted(own.keys() & base.keys())
    pairs = [(unpacked(own[seed]), unpacked(base[seed])) for seed in shared]
    if len({len(right) for pair in pairs for right in pair}) > 1:
        raise ValueError("the numbers of images differ")
    differences = sum(first - second for first, second in pairs)
    if not shared or not np.any(differences):
        return None
    if len(shared) == 1 and (n := np.count_nonzero(differences)) < EXACT_BELOW:
        fewer = min(np.count_nonzero(differences > 0), np.count_nonzero(differences < 0))
        return min(1.0, 2 * sum(math.comb(n, k) for k in range(fewer + 1)) / 2**n)
    z = differences.sum() / math.sqrt((differences**2).sum())
    return math.erfc(abs(z) / math.sqrt(2))
