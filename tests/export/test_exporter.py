"""Exported files give what the model gives, whatever the batch, in PyTorch and in ONNX Runtime."""

import re
import subprocess
import sys

import open_clip
import pytest
import timm
import torch
from timm.models._hub import save_for_hf
from torch import nn

import vmoe
from vmoe.cli.export import main
from vmoe.export.check import BATCHES, TOLERANCE
from vmoe.export.exporter import _load
from vmoe.export.part import take_part
from vmoe.moe.config import PRESETS
from vmoe.training.checkpoint import Checkpointer

SIZE = {"img_size": 16, "patch_size": 8, "depth": 1, "num_heads": 2, "num_experts": 2, "moe_layers": "every1"}
IMAGE = {**SIZE, "embed_dim": 16}
TEXT = {"vocab_size": 100, "eot_token_id": 99, "width": 16, "depth": 1, "num_heads": 2, "context_length": 6}
TEXT |= {"moe_layers": "every1", "num_experts": 2}
LIMITED = {"eval_capacity_factor": 1.05, "batch_priority": True, "num_selected_experts": 2}


def image_model(**settings):
    return vmoe.create_model("vmoe_tiny_patch8_48", **{**IMAGE, "num_classes": 5, **settings})


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


def run_onnx(file, **inputs):
    runtime = pytest.importorskip("onnxruntime", reason="needs ONNX Runtime (pip install -e '.[test]')")
    session = runtime.InferenceSession(file, providers=["CPUExecutionProvider"])
    outputs = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    return dict(zip([output.name for output in session.get_outputs()], map(torch.from_numpy, outputs), strict=True))


