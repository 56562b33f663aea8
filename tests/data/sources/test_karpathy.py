import json

import pytest
from PIL import Image

from vmoe.data import BadSample, SourceConfig, build_dataset


def entry(name, split, *captions, folder=None):
    """An entry of `images` with the keys that Karpathy's files have, used or not."""
    found = {"filename": name, "split": split, "imgid": 0, "sentids": [1]}
    found["sentences"] = [{"raw": text, "tokens": text.split(), "imgid": 0, "sentid": 1} for text in captions]
    return found | ({"filepath": folder, "cocoid": 9} if folder else {})


COCO = [
    entry("COCO_val2014_1.jpg", "test", "A man rides a bike. ", "man on bike\n", folder="val2014"),
    entry("COCO_val2014_2.jpg", "restval", "a dog", folder="val2014"),
    entry("COCO_train2014_3.jpg", "train", "a cat", "two cats", folder="train2014"),
    entry("COCO_val2014_4.jpg", "val", "a bus", folder="val2014"),
    entry("COCO_val2014_5.jpg", "test", "a car", folder="val2014"),
]


@pytest.fixture
def coco(tmp_path):
    for image in COCO:
        (tmp_path / image["filepath"]).mkdir(exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / image["filepath"] / image["filename"])
    return write(tmp_path, COCO)


def write(folder, images):
    file = folder / "dataset_coco.json"
    file.write_text(json.dumps({"images": images, "dataset": "coco"}))
    return file


def build(file, split="test", **settings):
    return build_dataset(SourceConfig("karpathy", str(file), split, **settings))


def complaint(file, **settings):
    with pytest.raises(ValueError) as caught:
        build(file, **settings)
    return str(caught.value)


def test_each_caption_is_a_sample_of_its_image(coco):
    dataset = build(coco)
    assert dataset.has_captions
    assert dataset.captions[:] == ["A man rides a bike.", "man on bike", "a car"]
    assert dataset.image_ids == ["val2014/COCO_val2014_1.jpg"] * 2 + ["val2014/COCO_val2014_5.jpg"]
    assert len(dataset) == 3
    sample = dataset[1]
    assert (sample.caption, sample.label) == ("man on bike", None)
    assert sample.path == str(coco.parent / "val2014" / "COCO_val2014_1.jpg")


def test_restval_is_for_training(coco):
    assert build(coco, "train").captions[:] == ["a dog", "a cat", "two cats"]
    assert build(coco, "val").captions[:] == ["a bus"]


def test_flickr_lies_flat_in_a_folder_of_its_own(tmp_path):
    (tmp_path / "flickr30k-images").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "flickr30k-images" / "1007129816.jpg")
    file = write(tmp_path, [entry("1007129816.jpg", "test", *"abcde")])
    dataset = build(file, image_root=str(tmp_path / "flickr30k-images"))
    assert dataset.image_ids == ["1007129816.jpg"] * 5
    assert dataset[4].caption == "e"
    assert complaint(file) == f"{tmp_path}: holds none of the 1 images, as 1007129816.jpg; set image_root"


def test_one_missing_image_or_caption_is_a_bad_sample(coco):
    (coco.parent / "val2014" / "COCO_val2014_1.jpg").unlink()
    with pytest.raises(BadSample, match="COCO_val2014_1.jpg: no such file"):
        build(coco)[0]
    write(coco.parent, [entry("COCO_val2014_5.jpg", "test", " ", folder="val2014")])
    with pytest.raises(BadSample, match="COCO_val2014_5.jpg: empty caption"):
        build(coco)[0]


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (3, "has no list 'images'"),
        ([], "holds no captions of split 'test'"),
        ([entry("1.jpg", "train", "a")], "holds no captions of split 'test'"),
        ([entry("1.jpg", "dev", "a")], "images[0]: split must be one of train, restval, val, test, got 'dev'"),
        ([entry("1.jpg", "test")], "images[0]: 1.jpg has no sentences"),
        ([entry("1.jpg", "test", "a")] * 2, "images[1]: 1.jpg is there already"),
        ([{"filename": "1.jpg"}], "images[0]: must have filename, split and sentences"),
        (["1.jpg"], "images[0]: must have filename, split and sentences"),
        ([entry("1.jpg", "test", "a") | {"sentences": [{"raw": None}]}], "images[0]: must have"),
        ([entry(7, "test", "a")], "dataset_coco.json: images[0]: must have filename"),
        ([entry("", "test", "a")], "images[0]: the image '' is not inside image_root"),
        ([entry("1.jpg", "test", "a", folder=3)], "images[0]: must have"),
        ([entry("1.jpg", ["test"], "a")], "images[0]: split must be one of train, restval, val, test, got ['test']"),
    ],
)
def test_a_malformed_file_is_explained(tmp_path, images, message):
    assert message in complaint(write(tmp_path, images))


def test_files_of_another_kind_are_explained(tmp_path):
    assert "cannot be read (No such file or directory); give Karpathy's JSON" in complaint(tmp_path / "gone.json")
    assert "cannot be read (Is a directory)" in complaint(tmp_path)
    (tmp_path / "a.json").write_text("{")
    assert "a.json: not valid JSON" in complaint(tmp_path / "a.json")
    (tmp_path / "a.json").write_text("[1]")
    assert "a.json: must be a JSON object; give" in complaint(tmp_path / "a.json")
