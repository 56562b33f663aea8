"""Exported files give what the model gives, whatever the batch, in PyTorch and in ONNX Runtime."""

import sys
from unittest.mock import patch

import open_clip
import pytest
import timm
import torch
from timm.models._hub import save_for_hf
from torch import nn

import vmoe
from vmoe.export.check import BATCHES, TOLERANCE
from vmoe.export.part import take_part
from vmoe.moe.config import PRESETS

SIZE = {"img_size": 16, "patch_size": 8, "depth": 1, "num_heads": 2, "num_experts": 2, "moe_layers": "every1"}
IMAGE = {**SIZE, "embed_dim": 16}
TEXT = {"vocab_size": 100, "eot_token_id": 99, "width": 16, "depth": 1, "num_heads": 2, "context_length": 6}
TEXT |= {"moe_layers": "every1", "num_experts": 2}
LIMITED = {"eval_capacity_factor": 1.05, "batch_priority": True, "num_selected_experts": 2}


def image_model(**settings):
    return vmoe.create_model("vmoe_tiny_patch8_48", **{**IMAGE, "num_classes": 5, **settings})


def swin_moe(**settings):
    return vmoe.create_model("swin_moe_tiny_patch4_window4_32", embed_dim=16, num_classes=5, **settings)


def limoe(**settings):
    return vmoe.create_model("limoe_tiny_patch8_48", **{**SIZE, **TEXT, "embed_dim": 8, **settings})


def two_tower(**settings):
    text = {**TEXT, **settings}
    return vmoe.create_model("two_tower_tiny_patch8_48", image={**IMAGE, **settings}, text=text, embed_dim=8)


def upcycled(**settings):
    size = {key: IMAGE[key] for key in ("img_size", "embed_dim", "depth", "num_heads")}
    return vmoe.upcycle(timm.create_model("vit_tiny_patch16_224", **size, num_classes=3), layers=[0], **settings)


def upcycled_clip(**settings):
    vision = {"image_size": 16, "patch_size": 8, "width": 64, "layers": 2, "head_width": 32}
    text = {"context_length": 8, "vocab_size": 60, "width": 32, "heads": 2, "layers": 2}
    return vmoe.upcycle(open_clip.CLIP(32, vision, text), **settings)


def trained(make, **settings):
    """Weights as training leaves them: gates that differ, no classifier of zeros."""
    torch.manual_seed(0)
    model = make(**settings)
    for parameter in model.parameters():
        if parameter.ndim:
            nn.init.normal_(parameter, std=0.3)
    return model


def onnxruntime():
    return pytest.importorskip("onnxruntime", reason="needs ONNX Runtime (pip install -e '.[test]')")


def check(model, file, format, **options):
    """Exports, and compares again by other inputs and another size of batch than `export_model` does."""
    if format == "onnx":
        onnxruntime()
    programs = []  # that `export_model` itself has loaded again: reading them is a quarter of the time

    def load(*arguments, load=torch.export.load, **kwargs):
        programs.append(load(*arguments, **kwargs))
        return programs[-1]

    with patch.object(torch.export, "load", load):
        exported = vmoe.export_model(model, file, format, **options)
    part = take_part(model, options.get("part"))
    assert {(row.batch, row.output) for row in exported.differences} == {(b, o) for b in BATCHES for o in part.outputs}
    inputs = part.example(5, torch.Generator().manual_seed(7))
    with torch.no_grad():
        expected = part(*inputs)
    if format == "onnx":
        session = onnxruntime().InferenceSession(file, providers=["CPUExecutionProvider"])
        feed = {name: tensor.numpy() for name, tensor in zip(part.inputs, inputs, strict=True)}
        found = map(torch.from_numpy, session.run(None, feed))
    elif options.get("compile"):
        found = torch._inductor.aoti_load_package(str(file))(*inputs)
    else:
        (program,) = programs
        found = program.module()(*inputs)
    for ours, theirs in zip(expected, found, strict=True):
        assert (ours - theirs).abs().max() <= TOLERANCE * ours.abs().max()


def test_an_exported_file_gives_what_the_model_gives(tmp_path):
    model = trained(image_model, **LIMITED)
    check(model, tmp_path / "model.onnx", "onnx")
    assert model.training  # it was left as it was
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]


SHORT = ["groups of several images", "soft in groups of several images", "expert choice", "two towers", "upcycled"]


@pytest.mark.parametrize(("name", "format"), [("limoe", "onnx"), *((name, "pt2") for name in SHORT)])
def test_others_too(tmp_path, name, format):  # all in both formats: test_every_model_in_every_format
    make, settings = MODELS[name]
    check(trained(make, **settings), tmp_path / f"model.{format}", format)


