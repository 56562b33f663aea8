"""Made-up copies of ImageNet's test sets: the layout of the downloads, an image or two for each class."""

import io
import json
import pkgutil

import pytest
from PIL import Image
from timm.data import ImageNetInfo

from vmoe.data import SourceConfig, build_dataset
from vmoe.data.sources.imagenet import LAYOUTS, imagenet_prompt_names, imagenet_words

SYNSETS = ImageNetInfo("imagenet-1k").label_names()


def jpeg(colour="blue", size=(6, 6)):
    stream = io.BytesIO()
    Image.new("RGB", size, colour).save(stream, "JPEG")
    return stream.getvalue()


BLUE = jpeg()


def val_name(number):
    return f"ILSVRC2012_val_{number:08d}.JPEG"


def make_tree(root, folders, name="1.jpg"):
    for position, folder in enumerate(folders):
        (root / folder).mkdir(parents=True)
        (root / folder / (name if isinstance(name, str) else name(position))).write_bytes(BLUE)
    return root


@pytest.fixture(scope="module")
def val(tmp_path_factory):
    """The validation set in synset folders: image i + 1 belongs to class i, and one more to the tench."""
    root = make_tree(tmp_path_factory.mktemp("imagenet") / "val", SYNSETS, lambda position: val_name(position + 1))
    (root / SYNSETS[0] / val_name(1001)).write_bytes(BLUE)
    return root


@pytest.fixture(scope="module")
def flat(tmp_path_factory):
    """The same set flat, in the order of its archive: image i + 1 belongs to class 999 - i."""
    root = tmp_path_factory.mktemp("archive") / "val"
    root.mkdir()
    for number in range(1, 1001):
        (root / val_name(number)).write_bytes(BLUE)
    return root


def build(kind, path, **settings):
    return build_dataset(SourceConfig(kind, str(path), **settings))


def complaint(kind, path, **settings):
    with pytest.raises(ValueError) as caught:
        build(kind, path, **settings)
    return str(caught.value)


def test_words_and_prompt_names_are_in_the_order_of_the_labels():
    descriptions, names, info = imagenet_words(), imagenet_prompt_names(), ImageNetInfo()
    assert len(descriptions) == len(set(descriptions)) == len(names) == 1000
    for label in (0, 1, 8, 207, 282, 340, 717, 817, 963, 999):
        assert descriptions[label].split(",")[0].lower().split()[0] in info.index_to_description(label).lower()
    assert (names[0], names[207], names[340], names[999]) == ("tench", "Golden Retriever", "zebra", "toilet paper")
    assert descriptions[340] == "zebra"
    doubled = {
        name: [label for label in range(1000) if names[label] == name] for name in names if names.count(name) > 1
    }
    assert doubled == {"missile": [657, 744], "sunglasses": [836, 837]}  # so published; see the docstring


def test_validation_set_in_synset_folders(val, caplog):
    dataset = build("imagenet", val)
    assert len(dataset) == 1001
    assert dataset.labels == [0, *range(1000)]
    assert dataset[1001 - 1].label == 999
    assert dataset[0].path == str(val / SYNSETS[0] / val_name(1))
    assert dataset.classes[1] == "goldfish, Carassius auratus"
    assert dataset.prompt_names == list(imagenet_prompt_names())
    assert dataset.class_columns is None
    assert caplog.messages == ["imagenet: 1,001 images, the published set has 50,000"]


def test_a_missing_and_an_unknown_class_are_named(val):
    assert "imagenet0: holds folder val, not of this data set; found val/; exp" in complaint("imagenet", val.parent)
    (val / "n01440764").rename(val / "n99999999")
    message = complaint("imagenet", val)
    assert message.startswith(f"{val}: holds folder n99999999, not of this data set; found as n01443537/, ")
    assert message.endswith("; expected " + LAYOUTS["imagenet"] + " (see docs/evaluation.md)")
    (val / "n99999999").rename(val.parent / "tench")
    assert "1 of 1000 folders are missing, n01440764" in complaint("imagenet", val)
    (val / "n01440764").mkdir()
    assert complaint("imagenet", val).startswith(f"{val}/n01440764: holds no image")
    (val / "n01440764").rmdir()
    (val.parent / "tench").rename(val / "n01440764")


