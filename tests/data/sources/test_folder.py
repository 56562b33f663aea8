import gzip
import json
import struct

import numpy as np
import pytest
from PIL import Image

from vmoe.data.images import BadSample
from vmoe.data.sources.folder import ImageFolder, TorchvisionDataset, warn_of_text_order


def make_tree(root, folders, photo):
    for folder in folders:
        (root / folder).mkdir(parents=True)
        photo.save(root / folder / "ILSVRC2012_val_00000001.JPEG")
    return root


def test_labels_are_the_sorted_folders(tmp_path, photo):
    folder = ImageFolder(make_tree(tmp_path, ["zebra", "ant", "cat"], photo))
    assert folder.classes == ["ant", "cat", "zebra"]
    assert [folder[index].label for index in range(len(folder))] == [0, 1, 2]
    assert folder[0].image.mode == "RGB"
    assert folder.captions is None


def test_imagenet_synsets_get_words(tmp_path, photo):
    folder = ImageFolder(make_tree(tmp_path, ["n01443537", "n01440764"], photo))
    assert folder.classes == ["tench, Tinca tinca", "goldfish, Carassius auratus"]
    (tmp_path / "my_class").mkdir()
    photo.save(tmp_path / "my_class" / "a.png")
    assert ImageFolder(tmp_path).classes == ["my_class", "n01440764", "n01443537"]


def test_the_whole_imagenet_layout_has_timms_order(tmp_path):
    from timm.data import ImageNetInfo

    synsets = ImageNetInfo("imagenet-1k").label_names()
    for synset in synsets:
        (tmp_path / synset).mkdir()
        (tmp_path / synset / "a.JPEG").touch()
    folder = ImageFolder(tmp_path)
    assert folder.folders == synsets
    words = ImageNetInfo("imagenet-1k").label_descriptions()
    different = [ours for ours, theirs in zip(folder.classes, words) if ours != theirs]
    assert [name.partition(":")[0] for name in different] == ["crane", "crane"]  # the bird and the machine
    assert len(set(folder.classes)) == 1000


def test_class_names_from_a_file(tmp_path, photo):
    root = make_tree(tmp_path / "tree", ["0", "1"], photo)
    text, table, too_long, incomplete = (tmp_path / name for name in ("a.txt", "b.json", "c.txt", "d.json"))
    text.write_text("zero\none\n")
    table.write_text(json.dumps({"1": "one", "0": "zero", "2": "two"}))
    too_long.write_text("zero\none\ntwo\n")
    incomplete.write_text(json.dumps({"1": "one"}))
    assert ImageFolder(root, text).classes == ImageFolder(root, table).classes == ["zero", "one"]
    with pytest.raises(ValueError, match=r"has 3 names, but .* has 2 class folders"):
        ImageFolder(root, too_long)
    with pytest.raises(ValueError, match="no name for 1 folders"):
        ImageFolder(root, incomplete)
    with pytest.raises(ValueError, match="cannot be read"):
        ImageFolder(root, tmp_path / "gone.txt")


@pytest.mark.parametrize(
    ("classes", "label_2"),
    [
        (["0", "1", "10", "11", "2"], "10"),
        (["class1", "class10", "class2"], "class2"),
        (["00", "01", "02", "10"], None),
        (["1", "2", "10"], None),  # as numbers
        (["10 cents", "2 dogs"], None),
        (["a", "b"], None),
    ],
)
def test_numbers_sorted_as_text_are_said_aloud(classes, label_2, caplog):
    warn_of_text_order(classes, "the model")
    assert f"2 is '{label_2}'" in caplog.text if label_2 else not caplog.text


def test_class_names_of_folders_that_are_numbers_sorted_as_text(tmp_path, photo, caplog):
    root = make_tree(tmp_path / "tree", map(str, range(12)), photo)
    names = [f"animal {letter}" for letter in "abcdefghijkl"]
    (tmp_path / "a.txt").write_text("\n".join(names))
    (tmp_path / "b.json").write_text(json.dumps({str(number): name for number, name in enumerate(names)}))
    assert ImageFolder(root, tmp_path / "b.json").classes[2] == "animal k"
    assert not caplog.text
    ImageFolder(root, tmp_path / "a.txt")
    assert "label 0 is '0', 1 is '1', 2 is '10', 3 is '11', 4 is '2', ...; check that class_names" in caplog.text


def test_a_tree_without_pictures_is_refused(tmp_path):
    with pytest.raises(ValueError, match="one folder of pictures per class"):
        ImageFolder(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="one folder of pictures per class"):
        ImageFolder(tmp_path)


@pytest.fixture
def fashion_mnist(tmp_path):
    """Three pictures per split in the data set's own file format (idx)."""
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
    dataset = TorchvisionDataset("FashionMNIST", fashion_mnist, split)
    assert len(dataset) == 3
    assert dataset[0].image.mode == "RGB"
    assert dataset.classes[dataset[0].label] == "Ankle boot"


def test_torchvision_mistakes_are_explained(tmp_path, fashion_mnist):
    with pytest.raises(
        ValueError, match="must be a data set of torchvision that can be read here .* got 'FasionMNIST'"
    ):
        TorchvisionDataset("FasionMNIST", tmp_path)
    with pytest.raises(ValueError, match="got 'LSUN'; save others as one folder per class"):
        TorchvisionDataset("LSUN", tmp_path)
    with pytest.raises(ValueError, match="cannot be opened"):
        TorchvisionDataset("MNIST", tmp_path / "gone")
    with pytest.raises(ValueError, match="train or test"):
        TorchvisionDataset("FashionMNIST", fashion_mnist, "val")


def test_a_bad_picture_of_torchvision_is_named(fashion_mnist, monkeypatch):
    dataset = TorchvisionDataset("FashionMNIST", fashion_mnist)
    monkeypatch.setattr(dataset, "dataset", [(Image.new("F", (4, 4)), 0)])
    with pytest.raises(BadSample, match=r"FashionMNIST/train\[0\]"):
        dataset[0]


def test_a_label_out_of_range_is_named(fashion_mnist, monkeypatch):
    dataset = TorchvisionDataset("FashionMNIST", fashion_mnist)
    monkeypatch.setattr(dataset, "dataset", [(Image.new("RGB", (4, 4)), 9), (Image.new("RGB", (4, 4)), 10)])
    assert dataset[0].label == 9
    with pytest.raises(
        ValueError, match=r"FashionMNIST/train\[1\]: label 10 is out of range, the data set has 10 classes"
    ):
        dataset[1]


def test_an_empty_set_is_refused(fashion_mnist, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.FashionMNIST.__len__", lambda _: 0)
    with pytest.raises(ValueError, match="FashionMNIST, split 'test', in .* is empty"):
        TorchvisionDataset("FashionMNIST", fashion_mnist, "test")
