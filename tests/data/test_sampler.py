"""Orders of samples: every sample once an epoch, mixtures by weight, and nothing that depends on where one starts."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmoe.data.sampler import EpochBatches, MixedBatches, ShuffledSamples, ShuffledShards

sizes = st.lists(st.integers(1, 12), min_size=1, max_size=5)


@settings(max_examples=12)
@given(sizes, st.integers(1, 5), st.integers(1, 20), st.integers(0, 3), st.integers(0, 99))
def test_an_epoch_of_shards_has_each_sample_once(sizes, streams, window, epoch, seed):
    if streams > sum(sizes):
        with pytest.raises(ValueError, match=f"streams must be at most the .* {sum(sizes)}, got {streams}"):
            ShuffledShards(seed, sizes, streams, window)
        return
    shuffle = ShuffledShards(seed, sizes, streams, window)
    assert sum(sizes) - streams < shuffle.size <= sum(sizes)
    indices = shuffle.indices(epoch, 0, shuffle.size)
    assert len(set(indices.tolist())) == shuffle.size
    assert set(indices.tolist()) <= set(range(sum(sizes)))


@settings(max_examples=12)
@given(sizes, st.integers(1, 4), st.integers(1, 3), st.integers(1, 20), st.data())
def test_any_batch_is_the_same_without_those_before_it(sizes, streams, rows, window, data):
    batch_size = streams * rows
    if sum(sizes) < batch_size:
        return
    batches = EpochBatches(ShuffledShards(7, sizes, streams, window), batch_size)
    assert batches.steps_per_epoch == sum(sizes) // batch_size
    step = data.draw(st.integers(0, 3 * batches.steps_per_epoch))
    for number in range(step):
        batches.batch(number)
    fresh = EpochBatches(ShuffledShards(7, sizes, streams, window), batch_size)
    assert fresh.batch(step) == batches.batch(step)


def test_shards_are_read_nearly_one_after_the_other():
    sizes, window = [10] * 100, 20
    order = ShuffledShards(0, sizes, 1, window).indices(0, 0, 1000)
    assert not np.array_equal(order, np.sort(order))
    for start in range(0, 1000, window):  # two whole shards at a time, which are no neighbours and are mixed
        shards = order[start : start + window] // 10
        assert len(set(shards.tolist())) == 2
        assert len(set(shards[:10].tolist())) == 2 or len(set(shards[10:].tolist())) == 2
    assert len({tuple(ShuffledShards(0, sizes, 1, window).indices(epoch, 0, 20)) for epoch in range(5)}) == 5


def test_streams_give_each_process_shards_of_its_own():
    batches = EpochBatches(ShuffledShards(0, [10] * 80, 4, 25), 8)
    shards_of = [Counter(), Counter(), Counter(), Counter()]
    for step in range(batches.steps_per_epoch):
        indices = batches.batch(step).indices
        for rank in range(4):
            shards_of[rank].update(index // 10 for index in indices[2 * rank : 2 * rank + 2])
    assert [len(shards) for shards in shards_of] == [20, 20, 20, 20]
    assert set(sum(shards_of, Counter()).values()) == {10}


def test_forty_thousand_shards_need_little_memory_and_time():
    shuffle = ShuffledShards(0, [10_000] * 40_000, 8, 100_000)
    batches = EpochBatches(shuffle, 4096)
    assert len(set(batches.batch(50_000).indices)) == 4096
    held = sum(order.nbytes for _, order in shuffle._windows.values()) + sum(one.nbytes for one in shuffle._row[1:])
    assert held < 8 * 2**20


@settings(max_examples=12)
@given(
    st.lists(st.tuples(st.integers(1, 20), st.floats(0.1, 5)), min_size=2, max_size=5), st.integers(1, 16), st.data()
)
def test_a_mixture_keeps_its_weights_and_goes_through_each_source_in_epochs(sources, batch_size, data):
    sizes, weights = zip(*sources)
    starts = np.cumsum(sizes) - sizes

    def mixture():
        return MixedBatches([ShuffledSamples(n, size) for n, size in enumerate(sizes)], starts, weights, batch_size)

    batches, steps = mixture(), 30
    drawn = [batches.batch(step) for step in range(steps)]
    assert {len(key.indices) for key in drawn} == {batch_size}
    pairs = [(index, epoch) for key in drawn for index, epoch in zip(key.indices, key.epochs)]
    assert len(set(pairs)) == len(pairs) == steps * batch_size  # no sample twice in an epoch of its source
    for start, size, weight in zip(starts, sizes, weights):
        own = [(index, epoch) for index, epoch in pairs if start <= index < start + size]
        assert abs(len(own) - len(pairs) * weight / sum(weights)) < len(sizes)
        counts = Counter(epoch for _, epoch in own)
        assert all(counts[epoch] == size for epoch in range(len(own) // size))  # nothing left out
    step = data.draw(st.integers(0, steps - 1))
    assert mixture().batch(step) == drawn[step]


def test_every_part_of_a_mixed_batch_is_mixed():
    batches = MixedBatches([ShuffledSamples(0, 900), ShuffledSamples(1, 300)], [0, 900], [3.0, 1.0], 64)
    indices = np.array(batches.batch(5).indices).reshape(4, 16)
    assert (indices < 900).sum(1).tolist() == [12, 12, 12, 12]


def test_seeds_differ():
    first, second = (ShuffledShards(seed, [50, 50], 1, 100).indices(0, 0, 100) for seed in (1, 2))
    assert not np.array_equal(first, second)
