"""Shards as WebDataset's writer makes them, read by index; exact positions; broken and hostile ones."""

import io
import json
import pickle
import struct
import tarfile
import zlib

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.data.conftest import PREPROCESS, tokenize
from tests.data.test_shards import write
from vmoe.data import (
    AugmentationConfig,
    BadSample,
    LoaderConfig,
    SourceConfig,
    build_dataset,
    build_transform,
    eval_loader,
    train_loader,
)
from vmoe.data.images import DataError
from vmoe.data.shards import cache_file
from vmoe.data.sources.webdataset import find_shards

TRANSFORM = build_transform(PREPROCESS, AugmentationConfig())


def read_shards(path, **settings):
    return build_dataset(SourceConfig("shards", str(path), **settings))


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("VMOE_CACHE", str(folder))
    return folder


def encoded_image(number, format="jpeg", size=(12, 10)):
    pixels = np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format)
    return file.getvalue()


def make_shards(folder, sizes=(7, 5, 9)):
    """Shards in img2dataset's layout, written by webdataset; sample n's caption ends in n and its class is n % 2."""
    folder.mkdir(parents=True, exist_ok=True)
    number = 0
    for shard, size in enumerate(sizes):
        with webdataset.TarWriter(str(folder / f"{shard:05}.tar")) as writer:
            for position in range(size):
                ending = ("jpg", "png", "webp", "jpeg")[number % 4]
                writer.write(
                    {
                        "__key__": f"{shard:05}{position:04}",
                        ending: encoded_image(number, "jpeg" if ending == "jpg" else ending),
                        "txt": f"image number {number}",
                        "json": {"caption": f"other number {number}", "title": f"title {number}"},
                        "cls": number % 2,
                    }
                )
                number += 1
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("shards"))


def test_samples_are_those_that_webdataset_reads(shards):
    dataset = build_dataset(SourceConfig("shards", str(shards)))
    names = [str(shards / f"{shard:05}.tar") for shard in range(3)]
    expected = list(webdataset.WebDataset(names, shardshuffle=False).decode("pil"))
    assert len(dataset) == len(expected) == 21
    for index, sample in enumerate(expected):
        image = next(sample[ending] for ending in ("jpg", "png", "webp", "jpeg") if ending in sample)
        assert np.array_equal(np.asarray(dataset[index].image), np.asarray(image))
        assert dataset[index].caption == sample["txt"] == dataset.captions[index]
        assert f"{sample['__key__']}." in dataset[index].path
    assert dataset.captions[-2:] == ["image number 19", "image number 20"]
    assert dataset.classes is None
    assert dataset[20].label is None


def test_captions_in_json_and_classes(shards, tmp_path):
    def captions(**keys):
        return build_dataset(SourceConfig("shards", str(shards), **keys)).captions[8]

    assert captions(caption_key="caption") == "other number 8"
    assert captions(caption_key="title") == "title 8"
    assert captions(caption_key="gone") == ""
    (tmp_path / "names.txt").write_text("even\nodd\n")
    dataset = build_dataset(SourceConfig("shards", str(shards), class_names=str(tmp_path / "names.txt")))
    assert dataset.classes == ["even", "odd"]
    assert [dataset[index].label for index in range(4)] == [0, 1, 0, 1]
    (tmp_path / "names.json").write_text('["even"]')
    dataset = build_dataset(SourceConfig("shards", str(shards), class_names=str(tmp_path / "names.json")))
    with pytest.raises(BadSample, match="label '1' is none of the 1 classes"):
        dataset[1]


