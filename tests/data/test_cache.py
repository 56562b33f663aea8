"""Decoded images in memory: the same batches as without, a bound, one copy for all workers."""

import pickle
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch
from PIL import Image

from vmoe.data import (
    AugmentationConfig,
    BadSample,
    LoaderConfig,
    SourceConfig,
    build_dataset,
    build_transform,
    cache_images,
    eval_loader,
    train_loader,
)
from vmoe.data.cache import BLOCK, SAMPLED
from vmoe.data.images import DataError
from vmoe.utils.config import ConfigError

from .conftest import PREPROCESS, Images, tokenize
from .test_loader import assert_same, take


class Sizes(Images):
    """Images of many sizes, with a bad one; counts how often they are read."""

    def __init__(self, size=50, bad=(7,), step=3):
        super().__init__(size, bad)
        self.step, self.reads = step, 0

    def __getitem__(self, index):
        self.reads += 1
        sample = super().__getitem__(index)
        pixels = np.random.default_rng(index).integers(0, 256, (5 + self.step * index % 11, 9, 3), dtype=np.uint8)
        return sample._replace(image=Image.fromarray(pixels))


def cached(dataset, num_workers=0, gigabytes=1.0):
    cache_images({"data.train": dataset}, 1e9 * gigabytes, num_workers)
    return dataset


def train(dataset, num_workers=0, seed=1):
    augmentation = AugmentationConfig(scale=(0.2, 1.0), hflip=0.5, color_jitter=0.4)
    config = LoaderConfig(batch_size=8, num_workers=num_workers, max_bad_share=1)
    return train_loader(dataset, build_transform(PREPROCESS, augmentation), tokenize, config, seed)


QUICK = PREPROCESS | {"input_size": (3, 5, 9)}


@pytest.mark.parametrize("augmentation", [None, AugmentationConfig(crop_padding=4, hflip=0.5)])
def test_images_of_the_inputs_size_skip_pillow_and_are_the_same(augmentation, monkeypatch):
    transform, config = build_transform(QUICK, augmentation), LoaderConfig(batch_size=10, num_workers=0)
    plain, memory = Sizes(40, (), step=0), cached(Sizes(40, (), step=0))
    wanted = take(train_loader(plain, transform, None, config, 3), 8)
    monkeypatch.setattr(transform, "geometry", None)
    assert_same(take(train_loader(memory, transform, None, config, 3), 8), wanted)


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_batches_are_the_same_in_training_and_evaluation(num_workers):
    plain, memory = Sizes(), cached(Sizes())
    loader, wanted = train(memory, num_workers), train(plain)
    assert_same(take(loader, 9), take(wanted, 9))  # into the second epoch
    assert loader.bad_paths == wanted.bad_paths == {"image 7": "made bad"}
    config = LoaderConfig(batch_size=8, num_workers=num_workers, on_bad="skip")
    both = [eval_loader(dataset, build_transform(PREPROCESS, None), tokenize, config) for dataset in (memory, plain)]
    assert_same(*map(list, both))
    assert both[0].skipped_paths == both[1].skipped_paths == ["image 7"]


def test_a_run_may_continue_with_or_without_the_cache():
    wanted = take(train(Sizes()), 9)
    first = train(cached(Sizes()))
    assert_same(take(first, 4), wanted[:4])
    for dataset in (Sizes(), cached(Sizes())):
        loader = train(dataset)
        loader.load_state_dict(first.state_dict())
        assert_same(take(loader, 5), wanted[4:])


def test_images_are_read_once():
    dataset = cached(Sizes(90))
    read = dataset.reads
    assert read == 90 + SAMPLED
    list(take(train(dataset), 30))
    assert dataset.reads == read


@pytest.mark.parametrize("num_workers", [0, 2])
def test_all_that_a_sample_has_is_kept(num_workers):
    size, bad = BLOCK * 32 + 1, {0, 40}
    plain, memory = Sizes(size, bad), cached(Sizes(size, bad), num_workers)
    for index in (1, BLOCK - 1, BLOCK, size - 1):
        image, *rest = memory.cache[index]
        wanted, *others = plain[index]
        assert (image.shape, image.tobytes()) == (np.asarray(wanted).shape, wanted.tobytes())
        assert rest == others
    with pytest.raises(BadSample, match="image 40: made bad"):
        memory.cache[40]