ROUTERS = {
    "one": {},
    "two": {"num_selected_experts": 2},
    "one limited": {**LIMITED, "num_selected_experts": 1},
    "two limited": LIMITED,
    "in order": {"eval_capacity_factor": 0.5},
    "rounded": {"eval_capacity_factor": 1.1, "capacity_rounding": "round", "capacity_multiple_of": 1},
    "fixed": {"capacity": 3, "num_selected_experts": 2},
    "groups": {**LIMITED, "group_size": 7},
    "groups of several images": {**LIMITED, "group_size": 37},
    "a group larger than a batch": {**LIMITED, "group_size": 1000},
    "expert choice": {"router": "expert_choice"},
    "expert choice in groups": {"router": "expert_choice", "group_size": 7},
    "whole images": {**LIMITED, "per_image": True},
    "soft": {"router": "soft"},
    "soft in groups": {"router": "soft", "group_size": 7},
    "soft in groups of several images": {"router": "soft", "group_size": 40},
    "expert choice in groups of several images": {"router": "expert_choice", "group_size": 37},
    **{f"preset {name}": {"router_preset": name, "num_experts": 4} for name in PRESETS},
}
MODELS = {
    **{name: (image_model, settings) for name, settings in ROUTERS.items()},
    "norm": (image_model, {"scale_mlp_norm": True}),
    "map": (image_model, {"global_pool": "map", "qk_norm": True, "class_token": False, "pos_embed": "sincos2d"}),
    "upcycled CLIP": (upcycled_clip, {"num_experts": 2, "layers": "every2"}),
    "dense": (image_model, {"num_experts": 0}),
    "swin_moe": (swin_moe, {}),
    "swin_moe with a cosine gate": (swin_moe, {"gate": "cosine", "cosine_dim": 6}),
    "limoe": (limoe, {}),
    "limoe map": (limoe, {"pool": "map", "init_logit_bias": -10.0}),
    "limoe limited": (limoe, LIMITED),
    "limoe expert choice": (limoe, {"router": "expert_choice"}),
    "limoe soft": (limoe, {"router": "soft"}),
    "two towers": (two_tower, {}),
    "two towers limited": (two_tower, LIMITED),
    "two towers expert choice": (two_tower, {"router": "expert_choice"}),
    "two towers soft": (two_tower, {"router": "soft"}),
    "upcycled": (upcycled, {"num_experts": 2}),
    "upcycled limited": (upcycled, {"num_experts": 2, **LIMITED}),
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("format", ["pt2", "onnx"])
@pytest.mark.parametrize(("make", "settings"), MODELS.values(), ids=MODELS)
def test_every_model_in_every_format(tmp_path, make, settings, format):
    check(trained(make, **settings), tmp_path / f"model.{format}", format)


@pytest.mark.exhaustive
@pytest.mark.parametrize("format", ["pt2", "onnx"])
@pytest.mark.parametrize("kind", ["int8", "bfloat16"])
def test_experts_of_fewer_bytes(tmp_path, kind, format):
    check(vmoe.quantize_experts(trained(image_model, **LIMITED), kind), tmp_path / f"model.{format}", format)


@pytest.mark.exhaustive
@pytest.mark.parametrize("part", ["image", "text"])
@pytest.mark.parametrize("make", [limoe, two_tower])
def test_a_tower_alone(tmp_path, make, part):
    check(trained(make), tmp_path / "tower.onnx", "onnx", part=part)


@pytest.mark.exhaustive  # a compiler for C++ takes minutes
@pytest.mark.parametrize("name", ["two limited", "expert choice", "soft", "limoe"])
def test_a_compiled_package(tmp_path, name):
    make, settings = MODELS[name]
    check(trained(make, **settings), tmp_path / "model.pt2", "pt2", compile=True)


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    onnxruntime()
    for name in ("onnxruntime", "onnxscript", "onnx"):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ModuleNotFoundError, match=rf"need the package {name}: pip install -e '.\[export\]' in"):
            vmoe.export_model(image_model(), tmp_path / "x.onnx", "onnx")