LABELS = {number: SYNSETS[1000 - number] for number in range(1, 1001)}  # of the flat copy


def write_labels(folder, name):
    folder.mkdir(parents=True, exist_ok=True)
    if name.endswith(".csv"):  # Kaggle's, in no order, with boxes after the synset
        rows = [f"{val_name(number)[:-5]},{synset} 1 2 3 4" for number, synset in reversed(LABELS.items())]
        text = "\n".join(["ImageId,PredictionString", *rows])
    elif name == "val.txt":  # Caffe's
        text = "\n".join(f"{val_name(number)} {1000 - number}" for number in LABELS)
    else:
        text = "\n".join(LABELS.values())
    (folder / name).write_text(text + "\n")
    return folder / name


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("imagenet_2012_validation_synset_labels.txt", "inside"),
        ("synset_labels.txt", "beside"),
        ("LOC_val_solution.csv", "inside"),
        ("val.txt", "given"),
    ],
)
def test_a_flat_validation_set_with_each_kind_of_labels(flat, tmp_path, name, where):
    file = write_labels({"inside": flat, "beside": flat.parent, "given": tmp_path}[where], name)
    dataset = build("imagenet", flat, labels_file=str(file) if where == "given" else None)
    file.unlink()
    assert dataset.labels == list(range(999, -1, -1))
    assert dataset[0].path == str(flat / val_name(1))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("n01440764\nn00000000\n", "line 2: must be a synset as n01440764, or .*; got 'n00000000'"),
        ("n01440764\n7\n", "line 2: must be a synset"),
        ("n01440764\n", "has no label for 999 images, as ILSVRC2012_val_00000002.JPEG"),
        (f"{val_name(1)} 1000\n", "line 1: must be .* a label 0..999"),
        (f"{val_name(1)} -1\n", "line 1: must be"),
        ("cat.jpg 3\n", "line 1: must be .* the name of a validation image"),
        (f"{val_name(1)} 1\n{val_name(1)} 2\n", "line 2: must be .* each image once"),
        ("ImageId,PredictionString\nILSVRC2012_val_00000001\n", "line 2: must be"),
    ],
)
def test_labels_that_do_not_fit_are_named(flat, tmp_path, text, message):
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(ValueError, match=rf"labels_file .*a.txt:? {message}"):
        build("imagenet", flat, labels_file=str(tmp_path / "a.txt"))


def test_a_flat_set_that_is_incomplete_is_explained(flat, val, tmp_path):
    message = complaint("imagenet", flat)
    assert "set labels_file, or put one of imagenet_2012_validation_synset_labels.txt" in message
    assert "or all images in one folder, with a file of labels" in message
    assert "gone.txt: cannot be read" in complaint("imagenet", flat, labels_file=str(tmp_path / "gone.txt"))
    assert "are the labels; leave it out" in complaint("imagenet", val, labels_file="x.txt")
    (tmp_path / "one.txt").write_text("\n".join([SYNSETS[0]] * 1000))
    message = complaint("imagenet", flat, labels_file=str(tmp_path / "one.txt"))
    assert "999 classes have no image, as n01443537" in message
    with pytest.raises(ValueError, match="labels_file is for imagenet and imagenet_real, and type is 'imagenet_v2'"):
        SourceConfig("imagenet_v2", "x", labels_file="y")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("stray/labels.txt", "holds folder stray, and only images may be there"),
        ("cat.jpg", "has no label for 1 images, as cat.jpg"),
        ("notes.txt", "holds file notes.txt, no image"),
    ],
)
def test_what_else_lies_among_the_flat_images_is_named(flat, tmp_path, name, message):
    """The folder is still a flat one: its labels_file is right, and the stray one is to be moved."""
    (flat / name).parent.mkdir(exist_ok=True)
    (flat / name).touch()
    assert message in complaint("imagenet", flat, labels_file=str(write_labels(tmp_path, "val.txt")))
    (flat / name).unlink()
    if "/" in name:
        (flat / name).parent.rmdir()


