import json

import pytest
from PIL import Image

from vmoe.data import BadSample, SourceConfig, build_dataset

# A world of six ImageNet classes. The mapping files are laid out as in ObjectNet's download: names in the order of
# ILSVRC 2012's own numbers, which is not that of a classifier's outputs.
NAMES = ["crane", "analog clock", "banana", "crane", "digital clock", "cup"]
OUTPUTS = {"0": 2, "1": 4, "2": 0, "3": 3, "4": 5, "5": 1}
FOLDERS = {"alarm_clock": "Alarm clock", "banana": "Banana", "coaster": "Coaster", "drinking_cup": "Drinking Cup"}
CLASSES = {"Drinking Cup": "cup", "Alarm clock": "analog clock; digital clock", "Banana": "banana"}


@pytest.fixture
def root(tmp_path):
    mappings = tmp_path / "objectnet-1.0" / "mappings"
    mappings.mkdir(parents=True)
    (mappings / "imagenet_to_label_2012_v2").write_text("\n".join(NAMES) + "\n")
    for name, content in [
        ("pytorch_to_imagenet_2012_id", OUTPUTS),
        ("folder_to_objectnet_label", FOLDERS),
        ("objectnet_to_imagenet_1k", CLASSES),
    ]:
        (mappings / f"{name}.json").write_text(json.dumps(content))
    for number, folder in enumerate(FOLDERS, start=1):
        (mappings.parent / "images" / folder).mkdir(parents=True)
        for position in range(number):
            image = Image.new("RGB", (10, 8), "red")
            image.paste((0, 0, 255), (2, 2, 8, 6))
            image.save(mappings.parent / "images" / folder / f"{position}.png")
    (mappings.parent / "license.txt").touch()  # the download's root holds more than the two folders
    return mappings.parent


def complaint(root):
    with pytest.raises(ValueError) as caught:
        build_dataset(SourceConfig("objectnet", str(root)))
    return str(caught.value)


def test_only_classes_of_imagenet_count(root):
    dataset = build_dataset(SourceConfig("objectnet", str(root)))
    assert dataset.classes == ["Alarm clock", "Banana", "Drinking Cup"]
    assert dataset.prompt_names == ["alarm clock", "banana", "drinking cup"]
    assert dataset.class_columns == [[1, 5], [0], [4]]
    assert dataset.labels == [0, 1, 1, 2, 2, 2, 2]
    assert dataset.left_out == {"images of classes that ImageNet-1k does not have": 3}
    assert dataset.file_of(3) == ("images/drinking_cup/0.png", root / "images/drinking_cup/0.png")


def test_the_red_border_is_cut_off(root):
    image = build_dataset(SourceConfig("objectnet", str(root)))[0].image
    assert image.size == (6, 4)
    assert image.getcolors() == [(24, (0, 0, 255))]
    Image.new("RGB", (4, 30)).save(root / "images" / "alarm_clock" / "0.png")
    with pytest.raises(BadSample, match="4 x 30 pixels, nothing is left within its border"):
        build_dataset(SourceConfig("objectnet", str(root)))[0]


def test_the_images_folder_alone_is_refused_with_both_layouts(root):
    message = complaint(root / "images")
    assert message.startswith(f"{root}/images: has no folder images; ")
    assert "and mappings/ (see docs/evaluation.md)" in message


def test_unknown_and_missing_folders_are_named(root):
    (root / "images" / "spoon").mkdir()
    assert "images: holds folder spoon, not of this data set" in complaint(root)
    (root / "images" / "spoon").rmdir()
    for file in (root / "images" / "banana").iterdir():
        file.unlink()
    assert complaint(root).startswith(f"{root}/images/banana: holds no image")
    (root / "images" / "banana").rmdir()
    assert "images: 1 of 3 folders are missing, banana" in complaint(root)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("objectnet_to_imagenet_1k.json", {"Banana": "pear"}, "class 'Banana': each of 'pear' must be once"),
        ("objectnet_to_imagenet_1k.json", {"Banana": "crane"}, "class 'Banana': each of 'crane' must be once in"),
        ("objectnet_to_imagenet_1k.json", {"Banana": ["x"]}, "1k.json: 'Banana' must have a value of type str"),
        ("objectnet_to_imagenet_1k.json", {"Sofa": "cup"}, "label.json: class 'Sofa' must have one folder, got 0"),
        ("objectnet_to_imagenet_1k.json", ["Sofa"], "must be a JSON object"),
        ("folder_to_objectnet_label.json", FOLDERS | {"coaster": "Banana"}, "'Banana' must have one folder, got 2"),
        ("folder_to_objectnet_label.json", FOLDERS | {"banana": ["B"]}, "label.json: 'banana' must have a value of"),
        ("pytorch_to_imagenet_2012_id.json", OUTPUTS | {"0": "0"}, "id.json: '0' must have a value of type int"),
        ("pytorch_to_imagenet_2012_id.json", OUTPUTS | {"3": True}, "id.json: '3' must have a value of type int"),
        ("pytorch_to_imagenet_2012_id.json", OUTPUTS | {"5": 6}, "must give each output 0..5 one of the 6 lines of"),
        ("pytorch_to_imagenet_2012_id.json", {"0": 0}, "must give each output 0..5"),
        ("folder_to_objectnet_label.json", None, "folder_to_objectnet_label.json: cannot be read"),
        ("imagenet_to_label_2012_v2", None, "imagenet_to_label_2012_v2: cannot be read"),
    ],
)
def test_broken_mapping_files_are_named(root, name, content, message):
    file = root / "mappings" / name
    if content is None:
        file.unlink()
    else:
        file.write_text(json.dumps(content))
    assert message in complaint(root)


def test_broken_json_is_named(root):
    (root / "mappings" / "folder_to_objectnet_label.json").write_text("{")
    assert "folder_to_objectnet_label.json: not valid JSON" in complaint(root)
