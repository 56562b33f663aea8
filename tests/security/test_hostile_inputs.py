"""A list of inputs made to do harm, each with the sentence that refuses it. Nothing runs, nothing is unpickled."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import msgpack
import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent))
from bounds import outcome

import vmoe
from vmoe.config_io import parse_config, read_config
from vmoe.convert.files import open_checkpoint, resolve_config
from vmoe.convert.settings import model_settings
from vmoe.data import build_dataset
from vmoe.data.config import SourceConfig
from vmoe.data.images import BadSample, load_image
from vmoe.manifest import find_problems, write_manifest
from vmoe.models.factory import save_pretrained
from vmoe.models.weights import METADATA_KEY, read_pretrained_metadata
from vmoe.training.config import Config
from vmoe.training.optimizer_state import import_state

REFUSALS = (ValueError, BadSample)


class Harm:
    """Makes the file `canary` when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return Path.touch, (self.canary,)


@pytest.fixture
def canary(tmp_path):
    file = tmp_path / "canary"
    yield file
    assert not file.exists(), "something from the file ran"


def refused(call: Callable, *words: str) -> None:
    sentence = outcome(call, REFUSALS, megabytes=None)
    assert isinstance(sentence, str), f"was taken: {sentence!r:.200}"
    for word in words:
        assert word in sentence


# --- configs ---------------------------------------------------------------------------------------------------------

LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefg", "bcdefgh", strict=True)
)
CONFIGS = {
    "python object": ("seed: !!python/object/apply:pathlib.Path.touch [CANARY]", "plain values"),
    "python name": ("seed: !!python/name:os.system", "plain values"),
    "python module": ("seed: !!python/module:antigravity", "plain values"),
    "class path": ("class_path: pathlib.Path.touch\ninit_args: {self: CANARY}", "unknown key 'class_path'"),
    "class path of a section": ("optim: {class_path: os.system, init_args: {}}", "unknown key 'optim.class_path'"),
    "code": ("seed: __import__('pathlib').Path('CANARY').touch()", "seed must be int"),
    "shell": ("seed: $(touch CANARY)", "seed must be int"),
    "environment": ("seed: ${oc.env:HOME}", "seed must be int"),
    "another file": ("optim: /etc/passwd", "optim must be a section"),
    "another config": ("config: /etc/passwd", "unknown key 'config'"),
    "billion laughs": (LAUGHS, "more than 10000 values"),
    "laughs by merging": (
        "a: &b0 {x: 1}\n" + "".join(f"b{i}: &b{i + 1}\n  <<: [*b{i}, *b{i}]\n" for i in range(40)),
        "more than 10000 values",
    ),
    "alias of itself": ("model: &a {kwargs: *a}", "lies inside its own anchor"),
    "brackets": ("seed: " + "[" * 500_000, "nested deeper than 32"),
    "digits": ("seed: " + "9" * 4000, "too large"),
    "more digits": ("seed: " + "9" * 500_000, "characters"),
    "no date": ("seed: 2022-99-99", "month must be"),
    "terminal": ('output_dir: "\\e]0;owned\\a"', "control character"),
    "NUL in a path": ('output_dir: "a\\0b"', "control character"),
    "long": ("#" * 2**21, "too many for settings"),
    "binary": ("\x7fELF", "not valid YAML"),
    "set": ("seed: !!set {a, b}", "plain values"),
    "a key twice": ("seed: 1\noptim:\n  lr: 1\nseed: 2", "line 5: the key 'seed' is there already, on line 2"),
    "a key twice, deep": ("model: {kwargs: {x: [{a: 1, 'a': 2}]}}", "line 2: the key 'a' is there already"),
}


