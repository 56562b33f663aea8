import errno
import os
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file

import vmoe
from vmoe.cli.export import main
from vmoe.evaluation.loaded_model import load_model
from vmoe.models.manifest import find_problems
from vmoe.training.checkpoint import Checkpointer

SMALL = {"img_size": 16, "patch_size": 8, "embed_dim": 8, "depth": 1, "num_heads": 2, "num_experts": 2}


def build(seed):
    torch.manual_seed(seed)
    return vmoe.create_model("vmoe_tiny_patch8_48", num_classes=3, moe_layers="every1", **SMALL)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    model = build(0)
    for step, ema in ((1, None), (2, build(1))):
        Checkpointer(folder, 2).save(step, model, ema, torch.optim.SGD(model.parameters()), {}, {"class_names": ["a"]})
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


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([".", "--output", "out.pt"], "ends with .safetensors"),
        (["nowhere", "--output", "out.safetensors"], "nowhere: it does not exist"),
        (["checkpoints/step_000001/model.safetensors", "--output", "out.safetensors"], "is one file already"),
        ([".", "--output", "checkpoints/step_000002/out.safetensors"], "lies in the checkpoint .*step_000002, which"),
        ([".", "--output", "checkpoints/step_000002/model.safetensors"], "lies in the checkpoint .*step_000002, which"),
        ([".", "--output", "checkpoints/step_000002/new/out.safetensors"], "lies in the checkpoint .*step_000002, wh"),
    ],
)
def test_mistakes_are_one_sentence_and_write_nothing(run, monkeypatch, capsys, argv, message):
    monkeypatch.chdir(run)
    assert main(argv) == 1
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    assert re.search(message, shown)
    assert [path.name for path in run.iterdir()] == ["checkpoints"]
    assert not any(find_problems(folder) for folder in (run / "checkpoints").iterdir())


def test_a_copy_of_a_checkpoint_and_a_part_of_one_are_known(run, tmp_path, capsys):
    copy = shutil.copytree(run / "checkpoints" / "step_000002", tmp_path / "copy")
    assert main([str(run), "--output", str(copy / "out.safetensors")]) == 1
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

    monkeypatch.setattr(os, "posix_fallocate", full)
    assert main([str(run), "--output", str(tmp_path / "model.safetensors")]) == 1
    assert "model.safetensors cannot be written (No space left on device); free" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
