import pytest

from vmoe.data import SourceConfig, build_dataset
from vmoe.data import build as build_module


def test_files_folders_and_trees(tmp_path, photo):
    (tmp_path / "tree" / "class").mkdir(parents=True)
    (tmp_path / "pairs").mkdir()
    photo.save(tmp_path / "tree" / "class" / "a.png")
    photo.save(tmp_path / "pairs" / "a.png")
    (tmp_path / "pairs" / "a.txt").write_text("a ramp")
    (tmp_path / "pairs.csv").write_text("image,caption\na.png,a ramp\n")
    root = str(tmp_path)
    sources = [
        SourceConfig("pairs", f"{root}/pairs"),
        SourceConfig("pairs", f"{root}/pairs.csv", image_root=f"{root}/pairs"),
        SourceConfig("image_folder", f"{root}/tree"),
    ]
    samples = [build_dataset(source)[0] for source in sources]
    assert [sample.caption for sample in samples] == ["a ramp", "a ramp", None]
    assert [sample.label for sample in samples] == [None, None, 0]


def test_every_setting_reaches_its_data_set(monkeypatch):
    calls = []
    for name in ("EmojiPairs", "EmojiGroups", "ImageFolder", "TorchvisionDataset", "PairsFile"):
        monkeypatch.setattr(build_module, name, lambda *arguments, name=name: calls.append((name, *arguments)))
    build_dataset(SourceConfig("emoji", split="held_out", image_size=32))
    build_dataset(SourceConfig("emoji_groups", split="val", image_size=32))
    build_dataset(SourceConfig("image_folder", "x", class_names="names.txt"))
    build_dataset(SourceConfig("torchvision", "x", "test", name="MNIST"))
    build_dataset(SourceConfig("pairs", "x.csv", image_root="r", image_key="i", caption_key="c"))
    assert calls == [
        ("EmojiPairs", "held_out", 32),
        ("EmojiGroups", "val", 32),
        ("ImageFolder", "x", "names.txt"),
        ("TorchvisionDataset", "MNIST", "x", "test"),
        ("PairsFile", "x.csv", "r", "i", "c"),
    ]


def test_an_unknown_type_is_refused():
    with pytest.raises(ValueError, match="'video'"):
        build_dataset(SourceConfig("video"))
