import inspect
import json
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision import datasets

from vmoe.data.sources.imagenet import imagenet_synsets, imagenet_words
from vmoe.evaluation.class_names import FOLDER, class_columns, is_published, known_sets, prompt_names, published_set
from vmoe.utils.config import ConfigError

DOCS = Path(__file__).parents[2] / "docs" / "evaluation.md"
TABLE = DOCS.read_text(encoding="utf-8").partition("### Names and templates")[2].partition("ImageNet's names are")[0]
SIZES = {name: int(size.replace(",", "")) for name, size in re.findall(r"\| `(\w+)` \| ([\d,]+)", TABLE)}


def as_folder(name: str) -> str:
    return name.replace(" ", "_")


@pytest.mark.parametrize("name", known_sets())
def test_every_set_is_complete(name):
    published = published_set(name)
    assert len(published.names) == len(published.labels) == SIZES[name]
    assert all(text == " ".join(text.split()) for text in published.names)
    assert all(template.count("{}") == 1 and "{c}" not in template for template in published.templates)
    assert len(set(published.templates)) == len(published.templates) > 0
    repeated = {text: count for text, count in Counter(published.names).items() if count > 1}
    assert repeated == ({"missile": 2, "sunglasses": 2} if name == "imagenet" else {})
    assert published.source


def test_the_docs_list_every_set():
    assert sorted(SIZES) == known_sets()


@pytest.mark.parametrize("name", ["cifar100", "food101", "dtd", "resisc45", "stl10", "cifar10"])
def test_order_of_sets_that_torchvision_sorts_by_folder(name):
    folders = [as_folder(one) for one in prompt_names(name)]
    assert folders == sorted(folders)


@pytest.mark.parametrize("name", ["eurosat", "caltech101", "country211", "ucf101", "fgvc_aircraft", "sun397"])
def test_order_of_labels_that_torchvision_sorts(name):
    labels = [one.replace(" ", "") if name == "ucf101" else one for one in published_set(name).labels]
    assert labels == sorted(labels)


def test_pets_are_numbered_without_regard_to_case():
    """torchvision's labels are those of the annotation files, which mix cats and dogs."""
    names = prompt_names("pets")
    assert names == sorted(names, key=str.lower)
    assert names[:2] == ["Abyssinian", "american bulldog"]


def test_flowers_are_torchvisions_own():
    assert published_set("flowers102").labels == tuple(datasets.Flowers102.classes)
    different = [
        names
        for names in zip(datasets.Flowers102.classes, prompt_names("flowers102"))
        if re.sub(r"\W", "", names[0]) != re.sub(r"\W", "", names[1])
    ]
    assert different == [("pink-yellow dahlia?", "pink and yellow dahlia"), ("ball moss", "air plant")]


def test_other_orders_that_torchvision_fixes_in_its_source():
    assert published_set("mnist").labels == tuple(datasets.MNIST.classes)
    assert '["negative", "positive"]' in inspect.getsource(datasets.RenderedSST2)
    assert prompt_names("rendered_sst2") == ["negative", "positive"]
    assert prompt_names("svhn") == ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def test_imagenet_is_open_clips():
    import open_clip

    assert prompt_names("imagenet") == list(open_clip.IMAGENET_CLASSNAMES)
    assert [template.replace("{}", "cat") for template in published_set("imagenet").templates] == [
        template("cat") for template in open_clip.OPENAI_IMAGENET_TEMPLATES
    ]


def test_names_follow_the_order_of_the_data():
    cats_first = ["Abyssinian", "Bengal", "Birman"]
    labels = sorted(name.title().replace(" ", "_") for name in prompt_names("pets"))
    labels = cats_first + [label for label in labels if label not in cats_first]
    assert prompt_names("pets", labels)[:4] == ["Abyssinian", "Bengal", "Birman", "american bulldog"]
    assert prompt_names("eurosat", ["SeaLake", *published_set("eurosat").labels[:-1]])[0] == "lake or sea"
    assert prompt_names("sun397", published_set("sun397").labels)[:1] == ["abbey"]
    # names that say nothing of the set: the published order
    assert prompt_names("rendered_sst2", ["0", "1"]) == ["negative", "positive"]


