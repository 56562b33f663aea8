"""Hugging Face's `datasets`: local Parquet, Arrow and saved folders, and streaming. Nothing may ask for the network."""

import socket

import numpy as np
import pytest
from PIL import Image

from tests.data.conftest import PREPROCESS, tokenize
from vmoe.data import (
    AugmentationConfig,
    BadSample,
    LoaderConfig,
    SourceConfig,
    build_dataset,
    build_transform,
    train_loader,
)
from vmoe.data.images import DataError

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    connect = socket.socket.connect

    def local(own, address):
        return connect(own, address) if own.family == socket.AF_UNIX else pytest.fail("asked for the network")

    monkeypatch.setattr(socket.socket, "connect", local)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{kind: folder} of 22 images in several layouts; "train" is in two files, of 4 rows a group."""
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
    whole.select(range(15)).to_parquet(root / "parquet" / "data" / "train-00000-of-00002.parquet", batch_size=4)
    whole.select(range(15, 22)).to_parquet(root / "parquet" / "data" / "train-00001-of-00002.parquet", batch_size=4)
    whole.select(range(3)).to_parquet(root / "parquet" / "data" / "validation-00000-of-00001.parquet")
    whole.save_to_disk(root / "saved", max_shard_size="2KB")
    datasets.DatasetDict({"train": whole}).save_to_disk(root / "dict")
    return {kind: str(root / kind) for kind in ("parquet", "saved", "dict")}


def source(path, **settings):
    return build_dataset(SourceConfig("hf", path, **settings))


@pytest.mark.parametrize("kind", ["parquet", "saved", "dict", "streaming"])
def test_samples(folders, kind, monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    dataset = source(folders["parquet"], streaming=True) if kind == "streaming" else source(folders[kind])
    assert len(dataset) == 22
    assert dataset.classes == ["even", "odd"]
    assert dataset.captions[:] == [f"image number {number}" for number in range(22)]
    for index in (0, 3, 4, 14, 15, 21):
        sample = dataset[index]
        expected = np.random.default_rng(index).integers(0, 256, (12, 10, 3), dtype=np.uint8)
        assert np.array_equal(np.asarray(sample.image), expected)
        assert (sample.label, sample.caption) == (index % 2, f"image number {index}")
    assert len(dataset.fingerprint()) == 64


@pytest.mark.parametrize("streams", [1, 2])
def test_streaming_has_exact_positions(folders, streams):
    def loader(workers=0, part=None):
        dataset = source(folders["parquet"], streaming=True, streams=streams, shuffle_buffer=5)
        config = LoaderConfig(batch_size=4, num_workers=workers)
        return train_loader(dataset, build_transform(PREPROCESS, AugmentationConfig()), tokenize, config, 1, part=part)

    def take(loader, steps):
        return [next(loader)["text"][:, 3].tolist() for _ in range(steps)]

    whole = take(loader(), 10)
    assert len({number for batch in whole[:5] for number in batch}) == 20
    for stop, workers in [(3, 1), (6, 0)]:
        first, second = loader(workers), loader()
        assert take(first, stop) == whole[:stop]
        second.load_state_dict(first.state_dict())
        assert take(second, 10 - stop) == whole[stop:]
        first.close()
    parts = [take(loader(part=(rank, 2)), 10) for rank in range(2)]
    assert [first + second for first, second in zip(*parts)] == whole


@pytest.mark.parametrize("streams", [1, 2])
@pytest.mark.parametrize("window", [1, 3, 5, 8, 30])  # groups of 4: windows within one, across two, over several
def test_row_groups_are_read_once(folders, monkeypatch, window, streams):
    dataset = source(folders["parquet"], streaming=True, shuffle_buffer=window, streams=streams)
    read, groups = dataset._read, []
    monkeypatch.setattr(dataset, "_read", lambda group: groups.append(group) or read(group))
    shuffle, most = dataset.shuffle(0, 2), 0
    for step in range(11):
        for index in shuffle.indices(0, 2 * step, 2 * step + 2):
            dataset[index]
            most = max(most, len(dataset._kept))
    assert set(groups) == set(range(len(dataset.groups)))
    assert len(groups) <= len(dataset.groups) + streams - 1  # the cut between streams may go through a group
    if window == streams == 1:
        assert most <= 3 < len(dataset.groups)  # memory does not grow with the data


@pytest.mark.parametrize(
    ("other", "column"),
    [
        ({"image": [b"x"], "text": ["a"]}, "label"),
        ({"image": [b"x"], "label": [0], "text": [3]}, "text"),
        ({"image": [b"x"], "label": [0], "text": ["a"]}, "label"),  # with the classes the other way round
    ],
)
def test_files_with_other_columns(tmp_path, other, column):
    def write(name, rows, classes):
        whole = datasets.Dataset.from_dict(rows)
        if "label" in rows:
            whole = whole.cast_column("label", datasets.ClassLabel(names=classes))
        whole.to_parquet(tmp_path / name)

    write("a.parquet", {"image": [b"x"], "label": [1], "text": ["b"]}, ["cat", "dog"])
    write("b.parquet", other, ["cat", "dog"] if column == "text" else ["dog", "cat"])
    problem = f"column '{column}' is missing, of another type or with other classes than in .*a.parquet; all files"
    with pytest.raises(DataError, match=f"b.parquet: {problem}"):
        source(str(tmp_path), streaming=True)


def test_mistakes_are_explained(folders, tmp_path):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "train.parquet").write_bytes(b"PAR1 but nothing else")
    (tmp_path / "empty").mkdir()
    for settings, message in [
        ({"path": "user/name"}, "user/name: no such folder; download the data set first"),
        ({"path": "user/name", "streaming": True}, "user/name: no such folder; download the data set first"),
        ({"path": folders["parquet"], "split": "test"}, "has no files of split 'test', only such as data/train-00000"),
        ({"path": folders["dict"], "split": "test"}, "has no split 'test', only train"),
        ({"path": folders["saved"], "image_key": "photo"}, "has no column 'photo', only image, .*; set image_key"),
        ({"path": folders["saved"], "caption_key": "other"}, "caption_key 'other' is a column of .*, not of text"),
        ({"path": folders["saved"], "label_key": "other"}, "label_key 'other' is no column of type ClassLabel"),
        ({"path": str(tmp_path / "empty")}, "holds no .parquet or .arrow file"),
        ({"path": str(tmp_path / "broken")}, "broken: cannot be read"),
        ({"path": str(tmp_path / "broken"), "streaming": True}, "train.parquet: cannot be read as Parquet"),
        ({"path": folders["saved"], "streaming": True}, "holds no .parquet file, and streaming reads no others"),
        ({"path": folders["saved"], "shuffle_buffer": 9}, "need streaming: true"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message) as caught:
            source(**settings)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("streaming", [False, True])
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
def test_labels_that_need_a_setting_or_names(tmp_path, monkeypatch, streaming, columns, label_key, message):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = {name: [0, 1] if isinstance(values, tuple) else values for name, values in columns.items()}
    whole = datasets.Dataset.from_dict({"image": [b"x", b"y"], **rows})
    for name, values in columns.items():
        if isinstance(values, tuple):
            whole = whole.cast_column(name, datasets.ClassLabel(names=list(values)))
    whole.to_parquet(tmp_path / "train.parquet")
    settings = {"streaming": True} if streaming else {}
    with pytest.raises(ValueError, match=message):
        source(str(tmp_path), label_key=label_key, **settings)
    if "several" in message:
        assert source(str(tmp_path), label_key="coarse", **settings).classes == ["c", "d"]
    elif "ClassLabel" in message:  # the remedy works
        whole.cast_column("label", datasets.ClassLabel(names=["a", "b", "c", "d"])).save_to_disk(tmp_path / "saved")
        again = source(str(tmp_path / "saved"))
        assert (again.classes, again.labels) == (["a", "b", "c", "d"], [3, 1])


def test_bad_rows(tmp_path):
    features = {"image": datasets.Value("binary"), "text": datasets.Value("string")}
    rows = [{"image": b"no image", "text": "a"}, {"image": None, "text": "b"}, {"image": b"", "text": None}]
    datasets.Dataset.from_list(rows, features=datasets.Features(features)).to_parquet(tmp_path / "a.parquet")
    dataset = source(str(tmp_path), streaming=True)
    assert dataset.captions[:] == ["a", "b", ""]
    for index, reason in enumerate(["not an image file", "holds no bytes of an image", "empty caption"]):
        with pytest.raises(BadSample, match=f"a.parquet: row {index} of group 0: .*{reason}"):
            dataset[index]
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    dataset._kept.clear()
    with pytest.raises(DataError, match=r"a.parquet: row group 0 cannot be read"):
        dataset[0]