def test_real_has_several_labels_and_leaves_images_out(val, flat, caplog):
    """timm's copy of ReaL starts [], [970, 795], [230, 231], [809]."""
    dataset = build("imagenet_real", flat)
    assert dataset.names[:3] == [val_name(2), val_name(3), val_name(4)]
    assert dataset.label_sets[:3] == [(970, 795), (230, 231), (809,)]
    assert dataset.labels[:3] == [970, 230, 809]
    left_out = dataset.left_out["images without a label in ReaL"]
    assert len(dataset) + left_out == 1000
    assert left_out > 0
    in_folders = build("imagenet_real", val)
    by_name = dict(zip([name.split("/")[1] for name in in_folders.names], in_folders.label_sets))
    by_name.pop(val_name(1001), None)
    assert by_name == dict(zip(dataset.names, dataset.label_sets))
    assert "the published set has 46,837" in caplog.text


def test_real_labels_of_the_user(flat, tmp_path):
    file = tmp_path / "real.json"
    file.write_text(json.dumps([[5, 7], [], [3]] + [[]] * 997))
    dataset = build("imagenet_real", flat, labels_file=str(file))
    assert dataset.label_sets == [(5, 7), (3,)]
    assert dataset.left_out == {"images without a label in ReaL": 998}
    for content, message in [
        ([[5, 1000]] * 1000, r"entry 1 must be a list of labels 0..999, got \[5, 1000\]"),
        ([5] * 1000, "entry 1 must be a list"),
        ([[]] * 1000, "none of the 1000 images has a label"),
        ([[1]] * 10, "ILSVRC2012_val_00000011.JPEG: ReaL knows images by .* to 00000010"),
        ({}, "must be a JSON list"),
    ]:
        file.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=message):
            build("imagenet_real", flat, labels_file=str(file))
    file.write_text("[")
    assert "not valid JSON" in complaint("imagenet_real", flat, labels_file=str(file))


def test_v2_folders_are_numbers(tmp_path):
    root = make_tree(tmp_path / "v2", [str(label) for label in range(1000)])
    dataset = build("imagenet_v2", root)
    assert dataset.labels == list(range(1000))
    assert [dataset.names[label] for label in (2, 10, 999)] == ["2/1.jpg", "10/1.jpg", "999/1.jpg"]
    assert dataset.classes[2] == imagenet_words()[2]
    (root / "1000").mkdir()
    assert "v2: holds folder 1000, not of this data set" in complaint("imagenet_v2", root)


@pytest.mark.parametrize(("kind", "first"), [("imagenet_a", 6), ("imagenet_r", 1)])
def test_subsets_have_200_classes_of_the_1000(tmp_path, kind, first):
    synsets = [SYNSETS[column] for column in subset_columns(kind)]
    root = make_tree(tmp_path / kind, synsets)
    (root / "README.txt").touch()  # comes with both downloads
    dataset = build(kind, root)
    assert dataset.labels == list(range(200))
    assert dataset.class_columns[0] == [first]
    for label in (0, 57, 199):
        (column,) = dataset.class_columns[label]
        assert dataset.names[label] == f"{SYNSETS[column]}/1.jpg"
        assert dataset.classes[label] == imagenet_words()[column]
        assert dataset.prompt_names[label] == imagenet_prompt_names()[column]
    assert len(set(dataset.prompt_names)) == 200
    make_tree(root, [SYNSETS[0]])
    assert f"{kind}: holds folder {SYNSETS[0]}, not of this data set" in complaint(kind, root)


def subset_columns(kind):
    synsets = pkgutil.get_data("timm.data", f"_info/{kind}_synsets.txt").decode().split()
    return [SYNSETS.index(synset) for synset in synsets]


def test_sketch_has_all_classes(tmp_path):
    root = make_tree(tmp_path / "sketch", SYNSETS, "sketch_1.JPEG")
    assert build("imagenet_sketch", root).labels == list(range(1000))
    (root / SYNSETS[3]).rename(tmp_path / "gone")
    assert f"1 of 1000 folders are missing, {SYNSETS[3]}" in complaint("imagenet_sketch", root)