def test_members_whose_key_holds_a_dot_are_counted_and_named(tmp_path, caplog):
    """As in WebDataset, img_1.5.jpg is the field "5.jpg" of the sample img_1, and no image."""
    names = ["img_1.jpg", "img_1.txt", "img_1.5.jpg", "img_1.5.txt", "a.b/img_2.PNG", "a.b/img_2.txt", "img_3.meta.npy"]
    content = {"jpg": encoded_image(0), "PNG": encoded_image(1, "png"), "txt": b"text", "npy": b"0"}
    for shard in ("0.tar", "1.tar"):
        write(tmp_path / shard, [(name, content[name.rpartition(".")[2]]) for name in names])
    expected = list(webdataset.WebDataset(str(tmp_path / "0.tar"), shardshuffle=False))
    assert {key for key in expected[0] if not key.startswith("__")} == {"5.jpg", "5.txt", "jpg", "txt"}
    for _ in range(2):  # the second time from the kept index
        dataset = build_dataset(SourceConfig("shards", str(tmp_path)))
        assert len(dataset) == 4
        assert "img_2.PNG" in dataset[3].path
        assert caplog.text.count("2 of 2 shards: 4 members such as ") == 1
        assert f"{tmp_path / '0.tar'}: img_1.5.jpg' are skipped, because a sample's name ends" in caplog.text
        caplog.clear()
    (tmp_path / "sizes.json").write_text('{"0.tar": 2, "1.tar": 2}')
    dataset = build_dataset(SourceConfig("shards", str(tmp_path)))
    assert [dataset[index].caption for index in (0, 2, 3, 2)] == ["text"] * 4
    assert caplog.text.count("0.tar: 2 members such as 'img_1.5.jpg' are skipped") == 1
    assert caplog.text.count("1.tar: 2 members such as 'img_1.5.jpg' are skipped") == 1
    (tmp_path / "sizes.json").write_text('{"0.tar": 3, "1.tar": 3}')
    with pytest.raises(DataError, match=r"holds 2 samples, but .*sizes.json says 3; 2 members such as 'img_1.5.jpg'"):
        build_dataset(SourceConfig("shards", str(tmp_path)))
    write(tmp_path / "2.tar", [(f"img_{number}.5.jpg", b"") for number in range(3)])
    with pytest.raises(DataError, match=r"2.tar: holds no sample .*; 3 members such as 'img_0.5.jpg' are skipped"):
        build_dataset(SourceConfig("shards", str(tmp_path / "2.tar")))


def test_patterns(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a/00008.tar", "a/00009.tar", "a/00010.tar", "b/x.tar", "b/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    first = ["a/00008.tar", "a/00009.tar", "a/00010.tar"]
    for pattern in ("a", "a/*.tar", "a/{00008..00010}.tar", "a/000{08,09,10}.tar", "a/0000{8,9}.tar::a/00010.tar"):
        assert find_shards(pattern) == first
    assert find_shards("{b,a}/*.tar") == [*first, "b/x.tar"]
    assert find_shards("b::a/{00009..00009}.tar") == ["b/x.tar", "a/00009.tar"]
    (tmp_path / "link.tar").symlink_to("b/x.tar")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "z.tar.gz").touch()
    for pattern, message in [
        ("c", "path 'c': this folder holds no .tar file"),
        ("a/{00008..00011}.tar", "there is no shard 'a/00011.tar'"),
        ("a/*.tgz", r"path 'a/\*.tgz': there is no shard 'a/\*.tgz'"),
        ("a::a/00008.tar", "names a/00008.tar and a/00008.tar, which are one shard"),
        ("{0..9999999}", "stands for more than"),
        ("a/00008.tar::./a/00008.tar", r"names \./a/00008.tar and a/00008.tar, which are one shard"),
        ("b::link.tar", "names link.tar and b/x.tar, which are one shard"),
        ("b::", "path '': there is no shard ''"),
        ("b\0*", r"there is no shard 'b\\\\x00\*'"),
    ]:
        with pytest.raises(DataError, match=message):
            find_shards(pattern)


def test_numbers_of_samples_from_beside_the_shards(tmp_path, cache):
    make_shards(tmp_path, (4, 3))
    (tmp_path / "00000_stats.json").write_text(json.dumps({"successes": 4, "count": 9}))
    (tmp_path / "sizes.json").write_text(json.dumps({"00001.tar": 2}))
    dataset = read_shards(tmp_path)
    assert len(dataset) == 6
    assert len(list((cache / "shards").iterdir())) == 1  # only the first was looked at
    loader = train_loader(dataset, TRANSFORM, None, LoaderConfig(batch_size=6, num_workers=1), 0)
    with pytest.raises(
        DataError, match=r"00001.tar: holds 3 samples, but .*sizes.json says 2; remove .*sizes.json"
    ) as caught:
        next(loader)
    assert "\n" not in str(caught.value)  # from a worker
    loader.close()
    for _ in range(2):
        with pytest.raises(DataError, match="holds 3 samples"):
            dataset[4]
    for text in ("{", "[]", '{"00001.tar": "3"}', '{"00001.tar": -1}', "[" * 100_000):
        (tmp_path / "sizes.json").write_text(text)
        with pytest.raises(DataError, match=r"sizes.json: .*; remove .*, and the shards are counted again"):
            read_shards(tmp_path)


