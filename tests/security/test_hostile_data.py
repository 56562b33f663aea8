"""Images, lists, shards and caches made to do harm, each with the sentence that refuses it."""

import io
import json
import os
import pickle
import struct
import tarfile
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from vmoe.data import build_dataset
from vmoe.data.config import SourceConfig
from vmoe.data.images import BadSample, load_image

from .hostile import Harm, refused, zip_of


def png_of(width: int, height: int, rows: bytes = b"") -> bytes:
    """A PNG that claims to be of a size."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def png_with_text(size: int) -> bytes:
    """A PNG whose compressed comment unfolds to so many bytes."""
    info, stream = PngImagePlugin.PngInfo(), io.BytesIO()
    info.add_text("comment", "a" * size, zip=True)
    Image.new("L", (8, 8)).save(stream, "PNG", pnginfo=info)
    return stream.getvalue()


EPS = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 10 10
%%EndComments
(CANARY) (w) file closefile
showpage
%%EOF
"""
IMAGES: dict[str, tuple[bytes, str]] = {
    "100,000 x 100,000": (png_of(100_000, 100_000), "pixels"),
    "a strip": (png_of(1, 1_000_000), "sides beyond"),
    "no rows": (png_of(100, 100), "unreadable"),
    "a comment of 70 MB": (png_with_text(70 * 2**20), "unreadable"),
    "PostScript, which Ghostscript would run": (EPS, "not an image file"),
    "SVG": (b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>', "not an image file"),
    "a pickle": (pickle.dumps({"a": 1}), "not an image file"),
    "nothing": (b"", "not an image file"),
}


@pytest.mark.parametrize(("content", "words"), IMAGES.values(), ids=IMAGES)
def test_images(tmp_path, canary, content, words):
    file = tmp_path / "cat.jpg"
    file.write_bytes(content.replace(b"CANARY", str(canary).encode()))
    refused(lambda: load_image(file), words, str(file))


def test_images_that_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "zeros.jpg").symlink_to("/dev/zero")
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    for name, words in (("pipe.jpg", "regular"), ("zeros.jpg", "regular"), ("loop.jpg", "loop.jpg"), ("a\0b", "a")):
        refused(lambda name=name: load_image(tmp_path / name), words)