@pytest.mark.parametrize(("text", "words"), CONFIGS.values(), ids=CONFIGS)
def test_configs(tmp_path, canary, text, words):
    file = tmp_path / "config.yaml"
    file.write_text("task: contrastive\n" + text.replace("CANARY", str(canary)) + "\n")
    refused(lambda: read_config(Config, ["--config", str(file)]), words, str(file) if "seed must" not in words else "")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--seed", "__import__('os').system('true')"], "seed must be int"),
        (["--model.kwargs.a", "[" * 100_000], "nested deeper"),
        (["--model.kwargs.a", "&a [*a]"], "inside its own anchor"),
        (["--model.kwargs.a", "!!python/name:os.system"], "plain values"),
        (["--optim", "/etc/passwd"], "must hold settings"),
        (["--config", "x" * 5000], "no such file"),
        (["--config", "/dev/zero"], "no such file"),
        (["--output_dir", "/tmp/\udcff"], r"--output_dir /tmp/\udcff: not UTF-8"),
        (["--model.kwargs.a=\udcff"], r"--model.kwargs.a=\udcff: not UTF-8"),
        (["--model.kwargs.\udcff", "1"], "not UTF-8"),
        (["--config", "\udcff"], "no such file"),
        (["--model.kwargs", "{a: 1, a: 2}"], "the key 'a' is there already"),
    ],
)
def test_command_lines(argv, words):
    refused(lambda: read_config(Config, ["--output_dir=x", "--task=contrastive", *argv]), words)


def test_a_class_path_among_free_settings_is_a_word_like_others(tmp_path, canary):
    file = tmp_path / "config.yaml"
    harm = {"class_path": "pathlib.Path.touch", "init_args": {"self": str(canary)}}
    file.write_text(json.dumps({"output_dir": "x", "task": "contrastive", "model": {"kwargs": {"x": harm}}}))
    assert read_config(Config, ["--config", str(file)]).model.kwargs == {"x": harm}


# --- weights ---------------------------------------------------------------------------------------------------------