def test_shards_that_hold_nothing_are_left_out(tmp_path, caplog):
    """img2dataset writes them where all downloads of a shard failed."""
    make_shards(tmp_path, (4, 3, 2))
    write(tmp_path / "00001.tar", [])
    for shard, successes in enumerate((4, 0, 2)):
        (tmp_path / f"{shard:05}_stats.json").write_text(json.dumps({"successes": successes}))
    dataset = build_dataset(SourceConfig("shards", str(tmp_path)))
    expected = [f"image number {number}" for number in (0, 1, 2, 3, 7, 8)]
    assert dataset.captions[:] == [dataset[index].caption for index in range(6)] == expected
    assert "1 of 3 shards are empty, as " in caplog.text
    assert "00001.tar, of which " in caplog.text
    assert "00001_stats.json says 0 samples; they are skipped" in caplog.text
    (tmp_path / "sizes.json").write_text('{"00000.tar": 0}')
    with pytest.raises(DataError, match=r"00000.tar: holds samples, but .*sizes.json says 0; remove .*sizes.json"):
        build_dataset(SourceConfig("shards", str(tmp_path)))
    with pytest.raises(DataError, match=r"1 of 1 shards are empty, as .*00001.tar.*; all downloads may have failed"):
        build_dataset(SourceConfig("shards", str(tmp_path / "00001.tar")))


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
@pytest.mark.parametrize("stem", ["日本語", "ünïcode?", "a" * 150, "é" * 90, "x" * 96])
def test_names_in_messages_are_whole(tmp_path, stem, format):
    members = [("0.jpg", encoded_image(0)), ("0.txt", b"zero"), (f"{stem}.jpg", b"broken"), (f"{stem}.txt", b"one")]
    dataset = read_shards(write(tmp_path / "a.tar", members, format))
    with pytest.raises(BadSample, match="unreadable|not an image") as caught:
        dataset[1]
    assert caught.value.path == f"{tmp_path / 'a.tar'}: {f'{stem}.jpg'!r}"


def test_the_index_is_made_once_and_anew_when_the_shard_changes(tmp_path, cache, monkeypatch):
    path = write(tmp_path / "a.tar", [("1.jpg", encoded_image(1)), ("1.txt", b"one")])
    assert len(read_shards(path)) == 1
    file = cache_file(str(path))
    with monkeypatch.context() as patch:
        patch.setattr("vmoe.data.shards.scan", lambda path: pytest.fail("read again"))
        assert read_shards(path)[0].caption == "one"
    file.write_bytes(file.read_bytes()[:-3])  # a full disk
    assert read_shards(path)[0].caption == "one"
    write(path, [("0.jpg", encoded_image(1)), ("0.txt", b"zero"), ("1.jpg", encoded_image(1)), ("1.txt", b"one!")])
    assert read_shards(path).captions[:] == ["zero", "one!"]
    monkeypatch.setenv("VMOE_CACHE", "/proc/nowhere")
    with pytest.raises(DataError, match="set the environment variable VMOE_CACHE"):
        read_shards(path)


def test_bad_samples_are_named_and_counted(tmp_path):
    good = encoded_image(0)
    chunks = [b"IHDR" + struct.pack(">2I5B", 10_000, 10_000, 8, 2, 0, 0, 0), b"IDAT" + zlib.compress(bytes(9))]
    parts = [struct.pack(">I", len(one) - 4) + one + struct.pack(">I", zlib.crc32(one)) for one in chunks]
    bomb = b"\x89PNG\r\n\x1a\n" + b"".join(parts)
    write(
        tmp_path / "a.tar",
        [
            ("0.jpg", good), ("0.txt", b"image number 0"),
            ("1.jpg", good),
            ("2.txt", b"alone"),
            ("3.jpg", good), ("3.txt", b" "),
            ("4.jpg", good), ("4.txt", b"\xff\xfe\xff"),
            ("5.jpg", good), ("5.json", b'{"caption": 3}'),
            ("6.jpg", good), ("6.json", b"[" * 100_000),
            ("7.jpg", good[:200]), ("7.txt", b"x"),
            ("8.png", bomb), ("8.txt", b"x"),
            ("9.jpg", good), ("9.txt", b"x" * (2**20 + 1)),
            ("10.npy", b"of no interest"),
        ],
    )  # fmt: skip
    dataset = read_shards(tmp_path / "a.tar")
    assert len(dataset) == 10
    reasons = {}
    for index in range(1, 10):
        with pytest.raises(BadSample) as caught:
            dataset[index]
        assert f"a.tar: '{index}." in caught.value.path
        reasons[index] = caught.value.reason
    expected = ["no caption", "no image", "empty caption", "not UTF-8", "no text 'caption'", "nested too deep"]
    expected += ["unreadable image", "10000 x 10000 pixels, more than the limit", "more than the limit"]
    for reason, part in zip(reasons.values(), expected, strict=True):
        assert part in reason
    config = LoaderConfig(batch_size=2, num_workers=0, max_bad_share=1.0)
    loader = train_loader(dataset, TRANSFORM, tokenize, config, seed=1)
    for _ in range(loader.steps_per_epoch):
        assert next(loader)["text"][:, 3].tolist() == [0, 0]
    assert len(loader.bad_paths) == 9
    loader = eval_loader(dataset, build_transform(PREPROCESS, None), None, LoaderConfig(on_bad="skip", num_workers=0))
    assert [batch["index"].tolist() for batch in loader] == [[0]]
    assert loader.num_skipped == 9


