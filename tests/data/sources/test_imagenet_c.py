import shutil

import pytest
from PIL import Image

from vmoe.data import SourceConfig, build_dataset
from vmoe.data.sources import imagenet as imagenet_module
from vmoe.data.sources.imagenet import CORRUPTIONS

SYNSETS = ("n01440764", "n01443537", "n01484850")


@pytest.fixture
def root(tmp_path, monkeypatch):
    """Two corruptions with two severities each, and one further corruption; three classes stand for the 1,000."""
    monkeypatch.setattr(imagenet_module, "imagenet_synsets", lambda: SYNSETS)
    for condition in ("shot_noise/1", "shot_noise/3", "gaussian_noise/5", "gaussian_noise/1", "spatter/2"):
        for position, synset in enumerate(SYNSETS):
            folder = tmp_path / "C" / condition / synset
            folder.mkdir(parents=True)
            for number in range(position + 1):
                Image.new("RGB", (4, 4), "red").save(folder / f"{number}.JPEG")
    return tmp_path / "C"


def complaint(root):
    with pytest.raises(ValueError) as caught:
        build_dataset(SourceConfig("imagenet_c", str(root)))
    return str(caught.value)


def test_every_sample_knows_its_condition(root):
    dataset = build_dataset(SourceConfig("imagenet_c", str(root)))
    assert dataset.conditions == ["gaussian_noise/1", "gaussian_noise/5", "shot_noise/1", "shot_noise/3", "spatter/2"]
    assert len(dataset) == len(dataset.labels) == len(dataset.condition_of) == 5 * 6
    for index in range(30):
        sample = dataset[index]
        condition, synset, _ = sample.path.removeprefix(f"{root}/").rsplit("/", 2)
        assert condition == dataset.conditions[dataset.condition_of[index]]
        assert synset == SYNSETS[sample.label]
        assert sample.image.size == (4, 4)
        assert dataset.file_of(index) == (sample.path.removeprefix(f"{root}/"), root / dataset.file_of(index)[0])
    assert len({dataset[index].path for index in range(30)}) == 30


def test_missing_conditions_are_logged(root, caplog):
    build_dataset(SourceConfig("imagenet_c", str(root)))
    assert "71 of 75 conditions are missing, so there is no mean corruption error: gaussian_noise/2, " in caplog.text
    assert "spatter" not in caplog.text
    for name in CORRUPTIONS:
        for severity in range(1, 6):
            if not (root / name / str(severity)).exists():
                shutil.copytree(root / "shot_noise" / "1", root / name / str(severity))
    caplog.clear()
    build_dataset(SourceConfig("imagenet_c", str(root)))
    assert not caplog.records


def test_folders_and_files_that_do_not_belong_are_named(root):
    (root / "gaussian_noise" / "6").mkdir()
    message = complaint(root)
    assert message.startswith(f"{root}/gaussian_noise: holds folder 6, not of this data set; ")
    assert "; expected CORRUPTION/SEVERITY/SYNSET/IMAGE, such as " in message
    (root / "gaussian_noise" / "6").rename(root / "noise")
    assert complaint(root).startswith(f"{root}: holds folder noise, not of this data set; ")
    (root / "noise").rename(root / "fog")
    assert f"{root}/fog: holds no folders" in complaint(root)
    (root / "fog").rmdir()
    (root / "shot_noise" / "readme.txt").touch()
    assert "shot_noise: holds file readme.txt beside its folders" in complaint(root)
    (root / "shot_noise" / "readme.txt").unlink()
    assert "holds 2 folders (1, 3), not of this data set" in complaint(root / "shot_noise")
    shutil.rmtree(root / "shot_noise" / "3" / SYNSETS[1])
    assert f"{root}/shot_noise/3: 1 of 3 folders are missing, {SYNSETS[1]}" in complaint(root)


def test_conditions_must_have_the_same_images(root):
    (root / "shot_noise" / "3" / SYNSETS[2] / "2.JPEG").unlink()
    message = f"{root}: n01484850/2.JPEG is in one of gaussian_noise/1 and shot_noise/3; each condition must"
    assert complaint(root).startswith(message)