TINY = {"img_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 2, "num_heads": 2, "num_classes": 3, "num_experts": 2}


@pytest.fixture(scope="module")
def good_file(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_pretrained(vmoe.create_model("vmoe_base_patch16_224", moe_layers=[1], num_selected_experts=1, **TINY), file)
    return file


def with_settings(good_file: Path, file: Path, change: Callable[[dict], object]) -> Path:
    """The same weights with other settings."""
    from safetensors.torch import load_file

    settings = read_pretrained_metadata(good_file)
    change(settings)
    save_file(load_file(good_file), file, metadata={METADATA_KEY: json.dumps(settings)})
    return file


SETTINGS = {
    "another file": (lambda s: s["kwargs"].update(checkpoint_path="/etc/passwd"), "kwargs.checkpoint_path would load"),
    "a download": (lambda s: s["kwargs"].update(pretrained=True), "kwargs.pretrained would load"),
    "an address": (
        lambda s: s["kwargs"].update(pretrained_cfg={"url": "http://x"}),
        "kwargs.pretrained_cfg would load",
    ),
    "an address beside": (lambda s: s["kwargs"].update(pretrained_cfg_overlay={"url": "http://x"}), "nothing but"),
    "a hub": (lambda s: s.update(name="hf-hub:some/model"), "no name of a model"),
    "a tower of a hub": (lambda s: s["kwargs"].update(image={"name": "hf-hub:some/model"}), "no name of a model"),
    "wide": (lambda s: s["kwargs"].update(embed_dim=2**20), "no model can be built", "much larger"),
    "wider than PyTorch counts": (
        lambda s: s["kwargs"].update(embed_dim=2**30),
        "no model can be built",
        "much larger",
    ),
    "deep": (lambda s: s["kwargs"].update(depth=10**8), "whole number of blocks"),
    "many experts": (lambda s: s["kwargs"].update(num_experts=2**30), "no model can be built", "much larger"),
    "huge pictures": (lambda s: s["kwargs"].update(img_size=2**20), "whole numbers of pixels"),
    "huge pictures beside": (
        lambda s: s["kwargs"].update(pretrained_cfg_overlay={"input_size": [3, 2**20, 2**20]}),
        "whole numbers of pixels",
    ),
    "no number": (lambda s: s["kwargs"].update(drop_rate=float("nan")), "no sensible number", "not a sensible number"),
    "code for an activation": (lambda s: s["kwargs"].update(act_layer="os.system"), ""),
    "no kwargs": (lambda s: s.pop("kwargs"), "kwargs is missing"),
    "kwargs of another kind": (lambda s: s.update(kwargs=[1]), "kwargs is missing or no dict"),
}


@pytest.mark.parametrize(("change", "words"), [(row[0], row[1:]) for row in SETTINGS.values()], ids=SETTINGS)
def test_settings_in_weights(good_file, tmp_path, change, words):
    file = with_settings(good_file, tmp_path / "model.safetensors", change)
    sentence = outcome(lambda: vmoe.create_model(pretrained=file), REFUSALS, megabytes=None)
    assert isinstance(sentence, str), "was taken"
    assert str(file) in sentence or not words[0]
    assert any(word in sentence for word in words), sentence


def test_undamaged_weights_are_read(good_file, tmp_path):
    vmoe.create_model(pretrained=with_settings(good_file, tmp_path / "model.safetensors", lambda settings: None))


def safetensors_bytes(header: bytes | dict, length: int | None = None, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def one_tensor(shape: list, offsets: list) -> dict:
    return {"x": {"dtype": "F32", "shape": shape, "data_offsets": offsets}}


def zip_of(content: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("archive/data.pkl", content)
    return stream.getvalue()


WEIGHTS: dict[str, Callable[[Path], bytes]] = {
    "a pickle": lambda canary: pickle.dumps(Harm(canary)),
    "a PyTorch file": lambda canary: zip_of(pickle.dumps(Harm(canary))),
    "a header of 2^60 bytes": lambda _: safetensors_bytes(b"{}", 2**60),
    "a header of 2^64 - 1 bytes": lambda _: safetensors_bytes(b"{}", 2**64 - 1),
    "a header of brackets": lambda _: safetensors_bytes(b'{"a":' * 100_000),
    "a tensor of 2^60 numbers": lambda _: safetensors_bytes(one_tensor([2**60], [0, 4]), data=b"1234"),
    "a tensor of 2^62 x 8": lambda _: safetensors_bytes(one_tensor([2**62, 8], [0, 0])),
    "a tensor behind the end": lambda _: safetensors_bytes(one_tensor([1], [2**40, 2**40 + 4]), data=b"1234"),
    "offsets that go back": lambda _: safetensors_bytes(one_tensor([1], [4, 0]), data=b"1234"),
    "no header": lambda _: b"",
    "another sort of header": lambda _: safetensors_bytes([1, 2]),
    "no settings": lambda _: safetensors_bytes(one_tensor([1], [0, 4]), data=b"1234"),
    "settings of brackets": lambda _: safetensors_bytes({"__metadata__": {METADATA_KEY: "[" * 100_000}}),
}


@pytest.mark.parametrize("content", WEIGHTS.values(), ids=WEIGHTS)
def test_weights(tmp_path, canary, content):
    file = tmp_path / "model.safetensors"
    file.write_bytes(content(canary))
    refused(lambda: vmoe.create_model(pretrained=file), str(file))


def test_checkpoints_that_reach_out_of_their_folder(good_file, tmp_path):
    checkpoint = tmp_path / "step_000001"
    checkpoint.mkdir()
    outside = {"size": good_file.stat().st_size, "sha256": "0" * 64}
    for name in ("../../etc/passwd", "/etc/passwd", str(good_file)):
        write_manifest(checkpoint, {}, {name: outside})
        assert any("missing" in problem for problem in find_problems(checkpoint))
    (checkpoint / "model.safetensors").symlink_to(good_file)
    write_manifest(checkpoint, {}, {"model.safetensors": outside})
    refused(lambda: vmoe.create_model(pretrained=checkpoint), "model.safetensors is not a plain file")
    (checkpoint / "manifest.json").unlink()
    (checkpoint / "manifest.json").symlink_to("/etc/passwd")
    refused(lambda: vmoe.create_model(pretrained=checkpoint), "manifest.json")


def test_the_state_of_an_older_trainer_is_not_unpickled(good_file, tmp_path, canary):
    from vmoe.training.checkpoint import load_checkpoint

    checkpoint = tmp_path / "step_000001"
    checkpoint.mkdir()
    (checkpoint / "model.safetensors").write_bytes(good_file.read_bytes())
    torch.save({"optimizer": Harm(canary)}, checkpoint / "trainer.pt")
    model = vmoe.create_model(pretrained=good_file)
    refused(lambda: load_checkpoint(checkpoint, model, None, None), "trainer.pt cannot be read")


@pytest.mark.parametrize(
    "rest",
    [
        {"groups": [], "state": {}, "other": {}},
        {"groups": [{"parameters": ["weight", "bias"], "settings": {"lr": {"dtype": "nn"}}}], "state": {}, "other": {}},
        {"groups": [{"parameters": ["weight", "bias"], "settings": {}}], "state": {"x.y": {}}, "other": {}},
        {
            "groups": [{"parameters": ["weight", "bias"], "settings": {}}],
            "state": {"weight": {"a": {"exec": "x"}}},
            "other": {},
        },
    ],
)
def test_an_optimizer_state_of_another_kind(rest):
    layer = torch.nn.Linear(2, 2)
    refused(lambda: import_state(torch.optim.AdamW(layer.parameters()), layer, None, rest))


# --- checkpoints of the reference ------------------------------------------------------------------------------------

PACKED = {
    "lists in lists": b"\x91" * 10_000,
    "a list of 2^32 - 1": b"\xdd\xff\xff\xff\xff",
    "a map of 2^32 - 1": b"\xdf\xff\xff\xff\xff",
    "a text of 2^32 - 1": b"\xdb\xff\xff\xff\xff",
    "a million lists": b"\xdd\x00\x10\x00\x00" + b"\x90" * 2**20,
    "an array of 2^63 numbers": msgpack.packb({"a": msgpack.ExtType(1, msgpack.packb(([2**63], "float32", b"1234")))}),
    "an array of 100,000 axes": msgpack.packb(
        {"a": msgpack.ExtType(1, msgpack.packb(([2**63] * 100_000, "float32", b"1234")))}
    ),
    "an array of objects": msgpack.packb({"a": msgpack.ExtType(1, msgpack.packb(([1], "object", b"12345678")))}),
    "sizes of text": msgpack.packb(
        {"a": {"__msgpack_chunked_array__": True, "shape": {"0": "ab", "1": 2**40}, "chunks": {}}}
    ),
    "long names": msgpack.packb(
        {"k" * 60_000: {str(i): msgpack.ExtType(1, b"\x93\x90\xa5int32\xc4\x00") for i in range(9)}}
    ),
    "a pickle": pickle.dumps([1, 2, 3]),
}


@pytest.mark.parametrize("content", PACKED.values(), ids=PACKED)
def test_reference_checkpoints(tmp_path, content):
    file = tmp_path / "checkpoint"
    file.write_bytes(content)
    sentence = outcome(lambda: open_checkpoint(file), REFUSALS, seconds=20, megabytes=600)
    assert isinstance(sentence, str)
    assert str(file) in sentence


def test_zarr_arrays_whose_chunks_fill_the_memory(tmp_path):
    pytest.importorskip("tensorstore")
    (tmp_path / "checkpoint").touch()
    (tmp_path / "x").mkdir()
    for shape, chunks in (([4], [2**40]), ([2**40], [1]), ([2**20, 2**20], [2**20, 2**20])):
        layout = {"zarr_format": 2, "dtype": "<f4", "compressor": None, "fill_value": 0, "order": "C", "filters": None}
        (tmp_path / "x" / ".zarray").write_text(json.dumps({**layout, "shape": shape, "chunks": chunks}))
        refused(lambda: open_checkpoint(tmp_path), "which is not sensible")


MODEL_CONFIGS = {
    "blocks without end": (("encoder", "num_layers", 2**31 - 1), "num_layers"),
    "wide": (("hidden_size", 2**40), "hidden_size"),
    "huge pictures": (("image_size", 2**20), "image_size"),
    "a class to call": (("name", "os.system"), "name"),
    "a class to call, with arguments": (("name", "VisionTransformerMoe(x=__import__('os').system('true'))"), "name"),
    "deep code": (("name", "(" * 900), "name"),
}


@pytest.mark.parametrize(("change", "words"), MODEL_CONFIGS.values(), ids=MODEL_CONFIGS)
def test_reference_configs(change, words):
    config = json.loads((Path(__file__).parents[1] / "golden" / "vmoe_k2_vanilla.json").read_text())
    *path, key, value = change
    node = config
    for name in path:
        node = node[name]
    node[key] = value
    refused(lambda: model_settings(config, {"Encoder/posembed_input/pos_embedding": (1, 5, 8)}), words)


@pytest.mark.parametrize("content", [b"[" * 10**6, b'{"a":' * 10**6, b"9" * 5000, b"\xff\xfe", b""])
def test_reference_config_files(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    refused(lambda: resolve_config(tmp_path / "config.json"), "config.json")


# --- pictures --------------------------------------------------------------------------------------------------------


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
PICTURES: dict[str, tuple[bytes, str]] = {
    "100,000 x 100,000": (png_of(100_000, 100_000), "pixels"),
    "a strip": (png_of(1, 1_000_000), "sides beyond"),
    "no rows": (png_of(100, 100), "unreadable"),
    "a comment of 100 MB": (png_with_text(100 * 2**20), "unreadable"),
    "PostScript, which Ghostscript would run": (EPS, "not a picture file"),
    "SVG": (b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>', "not a picture file"),
    "a pickle": (pickle.dumps({"a": 1}), "not a picture file"),
    "nothing": (b"", "not a picture file"),
}


@pytest.mark.parametrize(("content", "words"), PICTURES.values(), ids=PICTURES)
def test_pictures(tmp_path, canary, content, words):
    file = tmp_path / "cat.jpg"
    file.write_bytes(content.replace(b"CANARY", str(canary).encode()))
    refused(lambda: load_image(file), words, str(file))


def test_pictures_that_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "zeros.jpg").symlink_to("/dev/zero")
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    for name, words in (
        ("pipe.jpg", "regular file"),
        ("zeros.jpg", "regular file"),
        ("loop.jpg", "loop.jpg"),
        ("a\0b", "a"),
    ):
        refused(lambda name=name: load_image(tmp_path / name), words)


# --- lists of pictures, shards ---------------------------------------------------------------------------------------


def test_a_command_line_that_is_not_utf8_ends_with_a_sentence(capsys):
    with pytest.raises(SystemExit) as caught:
        parse_config(Config, ["--task=contrastive", "--output_dir", "/tmp/\udcff"], "train.py", "")
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith(r"train.py: error: command line: --output_dir /tmp/\udcff: not UTF-8")


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
    picture, path, settings = (folder / "a.png").read_bytes(), folder / "list.jsonl", {"type": "pairs"}
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
            for name, content in (("0.png", picture), ("0.json", json.dumps({"caption": caption}).encode())):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    else:
        datasets = pytest.importorskip("datasets")
        path, settings = tmp_path / "hf", {"type": "hf"}
        datasets.Dataset.from_list([{"image": picture, "caption": caption}]).save_to_disk(path)
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
        refused(lambda: build_dataset(SourceConfig("karpathy", str(folder / "list"))), "does not lie in image_root")
        return
    text = f"image,caption\n{path},x\n" if kind == "csv" else json.dumps({"image": path, "caption": "x"})
    (folder / f"list.{kind}").write_text(text)
    refused(lambda: build_dataset(SourceConfig("pairs", str(folder / f"list.{kind}"))), "lies outside of", "image_root")
    if not path.startswith("/proc"):
        pairs = build_dataset(SourceConfig("pairs", str(folder / f"list.{kind}"), image_root="/"))
        assert len(pairs) == 1  # for who says so


@pytest.mark.parametrize("path", ["..\\secret.png", "a\\..\\..\\b.png", "a/..\\..\\b.png"])
def test_lists_that_reach_out_on_windows(tmp_path, path):
    (tmp_path / "list.jsonl").write_text(json.dumps({"image": path, "caption": "x"}))
    refused(lambda: build_dataset(SourceConfig("pairs", str(tmp_path / "list.jsonl"))), "line 1", "out of its folder")
    entry = {"filename": path, "split": "train", "sentences": [{"raw": "x"}]}
    (tmp_path / "list").write_text(json.dumps({"images": [entry]}))
    refused(lambda: build_dataset(SourceConfig("karpathy", str(tmp_path / "list"))), "does not lie in image_root")


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
    "absolute": (tar_of("/etc/passwd.txt"), "absolute or leads out"),
    "out of it": (tar_of("../../x.txt"), "absolute or leads out"),
    "out of it, by a long name": (tar_of("a/" * 60 + "../" * 70 + "x.txt"), "absolute or leads out"),
    "out of it on Windows": (tar_of("..\\x.txt"), "absolute or leads out"),
    "a symbolic link": (tar_of("0.txt", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "a symbolic link"),
    "a hard link": (tar_of("0.txt", type=tarfile.LNKTYPE, linkname="/etc/passwd"), "a hard link"),
    "a device": (tar_of("0.txt", type=tarfile.CHRTYPE), "a character device"),
    "a pipe": (tar_of("0.txt", type=tarfile.FIFOTYPE), "a pipe"),
    "a gigantic member": (tar_of("0.jpg", type=tarfile.SYMTYPE, size=2**60), "extended header with size"),
    "a gigantic header": (tar_of("a" * 100_000 + ".txt"), "extended header"),
    "compressed": (b"\x1f\x8b" + zlib.compress(b"0" * 10**6), "compressed"),
    "a zip archive": (zip_of(b"x"), "compressed (zip)"),
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


# --- caches, terminals -----------------------------------------------------------------------------------------------


def test_caches_hold_no_pickles(tmp_path, monkeypatch, canary):
    from vmoe.data.shard_index import cache_file, scan
    from vmoe.evaluation.cache import read_tensors

    monkeypatch.setenv("VMOE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache" / "shards").mkdir(parents=True)
    (tmp_path / "0.tar").write_bytes(tar_of())
    array = np.empty(1, object)
    array[0] = Harm(canary)
    np.save(cache_file(str(tmp_path / "0.tar")), array, allow_pickle=True)
    assert (
        len(build_dataset(SourceConfig("shards", str(tmp_path / "0.tar")))) == len(scan(str(tmp_path / "0.tar"))) == 1
    )
    (tmp_path / "x.safetensors").write_bytes(pickle.dumps(Harm(canary)))
    assert read_tensors(tmp_path / "x.safetensors", "key") is None


def test_errors_do_not_act_on_the_terminal(capsys):
    from vmoe.command import exit_code

    def run() -> None:
        raise BadSample("\x1b]0;owned\x07\x1b[2J\u202egpj.exe", "torn")

    assert exit_code("vmoe-x", run) == 1
    assert capsys.readouterr().err == "vmoe-x: error: \\x1b]0;owned\\x07\\x1b[2J\\u202egpj.exe: torn\n"


# --- memory ----------------------------------------------------------------------------------------------------------

IN_LITTLE_MEMORY = """
import json, resource, sys
from pathlib import Path
import vmoe
from vmoe.config_io import parse_config, read_config
from vmoe.convert.sharded import open_flax
from vmoe.data.images import load_image
from vmoe.training.config import Config

folder = Path(sys.argv[1])
pages = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (pages + 400 * 2**20,) * 2)
for name, read in (
    ("laughs.yaml", lambda file: read_config(Config, ["--config", str(file)])),
    ("checkpoint", open_flax),
    ("picture.png", load_image),
    ("comment.png", load_image),
    ("model.safetensors", lambda file: vmoe.create_model(pretrained=file)),
):
    try:
        read(folder / name)
    except Exception as error:
        print(name, type(error).__name__, len(str(error).splitlines()))
"""


def test_all_that_would_fill_the_memory_in_a_process_with_little_of_it(good_file, tmp_path):
    (tmp_path / "laughs.yaml").write_text(LAUGHS)
    (tmp_path / "checkpoint").write_bytes(PACKED["long names"])
    (tmp_path / "picture.png").write_bytes(PICTURES["100,000 x 100,000"][0])
    (tmp_path / "comment.png").write_bytes(PICTURES["a comment of 100 MB"][0])
    with_settings(
        good_file, tmp_path / "model.safetensors", lambda settings: settings["kwargs"].update(embed_dim=2**20)
    )
    command = [sys.executable, "-c", IN_LITTLE_MEMORY, str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    assert ran.stdout.split("\n")[:-1] == [
        "laughs.yaml ConfigError 1",
        "checkpoint CheckpointError 1",
        "picture.png BadSample 1",
        "comment.png BadSample 1",
        "model.safetensors WeightsError 1",
    ]
