import errno
import os
import re
import shutil
import subprocess
import sys

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn

import vmoe
from vmoe.cli.export import main
from vmoe.evaluation.loaded_model import load_model
from vmoe.models.manifest import find_problems
from vmoe.training.checkpoint import Checkpointer

SMALL = {"img_size": 16, "patch_size": 8, "embed_dim": 8, "depth": 1, "num_heads": 2, "num_experts": 2}
FACTS = {"class_names": list("abc")}


def build(seed):
    torch.manual_seed(seed)
    model = vmoe.create_model("vmoe_tiny_patch8_48", num_classes=3, moe_layers="every1", **SMALL)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)  # as trained: no classifier of zeros
    return model


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    model = build(0)
    for step, ema in ((1, None), (2, build(1))):
        Checkpointer(folder, 2).save(step, model, ema, torch.optim.SGD(model.parameters()), {}, FACTS)
    return folder


def same(file, model):
    weights = load_file(file)
    return weights.keys() == model.state_dict().keys() and all(
        torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items()
    )


def test_a_runs_newest_checkpoint_becomes_one_file(run, tmp_path, capsys):
    file = tmp_path / "new" / "model.safetensors"
    assert main([str(run), "--output", str(file)]) == 0
    shown = capsys.readouterr().out
    assert "step_000002/ema.safetensors: the moving average of the weights, which eval.py measures too" in shown
    assert f"{sum(t.numel() for t in build(0).state_dict().values()):,} numbers" in shown
    assert same(file, build(1))
    made = vmoe.create_model(pretrained=file)  # needs nothing else
    assert same(file, made)
    assert same(file, load_model(str(run)).model)  # what eval.py measures
    assert main([str(run), "--output", str(file), "--raw"]) == 0
    assert "step_000002/model.safetensors: the weights as they were trained" in capsys.readouterr().out
    assert same(file, build(0))
    for raw in ([], ["--raw"]):  # a checkpoint without a moving average
        assert main([str(run / "checkpoints" / "step_000001"), "--output", str(file), *raw]) == 0
        shown = capsys.readouterr().out
        assert "step_000001/model.safetensors: the weights, which eval.py measures too; the run kept no" in shown
        assert same(file, build(0))
    assert [path.name for path in file.parent.iterdir()] == [file.name]


LOAD = """
import json, sys, torch
facts = {"vmoe.json": ""}
program = torch.export.load("model.pt2", extra_files=facts)
assert json.loads(facts["vmoe.json"])["extra"]["class_names"] == list("abc")
images = torch.ones(3, *json.loads(facts["vmoe.json"])["preprocess"]["input_size"])
torch.save(program.module()(images)[0], "logits.pt")
assert not any(name.startswith(("vmoe", "timm")) for name in sys.modules)
"""


def test_a_program_of_a_run_needs_no_vmoe(run, tmp_path, capsys):
    file = tmp_path / "new" / "model.pt2"
    assert main([str(run), "--output", str(file), "--format", "pt2"]) == 0
    shown = capsys.readouterr()
    steps = ["tracing the model ...", f"writing {file} ...", "comparing the file with the model ..."]
    assert shown.err.splitlines() == steps
    assert "step_000002/ema.safetensors: the moving average of the weights, which eval.py measures too" in shown.out
    assert re.search(r"7 .*logits .*0\.0e\+00 .*0\.0e\+00 .*0 ", shown.out)
    subprocess.run([sys.executable, "-c", LOAD], cwd=file.parent, check=True)
    model = vmoe.create_model(pretrained=run).eval()
    with torch.no_grad():
        torch.testing.assert_close(torch.load(file.parent / "logits.pt"), model(torch.ones(3, 3, 16, 16)))


