import json
import shutil

import numpy as np
import pytest
from PIL import Image

from vmoe.data import ImageDataset, Sample, SourceConfig, build_dataset
from vmoe.data.fingerprint import BYTES_OF_A_FILE, Fingerprint
from vmoe.data.sources import emoji as emoji_module
from vmoe.data.sources.torchvision import TorchvisionDataset

from .conftest import Images


@pytest.fixture
def folder(tmp_path):
    """FOLDER/tree with two classes, pairs.csv and pairs/ of the same images, and Karpathy's file of them."""
    random = np.random.default_rng(0)
    root = tmp_path / "FOLDER"
    for name in ("tree/cat/1.png", "tree/cat/2.png", "tree/dog/1.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (60, 60, 3), dtype=np.uint8)).save(root / name)
    shutil.copytree(root / "tree", root / "pairs")
    rows = ["image,caption", "tree/cat/1.png,a cat", "tree/cat/1.png,one cat", "tree/dog/1.png,a dog"]
    (root / "pairs.csv").write_text("\n".join(rows))
    for image in (root / "pairs").rglob("*.png"):
        image.with_suffix(".txt").write_text(f"caption of {image.parent.name} {image.stem}")
    entry = {"filename": "1.png", "filepath": "tree/cat", "split": "test", "sentences": [{"raw": "a"}, {"raw": "b"}]}
    (root / "karpathy.json").write_text(json.dumps({"images": [entry]}))
    return root


SOURCES = {
    "image_folder": {"type": "image_folder", "path": "tree"},
    "pairs file": {"type": "pairs", "path": "pairs.csv"},
    "pairs folder": {"type": "pairs", "path": "pairs"},
    "karpathy": {"type": "karpathy", "path": "karpathy.json", "split": "test"},
}


def fingerprint(folder, kind):
    source = SOURCES[kind]
    return build_dataset(SourceConfig(**source | {"path": str(folder / source["path"])})).fingerprint()


@pytest.mark.parametrize("kind", SOURCES)
def test_a_copy_elsewhere_has_the_same_fingerprint(folder, tmp_path, kind):
    found = fingerprint(folder, kind)
    assert len(found) == 64
    assert int(found, 16)
    shutil.copytree(folder, tmp_path / "elsewhere" / "copy")
    assert fingerprint(tmp_path / "elsewhere" / "copy", kind) == found


def test_absolute_paths_count_from_the_root_on(folder, tmp_path):
    """Such a file is usually made again in each folder."""
    found = fingerprint(folder, "pairs file")
    other = shutil.copytree(folder, tmp_path / "copy")
    for root in (folder, other):
        rows = (root / "pairs.csv").read_text().replace("tree/", f"{root}/tree/../tree/")
        (root / "pairs.csv").write_text(rows)
        dataset = build_dataset(SourceConfig("pairs", str(root / "pairs.csv")))
        assert dataset.image_ids == ["tree/cat/1.png", "tree/cat/1.png", "tree/dog/1.png"]
        assert dataset.file_of(2)[1].samefile(root / "tree/dog/1.png")
        assert dataset.fingerprint() == found
    anywhere = build_dataset(SourceConfig("pairs", str(other / "pairs.csv"), image_root="/"))
    assert anywhere.image_ids[0] == f"{other}/tree/cat/1.png"[1:]


@pytest.mark.parametrize("kind", SOURCES)
def test_one_changed_byte_of_an_image_changes_it(folder, kind):
    found = fingerprint(folder, kind)
    for offset in (100, -100):
        for name in ("tree", "pairs"):
            image = folder / name / "cat" / "1.png"
            content = bytearray(image.read_bytes())
            content[offset] ^= 1
            image.write_bytes(content)
        assert fingerprint(folder, kind) != found
        found = fingerprint(folder, kind)


def test_kinds_of_data_differ(folder):
    assert len({fingerprint(folder, kind) for kind in SOURCES}) == len(SOURCES)


def test_names_labels_captions_and_order_matter(folder):
    lines = (folder / "pairs.csv").read_text().splitlines()
    found = {fingerprint(folder, "pairs file")}
    for changed in ([*lines[:1], *lines[:0:-1]], [*lines[:3], "tree/dog/1.png,a wolf"], lines[:3]):
        (folder / "pairs.csv").write_text("\n".join(changed))
        found.add(fingerprint(folder, "pairs file"))
    found.add(fingerprint(folder, "image_folder"))
    for old, new in (("cat/2.png", "cat/3.png"), ("cat/3.png", "dog/3.png"), ("cat", "Cat")):
        (folder / "tree" / old).rename(folder / "tree" / new)
        found.add(fingerprint(folder, "image_folder"))
    assert len(found) == 8


def test_a_missing_image_is_part_of_it(folder):
    found = fingerprint(folder, "pairs file")
    (folder / "tree" / "cat" / "1.png").unlink()
    assert fingerprint(folder, "pairs file") != found


def test_class_names_and_other_attributes_matter():
    found = set()
    attributes = [
        {},
        {"classes": ["odd", "even"]},
        {"prompt_names": ["an even number", "an odd number"]},
        {"class_columns": [[0], [1, 2]]},
        {"label_sets": [(0,), (1,), (0, 1)]},
        {"conditions": ["fog/1"], "condition_of": [0, 0, 0]},
        {"image_ids": ["a", "a", "b"]},
        {"left_out": {"images": 3}},
        {"labels": [0, 1, 0]},
    ]
    for change in attributes:
        images = Images(3)
        for name, value in change.items():
            setattr(images, name, value)
        found.add(images.fingerprint())
    assert len(found) == len(attributes)


def test_without_files_the_pixels_tell(monkeypatch):
    first, again, more = (Images(size).fingerprint() for size in (3, 3, 4))
    assert first == again != more
    assert Images(3, bad=[1]).fingerprint() != first  # an unreadable image is no reason to fail

    class Brighter(Images):
        def __getitem__(self, index):
            sample = super().__getitem__(index)
            if index == 2:
                sample.image.putpixel((0, 0), (1, 2, 3))
            return sample

    assert Brighter(3).fingerprint() != first
    images = Images(3)
    images.fingerprint()
    monkeypatch.setattr(Images, "__getitem__", lambda *_: pytest.fail("read again"))
    assert images.fingerprint() == first  # made once


def test_torchvision_by_its_pixels(tmp_path):
    from torchvision.datasets import FakeData

    class Fake(TorchvisionDataset):
        def __init__(self, seed):
            self.dataset = FakeData(4, (3, 8, 8), num_classes=3, random_offset=seed)
            self.name, self.classes = "Fake", ["a", "b", "c"]

    assert Fake(0).fingerprint() == Fake(0).fingerprint() != Fake(1).fingerprint()


@pytest.mark.parametrize("kind", ["emoji", "emoji_groups"])
def test_emoji_splits_and_sizes_differ(kind, monkeypatch):
    random = np.random.default_rng(0).integers(0, 256, (3953, 20, 20, 3), dtype=np.uint8)  # quicker than drawing
    monkeypatch.setattr(emoji_module, "render_emoji", lambda size: random[:, :size, :size])
    splits = {"emoji": ("held_out", "train"), "emoji_groups": ("val", "train")}[kind]
    found = [build_dataset(SourceConfig(kind, split=split, image_size=16)).fingerprint() for split in splits]
    assert found[0] != found[1]
    assert build_dataset(SourceConfig(kind, split=splits[0], image_size=16)).fingerprint() == found[0]
    assert build_dataset(SourceConfig(kind, split=splits[0], image_size=17)).fingerprint() != found[0]


def test_it_stays_what_it_is_from_one_version_to_the_next():
    """Features are kept under it, and results name it: a change would make the same data look like other data."""

    class Fixed(ImageDataset):
        classes = ("white", "black")
        labels = (0, 1)

        def __len__(self):
            return 2

        def __getitem__(self, index):
            return Sample(Image.new("RGB", (2, 2), self.classes[index]), index, None, str(index))

    assert Fixed().fingerprint() == "18276ddc3dd003ec3575fbff090dcef334b79d7bdcada6a24fe636ea4095b5be"


def test_the_middle_of_a_large_file_is_not_read(tmp_path):
    """Documented: the size and both ends tell files apart, so that 50,000 of them take seconds."""
    found = []
    for middle in (b"a", b"b", b"bb"):
        (tmp_path / "file").write_bytes(b"0" * BYTES_OF_A_FILE + middle + b"1" * BYTES_OF_A_FILE)
        facts = Fingerprint()
        facts.add_file("file", tmp_path / "file")
        found.append(facts.hexdigest())
    assert found[0] == found[1] != found[2]


def test_facts_do_not_run_together():
    def of(*facts):
        found = Fingerprint()
        for fact in facts:
            found.add("name", fact)
        return found.hexdigest()

    assert len({of("ab", "c"), of("a", "bc"), of("abc"), of(["ab", "c"]), of("ab", "c", None)}) == 5
    assert of([np.int64(3), 0.5]) == of([3, np.float64(0.5)])
