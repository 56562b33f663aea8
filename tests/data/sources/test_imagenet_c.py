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
        for place, synset in enumerate(SYNSETS):
            folder = tmp_path / "C" / condition / synset
            folder.mkdir(parents=True)
            for number in range(place + 1):
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


def test_an_unknown_corruption_or_severity_is_named(root):
    (root / "gaussian_noise" / "6").mkdir()
    message = complaint(root)
    assert message.startswith(
        f"{root}: in gaussian_noise/, folder 6 is not among the severity folders of this data set\n"
    )
    assert "│   ├── 1/                  (severities, 1 to 5)" in message
    (root / "gaussian_noise" / "6").rmdir()
    (root / "noise").mkdir()
    assert complaint(root).startswith(f"{root}: folder noise is not among the corruption folders of this data set\n")


def test_files_at_the_wrong_level_are_named(root):
    (root / "shot_noise" / "readme.txt").touch()
    assert "in shot_noise/, beside the severity folders lies file readme.txt" in complaint(root)


def test_a_corruption_without_severities_is_named(root):
    (root / "fog").mkdir()
    assert "in fog/, there is no severity folder" in complaint(root)


def test_a_missing_class_is_named_with_its_condition(root):
    shutil.rmtree(root / "shot_noise" / "3" / SYNSETS[1])
    assert f"1 of 3 classes are missing in shot_noise/3/, {SYNSETS[1]}" in complaint(root)


def test_conditions_must_have_the_same_images(root):
    (root / "shot_noise" / "3" / SYNSETS[2] / "2.JPEG").unlink()
    message = f"{root}: n01484850/2.JPEG is in gaussian_noise/1 and not in shot_noise/3; each condition must"
    assert complaint(root).startswith(message)


def test_one_condition_given_as_the_whole_is_refused(root):
    assert "2 folders (1, 3) are not among the corruption folders of this data set" in complaint(root / "shot_noise")