def check(model, file, format, **options):
    """Exports, and compares again by other inputs and another size of batch than `export_model` does."""
    pytest.importorskip("onnx" if format == "onnx" else "torch", reason="needs ONNX (pip install -e '.[test]')")
    exported = vmoe.export_model(model, file, format, **options)
    part = take_part(model, options.get("part"))
    assert {(row.batch, row.output) for row in exported.differences} == {(b, o) for b in BATCHES for o in part.outputs}
    inputs = part.example(5, torch.Generator().manual_seed(7))
    with torch.no_grad():
        expected = part(*inputs)
    if format == "onnx":
        found = run_onnx(file, **dict(zip(part.inputs, inputs, strict=True))).values()
    elif options.get("compile"):
        found = torch._inductor.aoti_load_package(str(file))(*inputs)
    else:
        found = torch.export.load(file).module()(*inputs)
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
    "soft": {"router": "soft"},
    "soft in groups": {"router": "soft", "group_size": 7},
    "soft in groups of several images": {"router": "soft", "group_size": 40},
    "expert choice in groups of several images": {"router": "expert_choice", "group_size": 37},
    **{f"preset {name}": {"router_preset": name} for name in PRESETS},
}
MODELS = {
    **{name: (image_model, settings) for name, settings in ROUTERS.items()},
    "norm": (image_model, {"scale_mlp_norm": True}),
    "map": (image_model, {"global_pool": "map", "qk_norm": True, "class_token": False, "pos_embed": "sincos2d"}),
    "upcycled CLIP": (upcycled_clip, {"num_experts": 2, "layers": "every2"}),
    "dense": (image_model, {"num_experts": 0}),
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


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    model, average = trained(image_model), trained(image_model)
    nn.init.ones_(model.head.bias)
    nn.init.zeros_(average.head.bias)
    optimizer = torch.optim.SGD(model.parameters())
    Checkpointer(folder, 1).save(1, model, average, optimizer, {}, {"class_names": list("abcde")})
    return folder


LOAD = """
import json, sys, torch
facts = {"vmoe.json": ""}
program = torch.export.load("model.pt2", extra_files=facts)
assert json.loads(facts["vmoe.json"])["extra"]["class_names"] == list("abcde")
images = torch.ones(3, *json.loads(facts["vmoe.json"])["preprocess"]["input_size"])
torch.save(program.module()(images)[0], "logits.pt")
assert not any(name.startswith(("vmoe", "timm")) for name in sys.modules)
"""


def test_a_program_of_a_run_needs_no_vmoe(run, tmp_path, capsys):
    file = tmp_path / "new" / "model.pt2"
    assert main([str(run), "--output", str(file), "--format", "pt2"]) == 0
    shown = capsys.readouterr().out
    assert "step_000001/ema.safetensors: the moving average of the weights, which eval.py measures too" in shown
    assert re.search(r"7 .*logits .*0\.0e\+00 .*0\.0e\+00 .*0 ", shown)
    subprocess.run([sys.executable, "-c", LOAD], cwd=file.parent, check=True)
    model = vmoe.create_model(pretrained=run).eval()  # what eval.py measures
    with torch.no_grad():
        torch.testing.assert_close(torch.load(file.parent / "logits.pt"), model(torch.ones(3, 3, 16, 16)))


@pytest.mark.parametrize("raw", [True, False])
def test_which_weights_are_taken_is_said(run, raw):
    model, read, _ = _load(run, raw)
    assert bool(model.head.bias.all()) == raw
    assert ("as they were trained, not their moving average" if raw else "ema.safetensors: the moving") in read
    file = run / "checkpoints" / "step_000001" / "model.safetensors"
    assert _load(file, False)[1].startswith(str(file))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--output", "x.pt2", "--format", "pth"], "--format pth: choose one of safetensors, "),
        (["--output", "x.onnx", "--format", "pt2"], "x.onnx: give a name that ends with .pt2"),
        (["--output", "x.onnx"], "x.onnx: give a name that ends with .safetensors"),
        (["--output", "checkpoints/step_000001/x.pt2", "--format", "pt2"], "lies in the checkpoint .*step_000001, wh"),
        (["--output", "folder.onnx", "--format", "onnx"], "folder.onnx is a folder; give"),
        (["--output", "file/x.pt2", "--format", "pt2"], "x.pt2 cannot be written .*; free some space or"),
        (["--output", "x.onnx", "--format", "onnx", "--compile"], "--compile makes a package of the format pt2, not o"),
        (["--output", "x.safetensors", "--part", "text"], "--part is for the formats pt2 and onnx"),
        (["--output", "x.onnx", "--format", "onnx", "--part", "text"], "takes images alone, so it has no part 'text'"),
    ],
)
def test_mistakes_are_one_sentence_and_write_nothing(run, monkeypatch, capsys, argv, message):
    monkeypatch.chdir(run)
    (run / "folder.onnx").mkdir(exist_ok=True)
    (run / "file").touch()
    before = sorted(run.rglob("*"))
    assert main([".", *argv]) == 1
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    assert re.search(message, shown)
    assert sorted(run.rglob("*")) == before


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("vmoe.export.onnx.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"onnx, onnxscript, onnxruntime: pip install -e '.\[export\]'"):
        vmoe.export_model(image_model(), tmp_path / "x.onnx", "onnx")


def test_weights_that_onnx_cannot_hold_are_refused(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime", reason="needs ONNX Runtime (pip install -e '.[test]')")
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
    assert check.exceeds(rows) is None


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


def test_a_hub_folder_has_the_metrics_of_the_runs_evaluation(tmp_path, capsys):
    """Of these weights alone: not of the trained ones beside their moving average, nor of an earlier step."""
    model = trained(image_model)
    for step, evaluated in ((1, 1), (2, 1)):
        state = {"step": step, "progress": {"evaluated": evaluated, "evaluation": {"top1": 0.875}}}
        Checkpointer(tmp_path, 2).save(step, model, model, torch.optim.SGD(model.parameters()), state, {})
    first, second = sorted((tmp_path / "checkpoints").iterdir())
    cards = []
    for source, options in ((first, []), (first, ["--raw"]), (second, [])):
        hub = tmp_path / "hub"
        assert main([str(source), "--format", "hub", "--output", str(hub), "--license", "mit", *options]) == 0
        assert "wrote" in capsys.readouterr().out
        cards.append((hub / "README.md").read_text())
        assert all("license: mit" in card for card in cards)
    assert ["0.875" in card for card in cards] == [True, False, False]
    images = torch.randn(2, 3, 16, 16)
    made = timm.create_model(f"local-dir:{hub}", pretrained=True).eval()
    assert torch.equal(made(images), model.eval()(images))
    assert main([str(first), "--output", str(tmp_path / "a.safetensors"), "--license", "mit"]) == 1
    assert "--license is for the model card of the format hub" in capsys.readouterr().err


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


def test_a_model_that_gives_nan_is_named(tmp_path):
    model = trained(image_model)
    nn.init.constant_(model.head.bias, torch.nan)
    with pytest.raises(ValueError, match="the model itself gives NaN"):
        vmoe.export_model(model, tmp_path / "x.pt2", "pt2")
    assert not list(tmp_path.iterdir())


def test_a_hub_folder_that_differs_is_not_written(tmp_path, monkeypatch):
    model = trained(image_model)
    vmoe.export_model(model, tmp_path / "old", "hub")
    before = {file.name: file.read_bytes() for file in (tmp_path / "old").iterdir()}
    broken = trained(image_model)
    nn.init.constant_(broken.head.bias, float("nan"))
    for name in ("new", "old"):
        with pytest.raises(ValueError, match="the model itself gives NaN"):
            vmoe.export_model(broken, tmp_path / name, "hub")
    monkeypatch.setattr("vmoe.export.exporter.create_model", lambda pretrained: trained(image_model, num_experts=0))
    with pytest.raises(ValueError, match="old is not written: .* would differ from the model's"):
        vmoe.export_model(model, tmp_path / "old", "hub")
    assert [folder.name for folder in tmp_path.iterdir()] == ["old"]
    assert {file.name: file.read_bytes() for file in (tmp_path / "old").iterdir()} == before
