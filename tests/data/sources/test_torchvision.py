"""torchvision's data sets, from files in their own formats."""

import gzip
import hashlib
import pickle
import struct

import numpy as np
import pytest
import torchvision
from PIL import Image

from vmoe.data import SourceConfig, build_dataset
from vmoe.data.images import BadSample


def torchvision_dataset(name, path, split="train"):
    return build_dataset(SourceConfig("torchvision", str(path), split, name))


@pytest.fixture
def fashion_mnist(tmp_path):
    """Three images per split in the data set's own file format (idx)."""
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    pixels = np.arange(3 * 28 * 28, dtype=np.uint32).astype(np.uint8)
    for part in ("train", "t10k"):
        for name, header, body in [
            ("images-idx3", struct.pack(">4B3I", 0, 0, 8, 3, 3, 28, 28), pixels.tobytes()),
            ("labels-idx1", struct.pack(">4BI", 0, 0, 8, 1, 3), bytes([9, 0, 3])),
        ]:
            (raw / f"{part}-{name}-ubyte").write_bytes(header + body)
            with gzip.open(raw / f"{part}-{name}-ubyte.gz", "wb") as file:
                file.write(header + body)
    return tmp_path


@pytest.mark.parametrize("split", ["train", "test"])
def test_torchvision_from_disk(fashion_mnist, split):
    dataset = torchvision_dataset("FashionMNIST", fashion_mnist, split)
    assert len(dataset) == 3
    assert dataset[0].image.mode == "RGB"
    assert dataset.classes[dataset[0].label] == "Ankle boot"
    assert dataset.decoded


def test_torchvision_mistakes_are_explained(tmp_path, fashion_mnist):
    with pytest.raises(ValueError, match="must be a data set of torchvision .* got 'FasionMNIST'"):
        torchvision_dataset("FasionMNIST", tmp_path)
    with pytest.raises(ValueError, match="got 'LSUN'; save others as one folder per class"):
        torchvision_dataset("LSUN", tmp_path)
    with pytest.raises(ValueError, match="cannot be opened"):
        torchvision_dataset("MNIST", tmp_path / "gone")
    with pytest.raises(ValueError, match="train or test"):
        torchvision_dataset("FashionMNIST", fashion_mnist, "val")


def test_bad_images_and_labels_are_named(fashion_mnist, monkeypatch):
    dataset = torchvision_dataset("FashionMNIST", fashion_mnist)
    images = [(Image.new("F", (4, 4)), 0), (Image.new("RGB", (4, 4)), 9), (Image.new("RGB", (4, 4)), 10)]
    monkeypatch.setattr(dataset, "dataset", images)
    with pytest.raises(BadSample, match=r"FashionMNIST/train\[0\]"):
        dataset[0]
    assert dataset[1].label == 9
    with pytest.raises(ValueError, match=r"FashionMNIST/train\[2\]: label 10 is out of range, .* has 10 classes"):
        dataset[2]


def test_an_empty_set_is_refused(fashion_mnist, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.FashionMNIST.__len__", lambda _: 0)
    with pytest.raises(ValueError, match="FashionMNIST, split 'test', in .* is empty"):
        torchvision_dataset("FashionMNIST", fashion_mnist, "test")


class Trap:
    def __reduce__(self):
        return pytest.fail, ("a pickle was opened",)


def write_cifar(folder, harmful, monkeypatch=None):
    """CIFAR-10's files with one image each; with `monkeypatch` they have the checksums that torchvision expects."""
    folder.mkdir()
    dataset_class = torchvision.datasets.CIFAR10
    checksums = {}
    for number, (name, _) in enumerate([*dataset_class.train_list, *dataset_class.test_list, ("batches.meta", "")]):
        rows = np.repeat(np.array([200, 100, 0], np.uint8), 1024)[None]
        content = {"label_names": list("abcdefghij")} if name == "batches.meta" else {"data": rows, "labels": [number]}
        stored = pickle.dumps(Trap() if harmful else content)
        (folder / name).write_bytes(stored)
        checksums[name] = hashlib.md5(stored).hexdigest()
    if monkeypatch is not None:
        for part in ("train_list", "test_list"):
            names = [name for name, _ in getattr(dataset_class, part)]
            monkeypatch.setattr(dataset_class, part, [[name, checksums[name]] for name in names])
        monkeypatch.setattr(dataset_class, "meta", dataset_class.meta | {"md5": checksums["batches.meta"]})


def test_cifar(tmp_path, monkeypatch):
    write_cifar(tmp_path / "cifar-10-batches-py", harmful=False, monkeypatch=monkeypatch)
    for split, labels in (("train", [0, 1, 2, 3, 4]), ("test", [5])):
        dataset = build_dataset(SourceConfig("torchvision", str(tmp_path), split, "CIFAR10"))
        assert [dataset[index].label for index in range(len(dataset))] == labels
        assert dataset.classes == list("abcdefghij")
        assert dataset[0].image.size == (32, 32)
        assert dataset[0].image.getcolors() == [(1024, (200, 100, 0))]


def test_a_pickle_of_another_checksum_is_never_opened(tmp_path):
    write_cifar(tmp_path / "cifar-10-batches-py", harmful=True)
    with pytest.raises(ValueError, match=r"CIFAR10, split 'train', cannot be opened in .*not found or corrupted"):
        build_dataset(SourceConfig("torchvision", str(tmp_path), name="CIFAR10"))