@pytest.mark.parametrize(
    ("kind", "caption"),
    [(kind, "a \0 cat") for kind in ("jsonl", "csv", "folder", "karpathy", "shards", "hf")]
    + [(kind, "\ud800 cat") for kind in ("jsonl", "karpathy", "shards")],  # JSON alone can hold half of a pair
)
def test_captions_that_are_no_text(tmp_path, monkeypatch, kind, caption):
    monkeypatch.setenv("VMOE_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "data"
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    image, path, settings = (folder / "a.png").read_bytes(), folder / "list.jsonl", {"type": "pairs"}
    if kind == "jsonl":
        path.write_text(json.dumps({"image": "a.png", "caption": caption}))
    elif kind == "csv":
        path = folder / "list.csv"
        path.write_text(f"image,caption\na.png,{caption}\n")
    elif kind == "folder":
        path = folder
        (folder / "a.txt").write_text(caption)
    elif kind == "karpathy":
        entry = {"filename": "a.png", "split": "test", "sentences": [{"raw": caption}]}
        path.write_text(json.dumps({"images": [entry]}))
        settings = {"type": "karpathy", "split": "test"}
    elif kind == "shards":
        path, settings = folder / "0.tar", {"type": "shards"}
        with tarfile.open(path, "w") as tar:
            for name, content in (("0.png", image), ("0.json", json.dumps({"caption": caption}).encode())):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    else:
        datasets = pytest.importorskip("datasets")
        path, settings = tmp_path / "hf", {"type": "hf"}
        datasets.Dataset.from_list([{"image": image, "caption": caption}]).save_to_disk(path)
    dataset = build_dataset(SourceConfig(path=str(path), **settings))
    with pytest.raises(BadSample, match="its caption holds the character"):
        dataset[0]
    assert list(dataset.captions) == [""]
    assert dataset.fingerprint()


@pytest.mark.parametrize("path", ["../secret.png", "a/../../secret.png", "/etc/passwd", "/proc/self/environ"])
@pytest.mark.parametrize("kind", ["csv", "jsonl", "karpathy"])
def test_lists_that_reach_out_of_their_folder(tmp_path, path, kind):
    folder = tmp_path / "data"
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    if kind == "karpathy":
        entry = {"filename": path, "split": "train", "sentences": [{"raw": "x"}]}
        (folder / "list").write_text(json.dumps({"images": [entry]}))
        refused(lambda: build_dataset(SourceConfig("karpathy", str(folder / "list"))), "is not inside image_root")
        return
    text = f"image,caption\n{path},x\n" if kind == "csv" else json.dumps({"image": path, "caption": "x"})
    (folder / f"list.{kind}").write_text(text)
    refused(lambda: build_dataset(SourceConfig("pairs", str(folder / f"list.{kind}"))), "is outside of", "image_root")
    if not path.startswith("/proc"):
        pairs = build_dataset(SourceConfig("pairs", str(folder / f"list.{kind}"), image_root="/"))
        assert len(pairs) == 1  # for who says so


@pytest.mark.parametrize("path", ["..\\secret.png", "a\\..\\..\\b.png", "a/..\\..\\b.png"])
def test_lists_that_reach_out_on_windows(tmp_path, path):
    (tmp_path / "list.jsonl").write_text(json.dumps({"image": path, "caption": "x"}))
    refused(lambda: build_dataset(SourceConfig("pairs", str(tmp_path / "list.jsonl"))), "line 1", "out of its folder")
    entry = {"filename": path, "split": "train", "sentences": [{"raw": "x"}]}
    (tmp_path / "list").write_text(json.dumps({"images": [entry]}))
    refused(lambda: build_dataset(SourceConfig("karpathy", str(tmp_path / "list"))), "is not inside image_root")


LINES = {
    "brackets": ("jsonl", b"[" * 10**6, "too deep"),
    "digits": ("jsonl", b'{"image": ' + b"9" * 5000 + b"}", "line 1"),
    "one endless line": ("jsonl", b'{"image": "' + b"a" * 2**21, "longer than"),
    "one endless line of commas": ("csv", b"image,caption\n" + b"," * 2**21, "longer than"),
    "one endless cell": ("csv", b'image,caption\n"' + b"a\n" * 2**20, "malformed"),
}


@pytest.mark.parametrize(("kind", "content", "words"), LINES.values(), ids=LINES)
def test_lists_of_pairs(tmp_path, kind, content, words):
    (tmp_path / f"list.{kind}").write_bytes(content)
    refused(lambda: build_dataset(SourceConfig("pairs", str(tmp_path / f"list.{kind}"))), words, f"list.{kind}")


def tar_of(name: str = "0.txt", content: bytes = b"x", **facts) -> bytes:
    stream = io.BytesIO()
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for key, value in facts.items():
        setattr(member, key, value)
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(member, io.BytesIO(content) if member.isreg() else None)
    return stream.getvalue()


TARS = {
    "out of it, by a long name": (tar_of("a/" * 60 + "../" * 70 + "x.txt"), "absolute or leads out"),
    "a gigantic member": (tar_of("0.jpg", type=tarfile.SYMTYPE, size=2**60), "extended header with size"),
    "a gigantic header": (tar_of("a" * 100_000 + ".txt"), "extended header"),
    "a zip archive": (zip_of(b"x"), "unpack a compressed one"),
}


@pytest.mark.parametrize(("content", "words"), TARS.values(), ids=TARS)
def test_shards(tmp_path, monkeypatch, content, words):
    monkeypatch.setenv("VMOE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "0.tar").write_bytes(content)
    refused(lambda: build_dataset(SourceConfig("shards", str(tmp_path / "0.tar"))), words, "0.tar")


def test_class_names(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "tree" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "tree" / name / "1.png")
    for text, words in (("cat\n\x1b[31mdog\n", "control character"), ("cat\n\u202edog\n", "control character")):
        (tmp_path / "names.txt").write_text(text)
        source = SourceConfig("image_folder", str(tmp_path / "tree"), class_names=str(tmp_path / "names.txt"))
        refused(lambda source=source: build_dataset(source), words, "names.txt")
    (tmp_path / "names.json").write_text("[" * 10**6)
    source = SourceConfig("image_folder", str(tmp_path / "tree"), class_names=str(tmp_path / "names.json"))
    refused(lambda: build_dataset(source), "too deep")


def test_caches_hold_no_pickles(tmp_path, monkeypatch, canary):
    from vmoe.data.shards import cache_file, scan

    monkeypatch.setenv("VMOE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache" / "shards").mkdir(parents=True)
    (tmp_path / "0.tar").write_bytes(tar_of())
    array = np.empty(1, object)
    array[0] = Harm(canary)
    np.save(cache_file(str(tmp_path / "0.tar")), array, allow_pickle=True)
    assert len(build_dataset(SourceConfig("shards", str(tmp_path / "0.tar")))) == 1
    assert len(scan(str(tmp_path / "0.tar")).entries) == 1