def test_names_that_do_not_fit_the_data_are_errors():
    with pytest.raises(ValueError, match="'cifar10' are 10, and the data has 2 classes"):
        prompt_names("cifar10", ["cat", "dog"])
    mixed = ["truck", "b", "c", "d", "e", "f", "g", "h", "i", "j"]
    with pytest.raises(ValueError, match="of which 'b', 'c', 'd', 'e', 'f', ... .9 in all. are none of the set's"):
        prompt_names("cifar10", mixed)
    with pytest.raises(ValueError, match="of which two are the same, and the set's 'truck' are left"):
        prompt_names("cifar10", [*prompt_names("cifar10")[:-1], "Airplane"])


@pytest.mark.parametrize(
    ("name", "folders"),
    [
        ("kitti_distance", ["above_20", "below_20", "below_8", "none"]),
        ("hateful_memes", ["bad", "good"]),
        ("clevr_counts", [f"count_{number}" for number in (10, 3, 4, 5, 6, 7, 8, 9)]),
        ("clevr_counts", list("01234567")),
        ("mnist", sorted(f"digit {number}" for number in range(10))),
        ("mnist", [f"{number:02}" for number in range(1, 11)]),
        ("cifar10", [f"{letter}" for letter in "abcdefghij"]),
        ("cifar10", [f"{number:02}" for number in range(2, 12)]),
    ],
)
def test_folders_that_are_not_the_sets_are_refused(name, folders):
    """The published order would give metrics that look plausible and are wrong."""
    with pytest.raises(ValueError, match=f"'{name}' do not fit the classes of the data.*give the names as a file"):
        prompt_names(name, folders)


def test_names_are_found_by_words_numbers_and_aliases():
    words = sorted(["three", "four", "five", "six", "seven", "eight", "nine", "ten"])
    assert prompt_names("clevr_counts", words) == ["8", "5", "4", "9", "7", "6", "10", "3"]
    assert prompt_names("clevr_counts", [f"{number:02}" for number in range(3, 11)]) == [*list("3456789"), "10"]
    assert prompt_names("mnist", sorted(prompt_names("svhn"))) == list("8549176320")
    assert prompt_names("svhn", sorted(map(str, range(1, 11))))[:3] == ["one", "zero", "two"]  # its own labels
    assert prompt_names("hateful_memes", ["hateful", "not_hateful"]) == ["hatespeech meme", "meme"]
    assert prompt_names("pcam", ["Tumor", "normal"])[1] == "lymph node"
    assert prompt_names("gtsrb", sorted(map(str, range(43))))[2] == prompt_names("gtsrb")[10]


@pytest.mark.parametrize("name", [name for name in known_sets() if name != "imagenet"])
@given(random=st.randoms(use_true_random=False))
@settings(max_examples=5, deadline=None)
def test_any_order_of_a_sets_labels_gets_the_names_of_that_order(name, random):
    published = published_set(name)
    order = random.sample(range(len(published.names)), len(published.names))
    right = [published.names[label] for label in order]
    assert prompt_names(name, [published.labels[label].upper() for label in order]) == right
    assert prompt_names(name, [as_folder(published.names[label]) for label in order]) == right


def test_imagenets_names_follow_the_classes():
    names = prompt_names("imagenet")
    assert prompt_names("imagenet", names) == names
    assert prompt_names("imagenet", sorted(names)) == sorted(names)  # with both "missile" and both "sunglasses"
    order = [817, 0, 999, *(label for label in range(1000) if label not in (817, 0, 999))]
    for known in (imagenet_synsets(), imagenet_words()):
        assert prompt_names("imagenet", known) == names
        assert prompt_names("imagenet", [known[label] for label in order]) == [names[label] for label in order]