def test_broken_shards_are_refused(tmp_path):
    path = tmp_path / "a.tar"
    for members, message in [
        ([("readme.md", b"x")], "holds no sample"),
        ([("1.jpg", b"x"), ("1.txt", b"x"), ("1.jpg", b"y")], "member '1.jpg': sample '1' has two such members"),
        ([("1.jpg", b"x"), ("1.png", b"x")], "member '1.png': sample '1' has two such members"),
        ([("../1.jpg", b"x")], "leads out of the shard"),
    ]:
        write(path, members)
        with pytest.raises(DataError, match=message):
            read_shards(path)
    write(path, [("1.jpg", b"x"), ("1.cls", b"0")])
    with pytest.raises(ValueError, match=r"no captions .* for labels \(.cls\) set class_names"):
        read_shards(path)


def test_a_shard_that_shrinks_while_it_is_read_is_an_error(tmp_path):
    path = make_shards(tmp_path, (3,)) / "00000.tar"
    dataset = read_shards(path)
    with open(path, "r+b") as file:
        file.truncate(1024)
    with pytest.raises(DataError, match="was changed while it was read"):
        dataset[2]


def loaders_of(path, processes, workers=0, batch_size=4, streams=1, window=6, seed=3):
    dataset = read_shards(path, shuffle_buffer=window, streams=streams)
    config = LoaderConfig(batch_size=batch_size, num_workers=workers)
    return [
        train_loader(dataset, TRANSFORM, tokenize, config, seed, part=(rank, processes)) for rank in range(processes)
    ]


def take(loaders, steps):
    """The captions' numbers of some steps, all processes' parts together."""
    return [[number for loader in loaders for number in next(loader)["text"][:, 3].tolist()] for _ in range(steps)]


@settings(max_examples=6)
@given(
    st.integers(0, 12),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 2]),
    st.integers(1, 30),
)
def test_a_stopped_run_continues_exactly_with_any_number_of_processes(shards, stop, before, after, streams, window):
    settings = {"streams": streams, "window": window}
    whole = take(loaders_of(shards, 1, **settings), 15)
    for epoch in (whole[:5], whole[5:10]):
        numbers = [number for batch in epoch for number in batch]
        assert len(set(numbers)) == len(numbers) == 20
    first, second = loaders_of(shards, before, **settings), loaders_of(shards, after, **settings)
    assert take(first, stop) == whole[:stop]
    for loader in second:
        loader.load_state_dict(first[0].state_dict())
    assert take(second, 15 - stop) == whole[stop:]


def test_the_number_of_workers_may_change_at_a_stop(shards):
    whole = take(loaders_of(shards, 1), 8)
    for before, after in [(0, 2), (2, 1), (1, 0)]:
        [first], [second] = loaders_of(shards, 1, before), loaders_of(shards, 1, after)
        assert take([first], 3) == whole[:3]
        second.load_state_dict(first.state_dict())
        assert take([second], 5) == whole[3:]
        first.close(), second.close()


def test_settings_that_do_not_fit(shards):
    with pytest.raises(ValueError, match="streams must divide data.loader.batch_size 4, got 3"):
        loaders_of(shards, 1, streams=3)
    with pytest.raises(ValueError, match="streams must be at most the data set's number of samples, 21, got 30"):
        read_shards(shards, streams=30).shuffle(0, 60)
    for name in ("streams", "shuffle_buffer"):
        with pytest.raises(ValueError, match=f"{name} must be >= 1, got 0"):
            SourceConfig("shards", "x", **{name: 0})
        with pytest.raises(ValueError, match=f"{name} is for shards, and type is 'pairs'"):
            SourceConfig("pairs", "x", **{name: 2})


def test_the_fingerprint_follows_the_files(shards, tmp_path):
    same = make_shards(tmp_path / "same")
    other = make_shards(tmp_path / "other", (7, 5, 8))
    prints = [read_shards(path).fingerprint() for path in (shards, same, other)]
    assert prints[0] != prints[2]
    assert len(prints[1]) == 64


def test_a_few_shards_stay_open_and_none_is_sent_to_a_worker(shards, monkeypatch):
    monkeypatch.setattr("vmoe.data.sources.webdataset.MAX_OPEN", 2)
    dataset = read_shards(shards)
    for index in (20, 0, 8, 19, 1):
        assert dataset[index].caption == f"image number {index}"
    assert [file.name[-9:] for _, file in dataset._shards.values()] == ["00002.tar", "00000.tar"]
    assert pickle.loads(pickle.dumps(dataset))[20].caption == "image number 20"
