import csv
import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmoe.data import SourceConfig, build_dataset
from vmoe.data.images import BadSample


def read_pairs(path, **settings):
    return build_dataset(SourceConfig("pairs", str(path), **{key: str(value) for key, value in settings.items()}))


@pytest.fixture
def folder(tmp_path, photo):
    for name in ("a.png", "b.jpg"):
        photo.save(tmp_path / name)
    return tmp_path


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("pairs.csv", 'image,caption\na.png,"a cat, asleep"\nb.jpg,"says ""hi"""\n'),
        ("pairs.csv", 'a.png,"a cat, asleep"\nb.jpg,"says ""hi"""\n'),
        ("pairs.csv", '\ufefffilepath,id,title\na.png,1,"a cat, asleep"\n\nb.jpg,2,"says ""hi"""\n'),
        ("pairs.tsv", 'path\tcaption\na.png\ta cat, asleep\nb.jpg\tsays "hi"\n'),
        ("a.jsonl", '{"image": "a.png", "caption": "a cat, asleep"}\n\n{"image":"b.jpg","caption":"says \\"hi\\""}'),
    ],
)
def test_the_same_pairs_from_every_kind_of_file(folder, name, text):
    pairs = read_pairs(write(folder / name, text))
    assert pairs.captions[:] == ["a cat, asleep", 'says "hi"']
    assert [pairs[index].path for index in range(len(pairs))] == [str(folder / "a.png"), str(folder / "b.jpg")]
    assert pairs[0].image.size == (20, 10)
    assert pairs[0].label is None


@pytest.mark.parametrize(
    ("name", "text", "delimiter", "shown"),
    [
        ("a.csv", 'image;caption\na.png;a cat, asleep\nb.jpg;"says ""hi"""\n', ";", "';'"),
        ("a.csv", 'a.png;a cat, asleep\nb.jpg;"says ""hi"""\n', ";", "';'"),
        ("a.csv", '"image";"caption"\n"a.png";"a cat, asleep"\n"b.jpg";"says ""hi"""\n', ";", "';'"),
        ("a.csv", '\ufeffsep=;\r\nimage;caption\r\na.png;a cat, asleep\r\nb.jpg;"says ""hi"""\r\n', ";", "';'"),
        ("a.csv", 'image\tcaption\na.png\ta cat, asleep\nb.jpg\t"says ""hi"""\n', "\t", r"a tab ('\t')"),
        ("a.csv", 'image|caption\na.png|a cat, asleep\nb.jpg|"says ""hi"""\n', "|", "'|'"),
        ("a.tsv", 'image;caption\na.png;a cat, asleep\nb.jpg;says "hi"\n', ";", "';'"),
        ("a.tsv", 'image,caption\na.png,"a cat\n', ",", "','"),
    ],
)
def test_another_delimiter_is_named_and_can_be_set(folder, name, text, delimiter, shown):
    file = write(folder / name, text)
    with pytest.raises(ValueError, match=rf"{name}: its columns are separated by {re.escape(shown)}; set delimiter"):
        read_pairs(file)
    pairs = read_pairs(file, delimiter=delimiter)
    assert pairs.captions[:] == (["a cat, asleep", 'says "hi"'] if len(pairs) == 2 else ['"a cat'])
    assert pairs[0].image.size == (20, 10)


def test_the_delimiter_of_the_settings(folder):
    file = write(folder / "a.csv", "sep=,\nimage,caption\na.png,cat\nb.jpg,a, b\n")
    with pytest.raises(ValueError, match="line 4: 3 cells for 2 columns; put a caption with a comma in quotation"):
        read_pairs(file)
    with pytest.raises(ValueError, match="line 2: 3 cells for 2 columns; take a tab out of it"):
        read_pairs(write(folder / "a.tsv", 'image\tcaption\na.png\t"a\tcat"\n'))
    with pytest.raises(ValueError, match="line 1: malformed .field larger"):
        read_pairs(write(folder / "long.csv", "a" * 200_000))
    with pytest.raises(ValueError, match="separated by ','; set delimiter"):
        read_pairs(file, delimiter=";")
    write(folder / "b.csv", "photo\twords\na.png\tcat\n")
    settings = {"image_key": "photo", "caption_key": "words", "delimiter": r"\t"}  # as a shell gives it
    assert build_dataset(SourceConfig("pairs", str(folder / "b.csv"), **settings)).captions[:] == ["cat"]
    with pytest.raises(ValueError, match="separated by a tab"):
        read_pairs(folder / "b.csv", image_key="photo", caption_key="words")
    with pytest.raises(ValueError, match=r"delimiter is for .csv and .tsv files, and path is .*c.jsonl"):
        read_pairs(write(folder / "c.jsonl", "{}"), delimiter=",")


def test_spaces_behind_the_delimiter(folder):
    pairs = read_pairs(write(folder / "a.csv", 'image, caption\na.png, "a cat, asleep"\nb.jpg, a "dog"\n'))
    assert pairs.captions[:] == ["a cat, asleep", 'a "dog"']


