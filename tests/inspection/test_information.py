"""How much experts tell about classes, and what of it is chance."""

import math

import numpy as np
import pytest

from vmoe.inspection.information import class_information

PATCHES = 50


def counts(expert_N, num_experts=4):
    """All patches of an image go to one expert."""
    return PATCHES * np.eye(num_experts)[expert_N]


def test_an_expert_of_each_class():
    label = np.arange(200) % 4
    found = class_information(counts(label), label, 4)
    assert found["nats"] == pytest.approx(math.log(4))
    assert 0 < found["shuffled_mean"] < 0.1
    assert found["shuffles"] == 20


def test_chance_is_told_from_specialisation():
    """Patches of an image are no independent samples: the noise level is that of 200 images, not of 10,000 patches."""
    generator = np.random.default_rng(1)
    label, expert = generator.integers(0, 4, 200), generator.integers(0, 4, 200)
    found = class_information(counts(expert), label, 4)
    assert abs(found["nats"] - found["shuffled_mean"]) < 3 * found["shuffled_std"]
    assert found["shuffled_mean"] == pytest.approx(
        9 / (2 * 200), rel=0.3
    )  # the bias of 200 samples, (E - 1)(C - 1) / 2N
    half = np.where(generator.random(200) < 0.5, label, expert)
    found = class_information(counts(half), label, 4)
    assert found["nats"] > found["shuffled_mean"] + 10 * found["shuffled_std"]


def test_it_is_the_same_each_time():
    label = np.arange(30) % 3
    count = np.random.default_rng(0).random((30, 4))
    assert class_information(count, label, 3) == class_information(count, label, 3)