def test_a_hub_folder_has_the_metrics_of_the_runs_evaluation(tmp_path, capsys):
    """Of these weights alone: not of the trained ones beside their moving average, nor of an earlier step."""
    model, average = build(0).eval(), build(1).eval()
    for step, evaluated in ((1, 1), (2, 1)):
        state = {"step": step, "progress": {"evaluated": evaluated, "evaluation": {"top1": 0.875}}}
        Checkpointer(tmp_path, 2).save(step, model, average, torch.optim.SGD(model.parameters()), state, {})
    first, second = sorted((tmp_path / "checkpoints").iterdir())
    hub, images = tmp_path / "hub", torch.randn(2, 3, 16, 16)
    for source, options, weights, measured in (
        (first, [], average, True),
        (first, ["--raw"], model, False),
        (first / "model.safetensors", [], model, False),
        (second, [], average, False),
    ):
        assert main([str(source), "--format", "hub", "--output", str(hub), "--license", "mit", *options]) == 0
        assert ("as they were trained" in capsys.readouterr().out) == (weights is model)
        card = (hub / "README.md").read_text()
        assert ("license: mit" in card, "0.875" in card) == (True, measured)
        made = timm.create_model(f"local-dir:{hub}", pretrained=True).eval()
        assert torch.equal(made(images), weights(images))


INSIDE = "lies in the checkpoint .*step_000002, which another file would damage"


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["nowhere", "--output", "x.safetensors"], 1, "nowhere: it does not exist"),
        (["checkpoints/step_000001/model.safetensors", "--output", "x.safetensors"], 1, "is one file already"),
        ([".", "--output", "checkpoints/step_000002/x.safetensors"], 2, INSIDE),
        ([".", "--output", "checkpoints/step_000002/model.safetensors"], 2, INSIDE),
        ([".", "--output", "checkpoints/step_000002/new/x.safetensors"], 2, INSIDE),
        ([".", "--output", "checkpoints/step_000002/x.pt2", "--format", "pt2"], 2, INSIDE),
        ([".", "--output", "x.onnx"], 2, "x.onnx must end with .safetensors"),
        ([".", "--output", "x.onnx", "--format", "pt2"], 2, "x.onnx must end with .pt2"),
        ([".", "--output", "x.pt2", "--format", "pth"], 2, "format must be one of safetensors, .* got .pth."),
        ([".", "--output", "folder.onnx", "--format", "onnx"], 2, "folder.onnx cannot be written: give"),
        ([".", "--output", "file/x.pt2", "--format", "pt2"], 2, "x.pt2 cannot be written: give a file"),
        ([".", "--output", "x.onnx", "--format", "onnx", "--compile"], 2, "compile is for pt2, not for onnx; leave it"),
        ([".", "--output", "x.safetensors", "--part", "text"], 2, "part is for pt2 and onnx, not for safetensors"),
        ([".", "--output", "x.pt2", "--format", "pt2", "--license", "mit"], 2, "license is for hub, not for pt2"),
        (
            [".", "--output", "x.pt2", "--format", "pt2", "--part", "text"],
            1,
            "takes images alone, so it has no part",
        ),
    ],
)
def test_mistakes_are_one_sentence_and_write_nothing(run, monkeypatch, capsys, argv, code, message):
    monkeypatch.chdir(run)
    (run / "folder.onnx").mkdir(exist_ok=True)
    (run / "file").touch()
    before = sorted(run.rglob("*"))
    assert main(argv) == code
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    assert re.search(message, shown)
    assert sorted(run.rglob("*")) == before
    assert not any(find_problems(folder) for folder in (run / "checkpoints").iterdir())


def test_a_copy_of_a_checkpoint_and_a_part_of_one_are_known(run, tmp_path, capsys):
    copy = shutil.copytree(run / "checkpoints" / "step_000002", tmp_path / "copy")
    assert main([str(run), "--output", str(copy / "out.safetensors")]) == 2
    assert "lies in the checkpoint" in capsys.readouterr().err
    assert not find_problems(copy)
    (tmp_path / "ema").mkdir()
    (tmp_path / "ema" / "settings.json").write_text("{}")  # as in a sharded run's
    assert main([str(tmp_path / "ema"), "--output", str(tmp_path / "out.safetensors")]) == 1
    assert "ema is one part of a checkpoint; give the checkpoint's folder" in capsys.readouterr().err
    assert not (tmp_path / "out.safetensors").exists()


def test_a_damaged_checkpoint_is_not_exported(run, tmp_path, capsys):
    folder = run / "checkpoints" / "step_000001"
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"as it was")
    assert main([str(folder), "--output", str(file)]) == 1
    assert "step_000001 is damaged: model.safetensors does not have the SHA-256" in capsys.readouterr().err
    assert file.read_bytes() == b"as it was"


def test_a_full_disk_leaves_nothing(run, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert main([str(run), "--output", str(tmp_path / "model.safetensors")]) == 1
    assert "model.safetensors cannot be written (No space left on device); free" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
