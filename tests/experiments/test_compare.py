"""Means and errors against NumPy; the test over images against McNemar's."""

from __future__ import annotations

import base64

import numpy as np
import pytest

from experiments.compare import difference, estimate, image_test, unpacked
from experiments.worker import packed_correct


def packed(right):
    return base64.b64encode(np.packbits(np.asarray(right, dtype=bool)).tobytes()).decode()


def test_the_standard_error_is_that_of_a_mean():
    values = [0.71, 0.74, 0.69]
    assert estimate(values).mean == pytest.approx(np.mean(values))
    assert estimate(values).error == pytest.approx(np.std(values, ddof=1) / 3**0.5)
    assert estimate([0.5]) == (0.5, None, 1)


def test_a_difference_is_paired_by_seed():
    found = difference({0: 0.5, 1: 0.7, 3: 0.2, 5: 9.0}, {0: 0.4, 1: 0.6, 2: 0.0, 3: 0.1})
    assert (found.mean, found.error, found.seeds) == (pytest.approx(0.1), pytest.approx(0, abs=1e-12), 3)
    assert found.is_clear
    assert not estimate([0.1]).is_clear
    assert not estimate([0.1, 0.1]).is_clear  # two seeds are too few
    assert not estimate([-1.0, 1.1, 0.1]).is_clear
    assert difference({0: 1.0}, {1: 1.0}) is None


def test_with_one_seed_it_is_mcnemars_test():
    special = pytest.importorskip("scipy.special", reason="needs SciPy")
    own, base = np.zeros(100), np.zeros(100)
    own[:40], base[30:42] = 1, 1  # 30 images that only the first gets right, 2 that only the second does
    expected = special.chdtrc(1, (30 - 2) ** 2 / 32)  # the tail of chi-squared
    assert image_test({0: packed(own)}, {0: packed(base)}) == pytest.approx(expected)
    assert image_test({0: packed(base)}, {0: packed(own)}) == pytest.approx(expected)
    assert image_test({0: packed(own)}, {0: packed(own)}) is None


def test_few_images_are_counted_exactly():
    stats = pytest.importorskip("scipy.stats", reason="needs SciPy")
    for first, second in ((5, 0), (7, 2), (3, 3), (1, 0)):
        own, base = np.zeros(40), np.zeros(40)
        own[:first], base[first : first + second] = 1, 1
        expected = stats.binomtest(first, first + second).pvalue
        assert image_test({0: packed(own)}, {0: packed(base)}) == pytest.approx(expected)


def test_other_numbers_of_images_are_one_sentence():
    with pytest.raises(ValueError, match="the numbers of images differ"):
        image_test({0: packed([1] * 16)}, {0: packed([1] * 8)})


def test_seeds_that_repeat_the_same_images_are_no_further_evidence():
    rng = np.random.default_rng(0)
    own, base = rng.random((2, 999)) < [[0.7], [0.65]]
    once = image_test({0: packed(own)}, {0: packed(base)})
    thrice = image_test(dict.fromkeys(range(3), packed(own)), dict.fromkeys(range(3), packed(base)))
    assert thrice == pytest.approx(once)
    assert unpacked(packed(own))[:999].tolist() == own.astype(int).tolist()


def test_the_right_images_are_a_bit_each_in_the_order_of_the_data(tmp_path):
    table = tmp_path / "samples.csv"
    table.write_text(
        "index,sample,label,predicted,top1\n9,c.png,1,1,1\n0,a.png,0,1,0\n1,b.png,1,1,1\n", encoding="utf-8"
    )
    assert unpacked(packed_correct(table)).nonzero()[0].tolist() == [1, 9]  # the others were skipped
