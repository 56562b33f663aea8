"""A made-up Tiny-ImageNet: the layout of the download, three classes, two training and two validation images each."""

import shutil

import pytest
from PIL import Image
from timm.data import ImageNetInfo

from vmoe.data import SourceConfig, build_dataset
from vmoe.data.sources.imagenet import imagenet_prompt_names

SYNSETS = ["n02124075", "n01443537", "n04067472"]  # as in wnids.txt, which is not sorted
COLOURS = ["red", "green", "blue"]


def make_tiny(root):
    """val_0 to val_5 are of classes 0, 1, 2, 0, 1, 2 of SYNSETS."""
    lines = []
    for number, (synset, colour) in enumerate(zip(SYNSETS, COLOURS)):
        folder = root / "train" / synset / "images"
        folder.mkdir(parents=True)
        (folder.parent / f"{synset}_boxes.txt").write_text(f"{synset}_0.JPEG\t0\t10\t63\t58\n")
        (root / "val" / "images").mkdir(parents=True, exist_ok=True)
        for copy in range(2):
            Image.new("RGB", (64, 64), colour).save(folder / f"{synset}_{copy}.JPEG")
            name = f"val_{number + 3 * copy}.JPEG"
            Image.new("RGB", (64, 64), colour).save(root / "val" / "images" / name)
            lines.append(f"{name}\t{synset}\t0\t32\t44\t62\n")
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    (root / "wnids.txt").write_text("\n".join(SYNSETS))
    info = ImageNetInfo("imagenet-1k")
    words = [f"{synset}\t{info.label_name_to_description(synset)}\n" for synset in SYNSETS]
    (root / "words.txt").write_text("n00001740\tentity\n" + "".join(words))
    return root


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("data") / "tiny-imagenet-200")


def build(root, split="val"):
    return build_dataset(SourceConfig("tiny_imagenet", str(root), split))


def test_labels_are_the_sorted_synsets_and_names_their_words(tiny):
    train, val = build(tiny, "train"), build(tiny)
    assert train.classes == val.classes == ["goldfish, Carassius auratus", "Egyptian cat", "reel"]
    assert train.labels == [0, 0, 1, 1, 2, 2]
    assert train.names[2] == "train/n02124075/images/n02124075_0.JPEG"
    assert val.labels == [1, 0, 2, 1, 0, 2]
    for dataset in (train, val):
        for index in range(6):
            image, label, caption, path = dataset[index]
            colour = Image.new("RGB", (1, 1), COLOURS[SYNSETS.index(sorted(SYNSETS)[label])])
            differences = [abs(a - b) for a, b in zip(image.getpixel((5, 5)), colour.getpixel((0, 0)))]
            assert max(differences) < 3
            assert caption is None
            assert path == str(tiny / dataset.names[index])


def test_prompts_have_the_names_of_imagenet(tiny):
    synsets = ImageNetInfo("imagenet-1k").label_names()
    wanted = [imagenet_prompt_names()[synsets.index(synset)] for synset in sorted(SYNSETS)]
    assert build(tiny).prompt_names == wanted == ["goldfish", "Egyptian Mau", "fishing casting reel"]


def test_classes_of_other_synsets_are_called_by_their_words_and_unique(tmp_path):
    root = make_tiny(tmp_path)
    for file in ("wnids.txt", "words.txt", "val/val_annotations.txt"):
        (root / file).write_text((root / file).read_text().replace("n02124075", "n00000001"))
    (root / "train" / "n02124075").rename(root / "train" / "n00000001")
    (root / "train" / "n00000001" / "n02124075_boxes.txt").unlink()
    (root / "words.txt").write_text("n01443537\tcrane\nn04067472\tcrane\nn00000001\ttoy, plaything\n")
    dataset = build(root)
    assert dataset.classes == ["toy, plaything", "crane (n01443537)", "crane (n04067472)"]
    assert dataset.prompt_names is None


def test_a_different_number_of_images_is_pointed_out(tiny, caplog):
    build(tiny)
    assert "split val: 6 images, the published set has 10,000" in caplog.text


ANNOTATIONS = "val/val_annotations.txt"


def edit(file, change):
    file.write_text(change(file.read_text()))