@settings(max_examples=15)
@given(st.lists(st.text(st.characters(exclude_categories=("C", "Z")), min_size=1), min_size=1, max_size=4), st.data())
def test_what_pythons_writer_wrote_is_read(tmp_path_factory, captions, data):
    delimiter = data.draw(st.sampled_from([",", ";", "\t", "|"]))
    file = tmp_path_factory.mktemp("pairs") / "written.csv"
    with open(file, "w", newline="", encoding="utf-8") as stream:
        rows = csv.writer(stream, delimiter=delimiter)
        rows.writerows([("image", "caption"), *(("a.png", caption) for caption in captions)])
    assert read_pairs(file, delimiter=delimiter).captions[:] == [caption.strip() for caption in captions]


def test_named_keys_and_image_root(folder, tmp_path_factory):
    file = tmp_path_factory.mktemp("elsewhere") / "pairs.csv"
    write(file, "caption,de,photo\na cat,eine Katze,a.png\n")
    pairs = read_pairs(file, image_root=folder, image_key="photo", caption_key="de")
    assert pairs[0].caption == "eine Katze"


@settings(max_examples=15)
@given(st.lists(st.text(st.characters(exclude_categories=("C", "Z")), min_size=1), min_size=1, max_size=5))
def test_jsonl_keeps_any_caption(tmp_path_factory, captions):
    file = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    write(file, "\n".join(json.dumps({"image": "a.png", "caption": caption}) for caption in captions))
    assert read_pairs(file).captions[:] == captions


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "photograph,caption\na.png,cat\n", "image_key"),
        ("a.csv", "image,words\na.png,cat\n", "caption_key"),
        ("a.csv", "image,caption\n", "no pairs"),
        ("a.csv", "", "no pairs"),
        ("a.csv", 'image,caption\na.png,"cat\nb.jpg,dog\n', "line 3"),
        ("a.jsonl", '{"image": "a.png"', "line 1: not valid JSON"),
        ("a.jsonl", "[1]", "line 1: must be"),
        ("a.parquet", "", "must end in"),
    ],
)
def test_a_malformed_file_is_explained(tmp_path, name, text, message):
    with pytest.raises(ValueError, match=message):
        read_pairs(write(tmp_path / name, text))


def test_missing_foreign_and_empty_data_are_explained(tmp_path):
    with pytest.raises(ValueError, match="no images"):
        read_pairs(tmp_path)
    with pytest.raises(ValueError, match="no such file or folder"):
        read_pairs(tmp_path / "gone")
    with pytest.raises(ValueError, match="cannot be read"):
        read_pairs(tmp_path / "gone.csv")
    (tmp_path / "latin.csv").write_bytes("image,caption\na.png,Stra\xdfe\n".encode("latin-1"))
    with pytest.raises(ValueError, match="UTF-8"):
        read_pairs(tmp_path / "latin.csv")


def test_bad_pairs_are_named(folder):
    rows = ["a.png,  ", "gone.png,cat", "a.png", ",cat"]
    pairs = read_pairs(write(folder / "pairs.csv", "image,caption\n" + "\n".join(rows)))
    for index, reason in enumerate(["empty caption", "no such file", "empty caption", "no image path"]):
        with pytest.raises(BadSample, match=reason):
            pairs[index]
    pairs = read_pairs(
        write(folder / "p.jsonl", '{"image": "a.png", "caption": null}\n{"image": "a.png", "caption": 3}')
    )
    assert pairs.captions[:] == ["", ""]
    for index, reason in enumerate(["empty caption", "its caption is of type int, not a text"]):
        with pytest.raises(BadSample, match=reason):
            pairs[index]


def test_folder_with_captions_beside(folder, photo):
    (folder / "deep").mkdir()
    for name in ("deep/c.webp", "d.png", "e.png"):
        photo.save(folder / name)
    for name, text in [("a", "a cat\n"), ("b", " \n"), ("deep/c", "\ufeffa dog"), ("lonely", "no image")]:
        write(folder / f"{name}.txt", text)
    (folder / "e.txt").write_bytes(b"\xff\xfe\xff")
    pairs = read_pairs(folder)
    assert dict(zip(pairs.names, pairs.captions))["deep/c.webp"] == "a dog"
    assert sorted(pairs.captions) == ["", "", "", "a cat", "a dog"]
    captions = {}
    for index in range(len(pairs)):
        try:
            captions[pairs.names[index]] = pairs[index].caption
        except BadSample as error:
            captions[pairs.names[index]] = error.reason
    assert captions["a.png"] == "a cat"
    assert captions["deep/c.webp"] == "a dog"
    assert captions["b.jpg"] == "empty caption"
    assert "no caption file" in captions["d.png"]
    assert "not UTF-8" in captions["e.png"]


def test_files_of_other_kinds_with_captions_are_counted(folder, caplog):
    for name in ("a.txt", "b.txt", "README.txt", "IMG_1.HEIC", "IMG_1.txt", "IMG_2.heic", "clip.mov", "clip.txt"):
        write(folder / name, "a caption")
    assert len(read_pairs(folder)) == 2
    assert "skipped 2 files with a caption that do not end in .jpg, " in caplog.text
    assert caplog.text.rstrip().endswith("such as IMG_1.HEIC")
    caplog.clear()
    for name in ("IMG_1.HEIC", "clip.mov"):
        (folder / name).unlink()
    read_pairs(folder)
    assert not caplog.text


def test_hidden_images_are_none_of_a_folder(folder):
    """macOS puts a `._a.png` beside each a.png on foreign disks."""
    for name in ("._a.png", "Thumbs.db", ".trash/b.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    assert read_pairs(folder).names == ["a.png", "b.jpg"]