def test_weights_that_onnx_cannot_hold_are_refused(tmp_path, monkeypatch):
    onnxruntime()
    monkeypatch.setattr("vmoe.export.onnx.MAX_BYTES", 1000)
    with pytest.raises(ValueError, match="and an ONNX file holds 2: choose the format pt2"):
        vmoe.export_model(image_model(), tmp_path / "x.onnx", "onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_differs_is_not_written(tmp_path, monkeypatch):
    """Also where no input can be drawn for which rounding would explain it."""

    def write(part, program, metadata, draft):
        draft.write_bytes(b"wrong")
        return lambda *inputs: [output * 1.001 for output in part(*inputs)]

    monkeypatch.setattr("vmoe.export.exporter.trace", lambda part: None)
    monkeypatch.setattr("vmoe.export.exporter.write_program", write)
    with pytest.raises(ValueError, match=r"would differ from the model's by 1.0e-03 of the largest, more than 1e-05"):
        vmoe.export_model(trained(image_model), tmp_path / "x.pt2", "pt2")
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_a_program_is_refused(tmp_path):
    class Strange(nn.Module):
        num_classes = 2

        def forward(self, x):
            return x.mean((2, 3))[:, :2] if x.sum() > 0 else x.new_zeros(len(x), 2)

    with pytest.raises(ValueError, match="Strange cannot be exported for batches of any size"):
        vmoe.export_model(Strange(), tmp_path / "x.pt2", "pt2")
    assert list(tmp_path.iterdir()) == []


def test_an_input_at_a_tie_is_drawn_again(tmp_path, monkeypatch):
    """Tokens between two experts: a file may take the other one, which is counted and not hidden."""
    from vmoe.export import check

    model = trained(image_model)
    part = take_part(model, None)
    drawn = []
    monkeypatch.setattr(check, "_sensitivity", lambda *_: 1.0 if len(drawn) == 1 else 0.0)

    def run(*inputs):
        drawn.append(inputs)
        return [output + (len(drawn) == 1) for output in part(*inputs)]

    rows = check.differences(part, run)
    assert [row.redrawn for row in rows] == [1, 0, 0]
    assert max(row.relative for row in rows) <= TOLERANCE


def test_weights_changed_in_their_last_digits_move_a_token_at_a_tie():
    from vmoe.export import check

    part = take_part(trained(image_model), None)
    generator = torch.Generator().manual_seed(0)
    inputs = part.example(1, generator)
    with torch.no_grad():
        assert check._sensitivity(part, inputs, part(*inputs), generator) < TOLERANCE
        part.model.blocks[0].mlp.router.weight[1] = part.model.blocks[0].mlp.router.weight[0]  # all tokens tie
        assert check._sensitivity(part, inputs, part(*inputs), generator) > 1e-3


def test_a_model_in_memory_as_safetensors(tmp_path):
    model, file = trained(image_model), tmp_path / "model.safetensors"
    assert "the weights that it has now" in vmoe.export_model(model, file).read
    made = vmoe.create_model(pretrained=file)
    assert all(torch.equal(tensor, made.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_a_folder_that_timm_wrote_becomes_one_file(tmp_path):
    sizes = {key: IMAGE[key] for key in ("img_size", "patch_size", "embed_dim", "depth", "num_heads")}
    model = timm.create_model("vit_tiny_patch16_224", **sizes)
    save_for_hf(model, tmp_path / "timm", model_args=sizes, safe_serialization=True)
    file = tmp_path / "one.safetensors"
    vmoe.export_model(tmp_path / "timm", file)
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(vmoe.create_model(pretrained=file).eval()(images), model.eval()(images))
    with pytest.raises(ValueError, match="timm is no run, so --raw has no other weights to take"):
        vmoe.export_model(tmp_path / "timm", file, raw=True)


@pytest.mark.parametrize(("name", "format"), [("x.pt2", "pt2"), ("x", "hub")])
def test_a_model_that_gives_nan_is_named(tmp_path, name, format):
    model = trained(image_model)
    nn.init.constant_(model.head.bias, torch.nan)
    with pytest.raises(ValueError, match="the model itself gives NaN"):
        vmoe.export_model(model, tmp_path / name, format)
    assert not list(tmp_path.iterdir())


def test_a_hub_folder_that_differs_is_not_written(tmp_path, monkeypatch):
    model = trained(image_model)
    vmoe.export_model(model, tmp_path / "old", "hub")
    before = {file.name: file.read_bytes() for file in (tmp_path / "old").iterdir()}
    monkeypatch.setattr("vmoe.export.exporter.create_model", lambda pretrained: trained(image_model, num_experts=0))
    for name in ("old", "new"):
        with pytest.raises(ValueError, match=f"{name} is not written: .* would differ from the model's"):
            vmoe.export_model(model, tmp_path / name, "hub")
    assert [folder.name for folder in tmp_path.iterdir()] == ["old"]
    assert {file.name: file.read_bytes() for file in (tmp_path / "old").iterdir()} == before
