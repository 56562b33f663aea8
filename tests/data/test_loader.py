import gc
import logging
import multiprocessing
import os
import random
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vmoe.data import (
    AugmentationConfig,
    BadSample,
    LoaderConfig,
    TooManyBadSamples,
    build_transform,
    eval_loader,
    train_loader,
)
from vmoe.data.texts import warn_once
from vmoe.data.workers import own_cores

from .conftest import PREPROCESS, Images, tokenize

RANDOM = AugmentationConfig(scale=(0.2, 1.0), hflip=0.5, color_jitter=0.4)
ERASING = AugmentationConfig(auto_augment="rand-m9-mstd0.5", re_prob=0.5)


def train(size=20, bad=(), seed=1, augmentation=RANDOM, tokenizer=tokenize, part=None, **config):
    config = LoaderConfig(**{"batch_size": 4, "num_workers": 0} | config)
    transform = build_transform(PREPROCESS, augmentation)
    return train_loader(Images(size, bad), transform, tokenizer, config, seed, part=part)


def evaluate(size=10, bad=(), **config):
    config = {"batch_size": 4, "num_workers": 0} | config
    return eval_loader(Images(size, bad), build_transform(PREPROCESS, None), tokenize, LoaderConfig(**config))


def take(loader, count):
    return [next(loader) for _ in range(count)]


def assert_same(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others):
        assert batch.keys() == other.keys()
        for name in batch:
            assert torch.equal(batch[name], other[name]), name


def test_a_batch_holds_what_it_says():
    batch = next(train())
    assert batch["image"].shape == (4, 3, 8, 8)
    assert batch["image"].dtype == torch.float32
    assert torch.equal(batch["label"], batch["index"] % 2)
    assert torch.equal(batch["text"][:, 3], batch["index"])
    assert "text" not in next(train(tokenizer=None))


@settings(max_examples=6)
@given(st.integers(1, 30), st.integers(1, 10), st.integers(0, 1000))
def test_an_epoch_visits_samples_once_and_the_next_in_another_order(size, batch_size, seed):
    batch_size = min(batch_size, size)
    loader = train(size, seed=seed, batch_size=batch_size, tokenizer=None)
    assert loader.steps_per_epoch == size // batch_size
    epochs = [torch.cat([batch["index"] for batch in take(loader, loader.steps_per_epoch)]) for _ in range(2)]
    for visited in epochs:
        assert len(set(visited.tolist())) == len(visited) == loader.steps_per_epoch * batch_size
    if size > 10:
        assert not torch.equal(*epochs)


@settings(max_examples=6)
@given(st.integers(0, 17), st.sets(st.integers(0, 19), max_size=3))
def test_a_stopped_run_continues_with_the_same_batches(stop, bad):
    arguments = {"bad": bad, "max_bad_share": 1.0}
    whole = train(**arguments)
    batches = take(whole, 20)
    first = train(**arguments)
    take(first, stop)
    state = first.state_dict()
    assert all(type(value) is int for value in state.values())
    second = train(**arguments)
    second.load_state_dict(state)
    random.seed(0)  # the process's own randomness plays no part
    assert_same(take(second, 20 - stop), batches[stop:])
    assert second.state_dict() == whole.state_dict()