@pytest.mark.parametrize(
    ("split", "damage", "message"),
    [
        ("val", lambda root: (root / ANNOTATIONS).unlink(), "val_annotations.txt: no such file; take the file of"),
        ("train", lambda root: (root / "wnids.txt").unlink(), "wnids.txt: no such file"),
        ("train", lambda root: (root / "words.txt").unlink(), "words.txt: no such file"),
        ("train", lambda root: shutil.rmtree(root / "train"), "has no folder train; found val/"),
        ("val", lambda root: shutil.rmtree(root / "val" / "images"), "has no folder val/images"),
        ("train", lambda root: shutil.rmtree(root / "train" / SYNSETS[1]), f"1 of 3 folders are missing, {SYNSETS[1]}"),
        ("train", lambda root: (root / "train" / "n09999999").mkdir(), "holds folder n09999999, not of this data set"),
        ("train", lambda root: shutil.rmtree(root / "train" / SYNSETS[1] / "images"), "holds no folders"),
        ("train", lambda root: (root / "train" / SYNSETS[1] / "images" / "notes.txt").touch(), "holds file notes.txt"),
        (
            "val",
            lambda root: (root / "val" / "images" / "val_2.JPEG").unlink(),
            "val_annotations.txt lists an image that is not there, as val_2.JPEG",
        ),
        (
            "val",
            lambda root: (root / "val" / "images" / "val_2.JPEG").rename(root / "val" / "images" / "val_8.JPEG"),
            "lists an image that is not there, as val_2.JPEG",
        ),
        (
            "val",
            lambda root: edit(root / ANNOTATIONS, lambda text: text.split("\n", 1)[1]),
            "holds an image that is not in val_annotations.txt, as val_0.JPEG",
        ),
        (
            "val",
            lambda root: edit(root / ANNOTATIONS, lambda text: text.replace("n01443537", "n09999999", 1)),
            "line 3: val_1.JPEG is of class n09999999, none of the 3 classes of wnids.txt",
        ),
        (
            "val",
            lambda root: edit(root / ANNOTATIONS, lambda text: text.replace("n01443537", "n02124075")),
            "1 classes of wnids.txt have no image, as n01443537",
        ),
        (
            "val",
            lambda root: edit(root / ANNOTATIONS, lambda text: text.replace("val_3", "val_0")),
            "line 2: must be the name of an image, a tab and its synset, each image once, got 'val_0.JPEG",
        ),
        (
            "val",
            lambda root: edit(root / ANNOTATIONS, lambda text: text.replace("\t", ",")),
            "line 1: must be the name",
        ),
        ("val", lambda root: edit(root / ANNOTATIONS, lambda text: f"../{text}"), "line 1: must be the name"),
        ("val", lambda root: edit(root / ANNOTATIONS, lambda text: text + "val_9.JPEG\n"), "line 7: must be the name"),
        ("val", lambda root: (root / ANNOTATIONS).write_text(""), "holds 6 images that are not in"),
        ("val", lambda root: (root / ANNOTATIONS).write_bytes(b"\xff"), "not UTF-8"),
        ("train", lambda root: edit(root / "wnids.txt", lambda text: text + "\ntabby"), "line 4: must be a synset"),
        ("train", lambda root: edit(root / "wnids.txt", lambda text: text + f"\n{SYNSETS[0]}"), "line 4: .* each once"),
        ("train", lambda root: (root / "wnids.txt").write_text("\n"), "wnids.txt: holds no synset"),
        ("train", lambda root: (root / "words.txt").write_text("n1\tx"), "has no words for 3 classes, as n01443537"),
        ("train", lambda root: (root / "words.txt").write_text(SYNSETS[0]), "line 1: must be a synset, a tab and"),
    ],
)
def test_damaged_data_are_one_sentence(tmp_path, split, damage, message):
    root = make_tiny(tmp_path / "tiny")
    damage(root)
    with pytest.raises(ValueError, match=message) as caught:
        build(root, split)
    assert "\n" not in str(caught.value)


def test_the_test_split_has_no_labels():
    with pytest.raises(ValueError, match="split of data source 'tiny_imagenet' must be one of train, val, got 'test'"):
        SourceConfig("tiny_imagenet", "somewhere", "test")
