"""Any data set written as shards, and read again."""

import json

import numpy as np
import pytest
from PIL import Image

from tests.data.conftest import Images
from vmoe.cli.write_shards import main, write_shards
from vmoe.data import BadSample, SourceConfig, build_dataset
from vmoe.data.dataset import ImageFiles


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("VMOE_CACHE", str(tmp_path_factory.mktemp("cache")))


def test_samples_come_back(tmp_path):
    assert write_shards(Images(7), tmp_path / "out", 3) == (3, 7, 0)
    assert json.loads((tmp_path / "out" / "sizes.json").read_text()) == {"00000.tar": 3, "00001.tar": 3, "00002.tar": 1}
    dataset = build_dataset(
        SourceConfig("shards", str(tmp_path / "out"), class_names=str(tmp_path / "out" / "classes.txt"))
    )
    assert len(dataset) == 7
    assert dataset.classes == ["even", "odd"]
    for index in range(7):
        sample, expected = dataset[index], Images(7)[index]
        assert np.array_equal(np.asarray(sample.image), np.asarray(expected.image))
        assert (sample.label, sample.caption) == (expected.label, expected.caption)
    with pytest.raises(ValueError, match="holds files already"):
        write_shards(Images(7), tmp_path / "out")
    with pytest.raises(BadSample, match="image 2"):
        write_shards(Images(7, bad=[2]), tmp_path / "bad")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_bad_samples_are_left_out_and_counted(tmp_path):
    assert write_shards(Images(7, bad=[0, 2, 5]), tmp_path / "out", 3, on_bad="skip") == (2, 4, 3)
    assert json.loads((tmp_path / "out" / "sizes.json").read_text()) == {"00000.tar": 3, "00001.tar": 1}
    dataset = build_dataset(SourceConfig("shards", str(tmp_path / "out")))
    assert dataset.captions[:] == [f"image number {number}" for number in (1, 3, 4, 6)]
    with pytest.raises(ValueError, match="all 2 samples are bad"):
        write_shards(Images(2, bad=[0, 1]), tmp_path / "none", on_bad="skip")
    assert not (tmp_path / "none").exists()


def test_a_write_that_is_cut_short_leaves_no_shards(tmp_path):
    """They would be read as if they were whole, without the samples that are missing."""

    class Stopped(Images):
        def __getitem__(self, index):
            if index == 4:
                assert not (tmp_path / "out").exists()
                assert (tmp_path / "out.unfinished" / "00000.tar").stat().st_size > 0
                raise KeyboardInterrupt
            return super().__getitem__(index)

    (tmp_path / "out").mkdir()
    with pytest.raises(KeyboardInterrupt):
        write_shards(Stopped(7), tmp_path / "out", 2)
    assert not list(tmp_path.iterdir())
    (tmp_path / "out.unfinished").mkdir()  # as a process that is killed leaves it
    with pytest.raises(ValueError, match=r"out.unfinished is there already, .*; remove it"):
        write_shards(Images(7), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("classes", "message"),
    [(["a", "b\nc"], "more than one line"), (["a", "a"], "'a' is given twice"), (["a", ""], "is empty")],
)
def test_names_of_classes_are_looked_at_first(tmp_path, classes, message):
    dataset = Images(7, bad=[0])
    dataset.classes = classes
    with pytest.raises(ValueError, match=f"names of the classes cannot be written.*{message}"):
        write_shards(dataset, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_image_that_the_data_set_changes_is_not_copied(tmp_path):
    class Cropped(ImageFiles):
        classes = ("only",)

        def load(self, path, content=None):
            return super().load(path, content).crop((2, 2, 8, 6))

    image = Image.new("RGB", (10, 8), "red")
    image.paste((0, 0, 255), (2, 2, 8, 6))
    image.save(tmp_path / "a.png")
    write_shards(Cropped(tmp_path, ["a.png"], [0]), tmp_path / "out")
    shards = build_dataset(
        SourceConfig("shards", str(tmp_path / "out"), class_names=str(tmp_path / "out" / "classes.txt"))
    )
    assert shards[0].image.getcolors() == [(24, (0, 0, 255))]


@pytest.mark.parametrize("apply", [False, True])
def test_an_image_lying_on_its_side_is_written_upright_if_it_is_read_so(tmp_path, photo, apply):
    exif = Image.Exif()
    exif[274] = 6
    photo.save(tmp_path / "a.jpg", exif=exif)
    (tmp_path / "pairs.csv").write_text("image,caption\na.jpg,a photo\n")
    settings = {"path": str(tmp_path / "pairs.csv"), "exif_orientation": apply}
    write_shards(build_dataset(SourceConfig("pairs", **settings)), tmp_path / "out")
    for again in (None, True):
        shards = build_dataset(SourceConfig("shards", str(tmp_path / "out"), exif_orientation=again))
        assert shards[0].image.size == ((10, 20) if apply or again else (20, 10))
    assert shards[0].path.endswith("'000000000.png'" if apply else "'000000000.jpg'")


@pytest.mark.parametrize("name", ["label_sets", "class_columns", "conditions"])
def test_what_shards_cannot_hold_is_refused(tmp_path, name):
    dataset = Images(3)
    setattr(dataset, name, [])
    with pytest.raises(ValueError, match=f"Images has {name}, which shards cannot hold"):
        write_shards(dataset, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_names_for_prompts_are_not_written_with_a_warning(tmp_path, caplog):
    dataset = Images(3)
    dataset.prompt_names = ["an even one", "an odd one"]
    write_shards(dataset, tmp_path / "out")
    assert "do not hold the names of the classes for zero-shot prompts" in caplog.text


def test_the_command_copies_files_as_they_are(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (9, 8), "red").save("a.jpg")
    Image.new("RGB", (9, 8), "blue").save("b.bmp")
    (tmp_path / "pairs.csv").write_text("image,caption\na.jpg,red\nb.bmp,blue\n")
    command = ["--source.type", "pairs", "--source.path", "pairs.csv", "--output", "out"]
    assert main(command) == 0
    assert capsys.readouterr().out == "2 samples in 1 shard in out\n"
    assert (tmp_path / "a.jpg").read_bytes() in (tmp_path / "out" / "00000.tar").read_bytes()
    dataset = build_dataset(SourceConfig("shards", "out"))
    assert dataset.captions[:] == ["red", "blue"]
    assert dataset[1].image.getpixel((0, 0)) == (0, 0, 255)
    assert main(command) == 1
    assert capsys.readouterr().err.startswith("vmoe-write-shards: error: output out holds files already")
