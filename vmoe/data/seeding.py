"""Randomness that depends on named numbers only, and leaves the process's own random state as it was."""

import contextlib
import hashlib
import random
from collections.abc import Iterator

import numpy as np
import torch


def derive_seed(*numbers: int) -> int:
    """A 63-bit seed from integers: the same for the same numbers on every machine, unrelated for others."""
    digest = hashlib.blake2b(repr(tuple(map(int, numbers))).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_process(seed: int) -> None:
    """Seeds the three global generators that timm's and torchvision's transforms draw from (CPU only)."""
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would also walk over all devices: 100 times slower


@contextlib.contextmanager
def isolated_randomness() -> Iterator[None]:
    """Restores Python's, numpy's and torch's (CPU) random state at the end of the block."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
