"""CIFAR's binary version; the expected layout is that of the data set's own page."""

import pickle

import numpy as np
import pytest

from vmoe.data import SourceConfig, build_dataset


def write(folder, files, label_bytes, names_file, names):
    folder.mkdir()
    (folder / names_file).write_text("\n".join(names) + "\n\n")
    for number, file in enumerate(files):
        rows = [[7] * (label_bytes - 1) + [number, *[200] * 1024, *[100] * 1024, *[0] * 1024]]
        (folder / file).write_bytes(bytes(np.array(rows, np.uint8)))


@pytest.mark.parametrize("name", ["CIFAR10", "CIFAR100"])
def test_pictures_labels_and_names(tmp_path, name):
    if name == "CIFAR10":
        files = [f"data_batch_{number}.bin" for number in (1, 2, 3, 4, 5)] + ["test_batch.bin"]
        write(tmp_path / "cifar-10-batches-bin", files, 1, "batches.meta.txt", "abcdefghij")
        expected = {"train": [0, 1, 2, 3, 4], "test": [5]}
    else:
        write(tmp_path / "cifar-100-binary", ["train.bin", "test.bin"], 2, "fine_label_names.txt", "abcdefghij")
        expected = {"train": [0], "test": [1]}
    for split, labels in expected.items():
        dataset = build_dataset(SourceConfig("torchvision", str(tmp_path), split, name))
        assert dataset.labels == labels == [dataset[index].label for index in range(len(dataset))]
        assert dataset.classes == list("abcdefghij")
        assert dataset[0].image.size == (32, 32)
        assert set(dataset[0].image.getdata()) == {(200, 100, 0)}


class Trap:
    def __reduce__(self):
        return pytest.fail, ("a pickle was opened",)


def test_the_pickled_version_is_never_opened(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in ("data_batch_1", "batches.meta"):
        (folder / name).write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ValueError, match=r"consists of pickles.* unpack cifar-10-binary\.tar\.gz"):
        build_dataset(SourceConfig("torchvision", str(tmp_path), name="CIFAR10"))


def test_damaged_files_are_named(tmp_path):
    write(tmp_path / "cifar-100-binary", ["train.bin", "test.bin"], 2, "fine_label_names.txt", "a")
    source = SourceConfig("torchvision", str(tmp_path), name="CIFAR100")
    assert len(build_dataset(source)) == 1
    with pytest.raises(ValueError, match="has label 1, and fine_label_names.txt names 1 classes"):
        build_dataset(SourceConfig("torchvision", str(tmp_path), "test", "CIFAR100"))
    with open(tmp_path / "cifar-100-binary" / "train.bin", "ab") as file:
        file.write(b"x")
    with pytest.raises(ValueError, match="train.bin: has 3075 bytes, no multiple of 3074"):
        build_dataset(source)
    with pytest.raises(ValueError, match="split of CIFAR100 must be train or test"):
        build_dataset(SourceConfig("torchvision", str(tmp_path), "val", "CIFAR100"))