def test_any_other_thousand_classes_are_refused_as_imagenet():
    """A V2 tree read as image_folder has the folders 0, 1, 10, 100, ...: the published order would be wrong."""
    with pytest.raises(ValueError, match="'0', '1', .* are none of .*imagenet_v2.*give the names as a file"):
        prompt_names("imagenet", sorted(map(str, range(1000))))
    words = [*imagenet_words()[:-1], "a gnome"]
    with pytest.raises(ValueError, match="'a gnome' are none of ImageNet's synsets"):
        prompt_names("imagenet", words)
    with pytest.raises(ValueError, match="the classes of the data repeat some or mix"):
        prompt_names("imagenet", [imagenet_synsets()[0], *imagenet_synsets()[:-1]])
    with pytest.raises(ValueError, match="or mix ImageNet's synsets"):
        prompt_names("imagenet", [imagenet_words()[0], *imagenet_synsets()[1:]])


def test_folders_that_are_numbers_are_labels():
    names = prompt_names("flowers102")
    numbers = sorted(map(str, range(102)))
    assert numbers[:3] == ["0", "1", "10"]
    assert prompt_names("flowers102", numbers) == [names[int(number)] for number in numbers]
    assert prompt_names("flowers102", [f"{number:03}" for number in range(1, 103)]) == names


def test_folders_that_count_from_1_are_labels_with_a_warning(caplog):
    names = prompt_names("flowers102")
    assert prompt_names("flowers102", sorted(map(str, range(1, 103))))[:4] == [names[i] for i in (0, 9, 99, 100)]
    assert "count from 1; with class names 'flowers102' '1' is 'pink primrose', '10' is 'globe thistle'" in caplog.text


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match="'cifar11'; known are birdsnap, .*voc2007"):
        prompt_names("cifar11")


def test_only_complete_lists_count_as_published():
    assert is_published(prompt_names("imagenet"))
    assert not is_published(prompt_names("imagenet")[:-1])
    assert not is_published(["missile", "missile"])


def test_files_hold_what_the_folder_says():
    for file in FOLDER.glob("*.json"):
        content = json.loads(file.read_text(encoding="utf-8"))
        assert set(content) <= {"source", "names", "labels", "aliases", "templates"}
        assert set(content.get("aliases", ())) <= set(content["names"])


def test_outputs_of_imagenet_are_found_by_synsets_before_names():
    words = list(imagenet_words())
    data = SimpleNamespace(classes=["crane", "tench"], synsets=["n03126707", "n01440764"], class_columns=None)
    for names in (None, words, list(imagenet_synsets())):
        assert class_columns("m", 1000, names, "d", data) == [[517], [0]]  # the machine; the bird is 134
    named = SimpleNamespace(classes=["n01443537", "tench, Tinca tinca"], synsets=None, class_columns=None)
    assert class_columns("m", 1000, None, "d", named) == [[1], [0]]
    named.classes[0] = "crane"  # one of two
    with pytest.raises(ConfigError, match="^m has 1000 classes and d 2; they must agree$"):
        class_columns("m", 1000, None, "d", named)


def test_a_thousand_classes_of_its_own_are_not_imagenets():
    own = [f"bird {number}" for number in range(1000)]
    tiny = SimpleNamespace(classes=["crane"], synsets=["n03126707"], class_columns=None)
    with pytest.raises(ConfigError, match="m has 1000 classes and d 1; they must agree"):
        class_columns("m", 1000, own, "d", tiny)
    tiny.class_columns = [[517]]
    with pytest.raises(ConfigError, match="class 0 is 'bird 0' in m and 'tench, Tinca tinca' in ImageNet-1k, whose"):
        class_columns("m", 1000, own, "d", tiny)
    assert class_columns("m", 1, ["crane"], "d", tiny) is None  # the data's own classes
    with pytest.raises(ConfigError, match="m has 1 classes and ImageNet-1k, whose outputs d needs, 1000"):
        class_columns("m", 1, None, "d", tiny)
