"""Weights and checkpoints made to do harm, each with the sentence that refuses it."""

import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import msgpack
import pytest
import torch

import vmoe
from vmoe.convert.settings import model_settings
from vmoe.convert.to_safetensors import open_checkpoint, resolve_config
from vmoe.models.manifest import find_problems, write_manifest
from vmoe.models.serialization import METADATA_KEY
from vmoe.training.optimizer_state import import_state

from .bounds import outcome
from .hostile import REFUSALS, Harm, refused, with_settings, zip_of

SETTINGS = {
    "another file": (lambda s: s["kwargs"].update(checkpoint_path="/etc/passwd"), "kwargs.checkpoint_path would load"),
    "a download": (lambda s: s["kwargs"].update(pretrained=True), "kwargs.pretrained would load"),
    "an address": (lambda s: s["kwargs"].update(pretrained_cfg={"url": "http://x"}), "pretrained_cfg would load"),
    "an address beside": (lambda s: s["kwargs"].update(pretrained_cfg_overlay={"url": "http://x"}), "nothing but"),
    "a hub": (lambda s: s.update(name="hf-hub:some/model"), "no name of a model"),
    "a tower of a hub": (lambda s: s["kwargs"].update(image={"name": "hf-hub:some/model"}), "no name of a model"),
    "wide": (lambda s: s["kwargs"].update(embed_dim=2**20), "no model can be built", "much larger"),
    "wider than PyTorch": (lambda s: s["kwargs"].update(embed_dim=2**30), "no model can be built", "much larger"),
    "deep": (lambda s: s["kwargs"].update(depth=10**8), "whole number, at most 1000"),
    "deep in a stage": (lambda s: s["kwargs"].update(depth=[2, 10**8]), "whole number, at most 1000"),
    "many experts": (lambda s: s["kwargs"].update(num_experts=2**30), "no model can be built", "much larger"),
    "huge images": (lambda s: s["kwargs"].update(img_size=2**20), "whole number, at most 8192"),
    "huge images beside": (
        lambda s: s["kwargs"].update(pretrained_cfg_overlay={"input_size": [3, 2**20, 2**20]}),
        "whole number, at most 8192",
    ),
    "no images": (lambda s: s["kwargs"].update(img_size=0), "whole number, at most 8192"),
    "a depth of nothing": (lambda s: s["kwargs"].update(depth=[]), "whole number, at most 1000"),
    "an infinite mean": (lambda s: s["preprocess"].update(mean=[float("inf")] * 3), "preprocess.mean is not"),
    "a mean of one number": (lambda s: s["preprocess"].update(mean=0.5), "preprocess.mean is not"),
    "a list of crops": (lambda s: s["preprocess"].update(crop_pct=[0.5]), "preprocess.crop_pct is not"),
    "sizes in lists": (lambda s: s["preprocess"].update(input_size=[[3], [48], [48]]), "preprocess.input_size is not"),
    "interpolations": (lambda s: s["preprocess"].update(interpolation=["bicubic"]), "preprocess.interpolation is not"),
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
    "long names": msgpack.packb(
        {"k" * 60_000: {str(i): msgpack.ExtType(1, b"\x93\x90\xa5int32\xc4\x00") for i in range(9)}}
    ),
    "long names inside each other": b"".join(b"\x81" + msgpack.packb("k" * 60_000) for _ in range(100)) + b"\x01",
    "a pickle": pickle.dumps([1, 2, 3]),
}


@pytest.mark.parametrize("content", PACKED.values(), ids=PACKED)
def test_reference_checkpoints(tmp_path, content):
    file = tmp_path / "checkpoint.index"
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
    "huge images": (("image_size", 2**20), "image_size"),
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