def test_images_that_do_not_fit_are_not_read():
    train_data, val_data = Images(1000), Images(10)
    with pytest.raises(
        ConfigError, match=r"data.cache_gb is 0.0001, and .* need about 0.01 GB \(data.train\) and 0.01"
    ):
        cache_images({"data.train": train_data, "data.val": val_data}, 1e5)
    assert train_data.cache is None
    assert cache_images({"data.train": train_data, "data.val": val_data}, 1010 * 360) == 1010 * 360
    with pytest.raises(ConfigError):
        cache_images({"data.train": train_data, "data.val": val_data}, 1010 * 360 - 1)


def test_memory_that_cannot_be_allocated_is_one_sentence():
    class Huge(Images):
        def __len__(self):
            return 10**16

        def __getitem__(self, index):
            return super().__getitem__(index % self.size)

    with pytest.raises(ConfigError) as caught:
        cache_images({"data.train": Huge(10)}, 1e30)
    said = str(caught.value)
    assert said.startswith("the decoded images need 3.6e+09 GB, which the system refuses to allocate: set data.cache")


def test_an_estimate_that_is_too_low_does_not_break_the_bound():
    class Growing(Images):
        def __getitem__(self, index):  # the sampled ones are small
            large = index not in np.linspace(0, self.size - 1, SAMPLED).round().astype(int)
            return super().__getitem__(index)._replace(image=Image.new("RGB", (20, 20) if large else (1, 1)))

    small, large = Growing(SAMPLED), Growing(640)
    assert cache_images({"data.train": small}, 3 * SAMPLED) == 3 * SAMPLED
    needed = 576 * 1200 + 64 * 3
    with pytest.raises(ConfigError, match=r"data.cache_gb is 0.0003, and the decoded images need about 0.01 GB"):
        cache_images({"data.train": large}, 3e5)
    assert large.cache is None
    small.cache = None
    with pytest.raises(ConfigError):
        cache_images({"data.val": small, "data.train": large}, 3e5)
    assert small.cache is None  # all are kept, or none
    assert cache_images({"data.train": large}, needed) == needed
    assert large.cache[1].image.shape == (20, 20, 3)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_data_that_cannot_be_read_are_one_sentence(num_workers):
    class Broken(Images):
        def __getitem__(self, index):
            if index == 1:
                raise DataError("shard 1: is damaged; write it again")
            return super().__getitem__(index)

    with pytest.raises(DataError) as caught:
        cached(Broken(2000), num_workers)
    assert str(caught.value) == "shard 1: is damaged; write it again"


def test_workers_share_the_memory():
    dataset = cached(Images(100))
    received = pickle.loads(ForkingPickler.dumps(dataset))  # as workers that are not forked get it
    assert dataset.cache._pixels.is_shared()
    dataset.cache._pixels.fill_(7)
    assert (received.cache[99].image == 7).all()


def test_real_files(tmp_path):
    for number in range(6):
        folder = tmp_path / f"class{number % 2}"
        folder.mkdir(exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (9 + number, 8, 4), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")  # with transparency
    (tmp_path / "class0" / "broken.jpg").write_bytes(b"\xff\xd8\xff none")
    source = SourceConfig("image_folder", str(tmp_path))
    plain, memory = build_dataset(source), cached(build_dataset(source))
    (broken,) = (index for index, name in enumerate(plain.names) if "broken" in name)
    for index in set(range(7)) - {broken}:
        assert memory.cache[index].image.tobytes() == plain[index].image.tobytes()
        assert memory.cache[index][1:] == plain[index][1:]
    with pytest.raises(BadSample, match="broken.jpg: unreadable image"):
        memory.cache[broken]
    assert memory.fingerprint() == plain.fingerprint()


def test_the_random_state_is_left_alone():
    torch.manual_seed(5)
    wanted = torch.rand(1)
    torch.manual_seed(5)
    cached(Images(2000), num_workers=2)
    assert torch.equal(torch.rand(1), wanted)
