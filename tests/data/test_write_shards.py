"""Any data set written as shards, and read again."""

import json

import numpy as np
import pytest
from PIL import Image

from vmoe.data import BadSample, SourceConfig, build_dataset
from vmoe.data.write_shards import main, write_shards

from .conftest import Pictures


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("VMOE_CACHE", str(tmp_path_factory.mktemp("cache")))


def test_samples_come_back(tmp_path):
    assert write_shards(Pictures(7), tmp_path / "out", 3) == 3
    assert json.loads((tmp_path / "out" / "sizes.json").read_text()) == {"00000.tar": 3, "00001.tar": 3, "00002.tar": 1}
    dataset = build_dataset(
        SourceConfig("shards", str(tmp_path / "out"), class_names=str(tmp_path / "out" / "classes.txt"))
    )
    assert len(dataset) == 7
    assert dataset.classes == ["even", "odd"]
    for index in range(7):
        sample, expected = dataset[index], Pictures(7)[index]
        assert np.array_equal(np.asarray(sample.image), np.asarray(expected.image))
        assert (sample.label, sample.caption) == (expected.label, expected.caption)
    with pytest.raises(ValueError, match="holds files already"):
        write_shards(Pictures(7), tmp_path / "out")
    with pytest.raises(BadSample, match="picture 2"):
        write_shards(Pictures(7, bad=[2]), tmp_path / "bad")
    assert not list((tmp_path / "bad").glob("*"))


def test_the_command_copies_files_as_they_are(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (9, 8), "red").save("a.jpg")
    Image.new("RGB", (9, 8), "blue").save("b.bmp")
    (tmp_path / "pairs.csv").write_text("image,caption\na.jpg,red\nb.bmp,blue\n")
    command = ["write_shards", "--source.type", "pairs", "--source.path", "pairs.csv", "--output", "out"]
    monkeypatch.setattr("sys.argv", command)
    assert main() == 0
    assert capsys.readouterr().out == "2 samples in 1 shards in out\n"
    assert (tmp_path / "a.jpg").read_bytes() in (tmp_path / "out" / "00000.tar").read_bytes()
    dataset = build_dataset(SourceConfig("shards", "out"))
    assert dataset.captions[:] == ["red", "blue"]
    assert dataset[1].image.getpixel((0, 0)) == (0, 0, 255)
    assert main() == 1
    assert capsys.readouterr().err.startswith("write_shards: error: output out holds files already")