@settings(max_examples=6)
@given(st.data())
def test_processes_share_each_batch_and_a_position_fits_any_number_of_them(data):
    batch_size, size = 12, data.draw(st.integers(12, 60))
    stop, seed = data.draw(st.integers(0, 8)), data.draw(st.integers(0, 99))
    before, after = data.draw(st.sampled_from([1, 2, 3, 4, 6, 12])), data.draw(st.sampled_from([1, 2, 3, 4, 6, 12]))

    def loaders(processes):
        return [train(size, seed=seed, batch_size=batch_size, part=(rank, processes)) for rank in range(processes)]

    def joined(parts):
        batches = [[next(part) for part in parts] for _ in range(3)]
        assert {len(part["index"]) for batch in batches for part in batch} == {batch_size // len(parts)}
        return [{name: torch.cat([part[name] for part in batch]) for name in batch[0]} for batch in batches]

    [whole], first, second = loaders(1), loaders(before), loaders(after)
    for loader in [whole, *first]:
        loader.load_state_dict(whole.state_dict() | {"step": stop})
    assert_same(joined(first), take(whole, 3))
    for loader in second:  # all continue from the state that the first process saved
        loader.load_state_dict(first[0].state_dict())
    assert_same(joined(second), take(whole, 3))


@pytest.mark.parametrize("augmentation", [RANDOM, ERASING])
def test_the_number_of_workers_changes_nothing(augmentation):
    results = []
    for workers in (0, 1, 2):
        loader = train(bad=[3], max_bad_share=1.0, num_workers=workers, augmentation=augmentation)
        results.append((take(loader, 7), loader.state_dict(), loader.bad_paths))
        loader.close()
    for batches, state, bad_paths in results[1:]:
        assert_same(batches, results[0][0])
        assert (state, bad_paths) == results[0][1:]  # what workers read ahead is not counted


@pytest.mark.parametrize(
    ("bad", "last"), [((), ", all from before this start"), (range(20), "; the last is image [0-9]+: made bad")]
)
def test_too_many_bad_samples_before_a_stop(bad, last):
    """A continued run knows the number of bad samples from before, but not their paths."""
    loader = train(bad=bad)
    loader.load_state_dict(loader.state_dict() | {"num_read": 2000, "num_bad": 500})
    with pytest.raises(TooManyBadSamples, match=rf"max_bad_share 0.01 allows{last}\. Repair or remove"):
        next(loader)


def test_loading_a_position_in_the_middle_drops_what_was_read_ahead():
    loader = train(num_workers=2)
    take(loader, 2)
    state = loader.state_dict()
    batches = take(loader, 3)
    loader.load_state_dict(state)
    assert_same(take(loader, 3), batches)
    loader.close()


def test_a_dropped_loader_stops_its_workers_at_once():
    """Not in a later garbage collection, where PyTorch waits ten seconds for each."""
    before = set(multiprocessing.active_children())
    loader = train(num_workers=1)
    next(loader)
    (worker,) = set(multiprocessing.active_children()) - before
    gc.disable()
    try:
        del loader
        assert not worker.is_alive()
    finally:
        gc.enable()


def test_seeds_and_epochs_differ():
    assert not torch.equal(next(train(seed=1))["image"], next(train(seed=2))["image"])
    loader = train(size=4)  # one batch an epoch: the same images, augmented again
    first, second = (dict(zip(batch["index"].tolist(), batch["image"])) for batch in take(loader, 2))
    assert all(not torch.equal(first[index], second[index]) for index in first)


def test_reading_leaves_the_processs_randomness_alone():
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    expected = random.random(), np.random.rand(), torch.rand(())
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    take(train(augmentation=ERASING), 3)
    list(evaluate())
    assert (random.random(), np.random.rand(), torch.rand(())) == expected


def test_any_callable_will_do_as_transform():
    def to_tensor(image):
        return torch.from_numpy(np.array(image.resize((5, 6)))).float()

    loader = train_loader(Images(8), to_tensor, None, LoaderConfig(batch_size=4, num_workers=0), seed=0)
    assert next(loader)["image"].shape == (4, 6, 5, 3)


def test_a_device_is_where_the_batches_are():
    config = LoaderConfig(batch_size=4, num_workers=0)
    transform = build_transform(PREPROCESS, None)
    loader = train_loader(Images(8), transform, tokenize, config, seed=0, device="meta")
    assert {tensor.device.type for tensor in next(loader).values()} == {"meta"}


def test_bad_samples_are_replaced_counted_and_logged_once(caplog):
    caplog.set_level(logging.WARNING, "vmoe.data")
    loader = train(bad=[3, 11], max_bad_share=0.5)
    batches = take(loader, 2 * loader.steps_per_epoch)
    shown = torch.cat([batch["text"][:, 3] for batch in batches]).tolist()
    assert len(shown) == 40
    assert not {3, 11} & set(shown)
    assert set(loader.bad_paths) == {"image 3", "image 11"}
    assert loader.num_bad >= 4
    assert loader.num_read == 40 + loader.num_bad
    assert sorted(record.getMessage() for record in caplog.records) == [
        f"bad sample replaced by another: image {number}: made bad" for number in (11, 3)
    ]
    assert_same(take(train(bad=[3, 11], max_bad_share=0.5), 10), batches)


def test_too_many_bad_samples_stop_the_run():
    with pytest.raises(TooManyBadSamples, match=r"max_bad_share 0\.1 allows; the last is image \d+: made bad"):
        take(train(bad=range(6), max_bad_share=0.1), 50)
    with pytest.raises(TooManyBadSamples, match="400 of 404 samples"):
        next(train(bad=range(20), max_bad_share=1.0))
    take(train(size=100, bad=[5], max_bad_share=0.02), 50)  # 1 %: goes on


@pytest.mark.parametrize("workers", [0, 1])
def test_fail_names_the_sample(workers):
    with pytest.raises(BadSample, match="image 3: made bad"):
        take(train(bad=[3], on_bad="fail", num_workers=workers), 5)
    with pytest.raises(BadSample, match="image 3: made bad"):
        list(evaluate(bad=[3], num_workers=workers))


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_is_in_order_and_complete(workers):
    loader = evaluate(num_workers=workers)
    batches = list(loader)
    assert len(batches) == len(loader) == 3
    assert torch.cat([batch["index"] for batch in batches]).tolist() == list(range(10))
    assert batches[-1]["image"].shape == (2, 3, 8, 8)
    assert_same(list(loader), batches)
    assert loader.num_skipped == 0


def test_evaluation_skips_when_told_and_says_so():
    loader = evaluate(bad=[1, 4, 5, 6, 7], on_bad="skip")
    for _ in range(2):  # a second pass counts again
        batches = list(loader)
        assert torch.cat([batch["index"] for batch in batches]).tolist() == [0, 2, 3, 8, 9]
        assert len(batches) == 2
        assert loader.num_skipped == 5
        assert loader.skipped_paths[0] == "image 1"


def test_settings_that_cannot_be_met_are_explained():
    with pytest.raises(ValueError, match="batch_size 30 is more than the data set's 20 samples"):
        train(batch_size=30)
    with pytest.raises(ValueError, match="batch_size 4 is no multiple of the 3 processes"):
        train(part=(0, 3))
    with pytest.raises(ValueError, match="on_bad must be replace or fail"):
        train(on_bad="skip")
    with pytest.raises(ValueError, match="on_bad must be fail or skip"):
        evaluate(on_bad="replace")
    loader = train()
    for name in ("seed", "batch_size", "num_samples"):
        with pytest.raises(ValueError, match=f"saved with {name} "):
            loader.load_state_dict(loader.state_dict() | {name: 999})


def test_text_needs_captions():
    images = Images(8)
    images.has_captions = False
    with pytest.raises(ValueError, match="no captions"):
        train_loader(images, build_transform(PREPROCESS, None), tokenize, LoaderConfig(batch_size=4), seed=0)


def test_too_many_workers_are_told_once(caplog, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    warn_once.cache_clear()
    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always")
        for loader in (train(num_workers=2), evaluate(num_workers=2), train(num_workers=2, seed=2)):
            next(iter(loader))
        next(train(num_workers=1))
    assert [str(each.message) for each in raised if "worker" in str(each.message)] == []
    (message,) = caplog.messages
    assert message.startswith("num_workers is 2, more than the CPU cores of this process (1)")


@pytest.mark.parametrize(("cores", "processes", "expected"), [(8, None, 8), (8, "2", 4), (2, "8", 1)])
def test_the_processes_of_a_job_share_the_cores(cores, processes, expected, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if processes:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    assert own_cores() == expected
