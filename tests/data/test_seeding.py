import random

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vmoe.data.seeding import derive_seed, isolated_randomness, seed_process


def draw():
    return random.random(), np.random.rand(), torch.rand(()).item()


@settings(max_examples=20)
@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=4))
def test_the_same_numbers_give_the_same_draws_and_disturb_nothing(numbers):
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    draws = []
    for _ in range(2):
        with isolated_randomness():
            seed_process(derive_seed(*numbers))
            draws.append(draw())
    assert draws[0] == draws[1]
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())


def test_seeds_differ_and_stay_what_they_are():
    seeds = {derive_seed(seed, epoch, index) for seed in range(5) for epoch in range(5) for index in range(50)}
    assert len(seeds) == 5 * 5 * 50
    assert derive_seed(1, 2, 3) == 2904650318439132554  # a run continued with a later version sees the same order
