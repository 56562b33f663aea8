"""Hugging Face's `datasets`: local Parquet, Arrow and saved folders. Nothing may ask for the network."""

import socket

import numpy as np
import pytest
from PIL import Image

from vmoe.data import BadSample, SourceConfig, build_dataset

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    connect = socket.socket.connect

    def local(own, address):
        return connect(own, address) if own.family == socket.AF_UNIX else pytest.fail("asked for the network")

    monkeypatch.setattr(socket.socket, "connect", local)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{kind: folder} of 22 images in several layouts; "train" is in two files."""
    datasets.disable_progress_bars()
    root = tmp_path_factory.mktemp("hf")
    rows = [
        {
            "image": Image.fromarray(np.random.default_rng(number).integers(0, 256, (12, 10, 3), dtype=np.uint8)),
            "label": number % 2,
            "caption": f"image number {number}",
            "other": number,
        }
        for number in range(22)
    ]
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=["even", "odd"]),
            "caption": datasets.Value("string"),
            "other": datasets.Value("int64"),
        }
    )
    whole = datasets.Dataset.from_list(rows, features=features)
    (root / "parquet" / "data").mkdir(parents=True)
    whole.select(range(15)).to_parquet(root / "parquet" / "data" / "train-00000-of-00002.parquet")
    whole.select(range(15, 22)).to_parquet(root / "parquet" / "data" / "train-00001-of-00002.parquet")
    whole.select(range(3)).to_parquet(root / "parquet" / "data" / "validation-00000-of-00001.parquet")
    whole.save_to_disk(root / "saved", max_shard_size="2KB")
    datasets.DatasetDict({"train": whole}).save_to_disk(root / "dict")
    return {kind: str(root / kind) for kind in ("parquet", "saved", "dict")}


def source(path, **settings):
    return build_dataset(SourceConfig("hf", path, **settings))


@pytest.mark.parametrize("kind", ["parquet", "saved", "dict"])
def test_samples(folders, kind, monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    dataset = source(folders[kind])
    assert len(dataset) == 22
    assert dataset.classes == ["even", "odd"]
    assert dataset.captions[:] == [f"image number {number}" for number in range(22)]
    for index in (0, 3, 4, 14, 15, 21):
        sample = dataset[index]
        expected = np.random.default_rng(index).integers(0, 256, (12, 10, 3), dtype=np.uint8)
        assert np.array_equal(np.asarray(sample.image), expected)
        assert (sample.label, sample.caption) == (index % 2, f"image number {index}")
    assert len(dataset.fingerprint()) == 64


def test_mistakes_are_explained(folders, tmp_path):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "train.parquet").write_bytes(b"PAR1 but nothing else")
    (tmp_path / "empty").mkdir()
    for settings, message in [
        ({"path": "user/name"}, "user/name: no such folder; download the data set first"),
        ({"path": folders["parquet"], "split": "test"}, "has no files of split 'test', only such as data/train-00000"),
        ({"path": folders["dict"], "split": "test"}, "has no split 'test', only train"),
        ({"path": folders["saved"], "image_key": "photo"}, "has no column 'photo', only image, .*; set image_key"),
        ({"path": folders["saved"], "caption_key": "other"}, "caption_key 'other' is a column of .*, not of text"),
        ({"path": folders["saved"], "label_key": "other"}, "label_key 'other' is no column of type ClassLabel"),
        ({"path": str(tmp_path / "empty")}, "holds no .parquet or .arrow file"),
        ({"path": str(tmp_path / "broken")}, "broken: cannot be read"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message) as caught:
            source(**settings)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("columns", "label_key", "message"),
    [
        ({"label": [3, 1]}, None, r"'label' is no .* but of int64.*cast_column\('label', ClassLabel\(names="),
        ({"label": [3, 1]}, "label", r"label_key 'label' is no .* but of int64.*cast_column\('label'"),
        ({"label": ["cat", "dog"]}, None, r"'label' is no .* but of string.*class_encode_column\('label'\)"),
        ({"fine": ("a", "b"), "coarse": ("c", "d")}, None, "several columns of labels, fine, coarse; set label_key to"),
        ({"size": [3, 1]}, None, "has neither captions nor labels among image, size; set caption_key or"),
    ],
)
def test_labels_that_need_a_setting_or_names(tmp_path, monkeypatch, columns, label_key, message):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = {name: [0, 1] if isinstance(values, tuple) else values for name, values in columns.items()}
    whole = datasets.Dataset.from_dict({"image": [b"x", b"y"], **rows})
    for name, values in columns.items():
        if isinstance(values, tuple):
            whole = whole.cast_column(name, datasets.ClassLabel(names=list(values)))
    whole.to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=message):
        source(str(tmp_path), label_key=label_key)
    if "several" in message:
        assert source(str(tmp_path), label_key="coarse").classes == ["c", "d"]
    elif "ClassLabel" in message:  # the remedy works
        whole.cast_column("label", datasets.ClassLabel(names=["a", "b", "c", "d"])).save_to_disk(tmp_path / "saved")
        again = source(str(tmp_path / "saved"))
        assert (again.classes, again.labels) == (["a", "b", "c", "d"], [3, 1])


def test_bad_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    features = {"image": datasets.Value("binary"), "text": datasets.Value("string")}
    rows = [{"image": b"no image", "text": "a"}, {"image": None, "text": "b"}, {"image": b"", "text": None}]
    datasets.Dataset.from_list(rows, features=datasets.Features(features)).to_parquet(tmp_path / "a.parquet")
    dataset = source(str(tmp_path))
    assert dataset.captions[:] == ["a", "b", ""]
    for index, reason in enumerate(["not an image file", "holds no bytes of an image", "empty caption"]):
        with pytest.raises(BadSample, match=rf"\[train\]\[{index}\]: .*{reason}"):
            dataset[index]
