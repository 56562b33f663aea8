import json

import pytest

from vmoe.data import SourceConfig, build_dataset
from vmoe.data.sources.folder import warn_of_text_order


def image_folder(path, class_names=None):
    return build_dataset(SourceConfig("image_folder", str(path), class_names=class_names and str(class_names)))


def make_tree(root, folders, photo):
    for folder in folders:
        (root / folder).mkdir(parents=True)
        photo.save(root / folder / "ILSVRC2012_val_00000001.JPEG")
    return root


def test_labels_are_the_sorted_folders(tmp_path, photo):
    folder = image_folder(make_tree(tmp_path, ["zebra", "ant", "cat"], photo))
    assert folder.classes == ["ant", "cat", "zebra"]
    assert [folder[index].label for index in range(len(folder))] == [0, 1, 2]
    assert folder[0].image.mode == "RGB"
    assert folder.captions is None


def test_imagenet_synsets_get_words(tmp_path, photo):
    folder = image_folder(make_tree(tmp_path, ["n01443537", "n01440764"], photo))
    assert folder.classes == ["tench, Tinca tinca", "goldfish, Carassius auratus"]
    (tmp_path / "my_class").mkdir()
    photo.save(tmp_path / "my_class" / "a.png")
    assert image_folder(tmp_path).classes == ["my_class", "n01440764", "n01443537"]


def test_the_whole_imagenet_layout_has_timms_order(tmp_path):
    from timm.data import ImageNetInfo

    synsets = ImageNetInfo("imagenet-1k").label_names()
    for synset in synsets:
        (tmp_path / synset).mkdir()
        (tmp_path / synset / "a.JPEG").touch()
    folder = image_folder(tmp_path)
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
    assert image_folder(root, text).classes == image_folder(root, table).classes == ["zero", "one"]
    with pytest.raises(ValueError, match="has 3 names, but there are 2 class folders"):
        image_folder(root, too_long)
    with pytest.raises(ValueError, match="no name for 1 class folders"):
        image_folder(root, incomplete)
    with pytest.raises(ValueError, match="cannot be read"):
        image_folder(root, tmp_path / "gone.txt")


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
    assert image_folder(root, tmp_path / "b.json").classes[2] == "animal k"
    assert not caplog.text
    image_folder(root, tmp_path / "a.txt")
    assert "label 0 is '0', 1 is '1', 2 is '10', 3 is '11', 4 is '2', ...; check that class_names" in caplog.text


@pytest.mark.parametrize(
    ("names", "message"),
    [("pet\npet\n", "'pet' is given twice; names of classes must differ"), ("pet\n \n", "name of class 1 is empty")],
)
def test_class_names_that_cannot_be_told_apart_are_refused(tmp_path, photo, names, message):
    (tmp_path / "names.txt").write_text(names)
    with pytest.raises(ValueError, match=message):
        image_folder(make_tree(tmp_path / "tree", ["cat", "dog"], photo), tmp_path / "names.txt")


def test_a_tree_without_images_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no folders"):
        image_folder(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="one folder of images per class"):
        image_folder(tmp_path)
