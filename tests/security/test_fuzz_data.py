"""Damaged images, lists of pairs and shards: what is left of them is right, or it is refused in one sentence."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import strategies as st
from PIL import Image

from vmoe.data import ImageDataset, SourceConfig, build_dataset
from vmoe.data.images import FORMATS, MAX_PIXELS, BadSample, load_image
from vmoe.data.shards import read_members
from vmoe.utils.files import parse_json

from .bounds import NASTY, damaged, fuzz, outcome

# --- images --------------------------------------------------------------------------------------------------------


def encoded_image(format_: str, mode: str = "RGB", **options) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (24, 40, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(stream, format_, **options)
    return stream.getvalue()


IMAGES = [
    *(encoded_image(format_) for format_ in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM", "TIFF")),
    *(encoded_image("PNG", mode) for mode in ("P", "LA", "1")),
    *(encoded_image("JPEG", progressive=True), encoded_image("JPEG", "CMYK"), encoded_image("WEBP", lossless=True)),
    *(encoded_image("TIFF", compression="tiff_lzw"), encoded_image("TIFF", "RGBA", compression="tiff_deflate")),
]
SIZES = (
    *(b"\x00\x00\x00\x01", b"\x00\x01\x00\x00", b"\x7f\xff\xff\xff", b"\xff\xda", b"\xff\xd8", b"\xff\xc2"),
    *(b"IHDR", b"iCCP", b"zTXt"),
)


def any_image(data) -> None:
    content = data.draw(damaged(data.draw(st.sampled_from(IMAGES)), SIZES) | st.binary(max_size=64))
    image = outcome(lambda: load_image("x", content), (BadSample,), megabytes=1500)
    if not isinstance(image, str):
        assert image.mode == "RGB"
        assert image.width * image.height <= MAX_PIXELS
        np.asarray(image)


test_any_image, test_many_images = fuzz(any_image, few=40, many=3000)


def test_undamaged_images_of_all_formats_are_read():
    assert {Image.open(io.BytesIO(content)).format for content in IMAGES} == set(FORMATS) - {"DIB"}
    for content in IMAGES:
        assert load_image("x", content).size == (40, 24)


# --- pairs -----------------------------------------------------------------------------------------------------------

LISTS = {
    "pairs.csv": 'image,caption\ncat.jpg,"a ""cat"", asleep"\nb/dog.png,Hund\n',
    "pairs.tsv": "image\tcaption\ncat.jpg\ta cat\nb/dog.png\tHund\n",
    "pairs.jsonl": '{"image": "cat.jpg", "caption": "a cat"}\n{"image": "b/dog.png", "caption": "Hund"}\n',
}
PIECES = (
    *(b"../", b"/etc/passwd,x\n", b"\0", b"\xff", b"\xef\xbb\xbf", b'"', b"\r", b"\n\n", b"," * 50, b"\t"),
    *(b"\x1b[31m", b"\\u0000"),
    *(b"[" * 3000, b'{"a":' * 3000, b"9" * 5000, b"null", b"{}", b"[]", b"1", b"\\ud800", b"a" * 200_000, b"NaN"),
)


def any_list_of_pairs(tmp_path_factory, data) -> None:
    name = data.draw(st.sampled_from(list(LISTS)))
    file = tmp_path_factory.mktemp("pairs") / name
    file.write_bytes(data.draw(damaged(LISTS[name].encode(), PIECES)))

    def read() -> ImageDataset:
        pairs = build_dataset(SourceConfig("pairs", str(file)))
        for index in range(len(pairs)):
            with pytest.raises(BadSample):  # there are no images
                pairs[index]
        pairs.fingerprint()
        return pairs

    pairs = outcome(read, (ValueError,))
    if isinstance(pairs, ImageDataset):
        assert not any(".." in Path(name).parts or Path(name).is_absolute() for name in pairs.image_ids)


test_any_list_of_pairs, test_many_lists_of_pairs = fuzz(any_list_of_pairs, few=30, many=3000)


def any_json(data) -> None:
    tree = data.draw(
        st.recursive(st.sampled_from(NASTY), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner))
    )
    content = data.draw(damaged(json.dumps(tree).encode(), PIECES))
    outcome(lambda: parse_json(content), (ValueError,))


test_any_json, test_many_json = fuzz(any_json, few=20, many=2000)

# --- shards ----------------------------------------------------------------------------------------------------------


def shard(format_: int) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=format_) as tar:
        for name, content in (
            ("0.jpg", IMAGES[0]), ("0.txt", b"a cat"), ("0.json", b'{"caption": "a cat"}'),
            (f"{'long/' * 30}1.png", IMAGES[3]), (f"{'long/' * 30}1.txt", "Hund — ein Hund".encode()),
        ):  # fmt: skip
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return stream.getvalue()


TARS = [shard(format_) for format_ in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)]
HEADERS = (
    *(b"\0" * 512, b"../", b"/etc/passwd", b"7777777777", b"\x80" + b"\xff" * 11, b"17 path=../../x\n"),
    *(b"L", b"x", b"1", b"5"),
)


def read_shard(content: bytes, folder: Path) -> None:
    file = folder / "0.tar"
    file.write_bytes(content)
    for member in read_members(file):
        assert member.offset + member.size <= len(content)
        assert not member.name.startswith(("/", "\\"))
        assert ".." not in member.name.replace("\\", "/").split("/")
    shards = build_dataset(SourceConfig("shards", str(file)))
    for index in range(len(shards)):
        sample = outcome(lambda index=index: shards[index], (BadSample,), megabytes=None)
        assert isinstance(sample, str) or sample.caption


def with_good_checksums(content: bytes) -> bytes:
    """A damaged tar file whose headers claim to be undamaged."""
    content = bytearray(content)
    for start in range(0, len(content) - 511, 512):
        if content[start + 257 : start + 262] == b"ustar":
            content[start + 148 : start + 156] = b" " * 8
            content[start + 148 : start + 156] = b"%06o\0 " % sum(content[start : start + 512])
    return bytes(content)


def any_shard(tmp_path_factory, data) -> None:
    folder = tmp_path_factory.mktemp("shards")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VMOE_CACHE", str(folder / "cache"))
        content = data.draw(damaged(data.draw(st.sampled_from(TARS)), HEADERS))
        content = with_good_checksums(content) if data.draw(st.booleans()) else content
        outcome(lambda: read_shard(content, folder), (ValueError,), megabytes=1500)


test_any_shard, test_many_shards = fuzz(any_shard, few=30, many=3000)


def test_undamaged_shards_are_read(tmp_path, monkeypatch):
    monkeypatch.setenv("VMOE_CACHE", str(tmp_path / "cache"))
    for number, content in enumerate(TARS):
        (tmp_path / str(number)).mkdir()
        read_shard(content, tmp_path / str(number))
        assert [
            build_dataset(SourceConfig("shards", str(tmp_path / str(number))))[index].caption for index in range(2)
        ] == ["a cat", "Hund — ein Hund"]
