"""Whole runs of a few steps."""

import io
import json
import math
import os
import signal
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import vmoe
from vmoe.cli.evaluate import run as evaluate
from vmoe.data import BadSample, SourceConfig
from vmoe.data.sources.folder import ImageFolder
from vmoe.evaluation.config import EvaluationConfig
from vmoe.models.manifest import list_checkpoints, step_of
from vmoe.training import objectives
from vmoe.training.checkpoint import CheckpointError
from vmoe.training.diagnosis import NonFiniteError
from vmoe.training.logger import read_metrics
from vmoe.training.objectives import Classification
from vmoe.training.trainer import Prefetch, Stopped, locked_folder, train
from vmoe.training.watches import CollapseWatch
from vmoe.utils.config import ConfigError

NAFLEX = {"data.loader.naflex.seq_lens": "[2, 6]", "data.loader.naflex.tokens_per_batch": 36}
TIMES = ("images_per_second", "data_wait_share")


def run(config):
    """(summary, what was printed)"""
    console = Console(file=io.StringIO(), width=400)
    return train(config, console), console.file.getvalue()


def interrupt_after(monkeypatch, step, action):
    """Does `action` at the end of the given step of the next run."""
    done = []

    def update(self, step_, layers):
        done.append(1)
        if len(done) == step:
            action()

    monkeypatch.setattr(CollapseWatch, "update", update)


def ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)


def fail():
    raise RuntimeError("the machine went down")


def metrics_of(config):
    """The lines of metrics.jsonl without clock times."""
    lines = read_metrics(_path(config) / "metrics.jsonl")
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def _path(config):
    return Path(config.output_dir)


def same_weights(first, second):
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("kind", "overrides"),
    [
        (
            "classification",
            {
                "data.augmentation.mixup": 0.5,
                "data.augmentation.color_jitter": 0.3,
                "model.kwargs.drop_path_rate": 0.2,
                "train.ema_decay": 0.9,
                "optim.layer_decay": 0.8,
            },
        ),
        ("contrastive", {"train.accumulate_steps": 2, "train.eval_every": 4}),
        ("classification", {"optim.name": "muon"}),
        ("classification", {"model.name": "vmoe_naflex_tiny_patch8", **NAFLEX}),
        ("contrastive", {"lora.targets": '["attention", "experts"]', "train.ema_decay": 0.9}),
    ],
)
def test_a_stopped_run_continues_bit_by_bit(make_config, tmp_path, monkeypatch, kind, overrides):
    straight = make_config(kind, **overrides)
    run(straight)

    stopped = make_config(kind, **overrides, output_dir=tmp_path / "stopped")
    with monkeypatch.context() as context:
        interrupt_after(context, 3, ctrl_c)
        with pytest.raises(Stopped, match="after step 3 of 6; the same command"):
            run(stopped)
    _, printed = run(stopped)
    assert "continuing after step 3" in printed

    files = ["model.safetensors"] + (["ema.safetensors"] if "train.ema_decay" in overrides else [])
    for file in files:
        ours = load_file(list_checkpoints(_path(stopped))[-1] / file)
        assert same_weights(ours, load_file(list_checkpoints(_path(straight))[-1] / file)), file
    assert metrics_of(stopped) == metrics_of(straight)
    assert [line["step"] for line in metrics_of(stopped)] == [1, 2, 3, 4, 5, 6]


def test_a_crash_loses_only_the_steps_since_the_last_checkpoint(make_config, tmp_path, monkeypatch):
    straight = make_config()
    run(straight)
    crashed = make_config(output_dir=tmp_path / "crashed", **{"train.checkpoint_every": 2})
    with monkeypatch.context() as context:
        interrupt_after(context, 6, fail)
        with pytest.raises(RuntimeError, match="went down"):
            run(crashed)
    assert [line["step"] for line in metrics_of(crashed)] == [1, 2, 3, 4, 5]
    half_written = _path(crashed) / "checkpoints" / "step_000005.unfinished"
    half_written.mkdir()
    (half_written / "model.safetensors").write_bytes(b"half")
    run(crashed)
    assert metrics_of(crashed) == metrics_of(straight)
    assert not half_written.exists()
    assert [step_of(folder) for folder in list_checkpoints(_path(crashed))] == [4, 6]


def test_the_number_of_workers_changes_nothing(make_config, tmp_path):
    alone = make_config(**{"train.steps": 3})
    helped = make_config(output_dir=tmp_path / "helped", **{"train.steps": 3, "data.loader.num_workers": 1})
    run(alone)
    run(helped)
    assert metrics_of(alone) == metrics_of(helped)


def test_a_cache_of_the_images_changes_nothing_but_the_speed(make_config, tmp_path, monkeypatch):
    settings = {"train.eval_every": 3, "data.augmentation.hflip": 0.5}
    plain = make_config(**settings, **{"data.cache": None})
    run(plain)
    memory = make_config(**settings, output_dir=tmp_path / "memory", **{"data.cache": "memory"})
    with monkeypatch.context() as context:
        interrupt_after(context, 3, ctrl_c)
        with pytest.raises(Stopped):
            run(memory)
    memory.data.loader.num_workers = 1
    _, printed = run(memory)
    assert "cache: 48 decoded images, " in printed
    assert metrics_of(memory) == metrics_of(plain)


def test_a_cache_larger_than_its_bound_is_refused_before_anything_is_written(make_config):
    config = make_config(**{"data.cache": "memory", "data.cache_gb": 1e-6})
    with pytest.raises(ConfigError, match="data.cache_gb is 1e-06, and the decoded images need about .*: raise it, or"):
        run(config)
    assert not Path(config.output_dir).exists()


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({}, "cache: 24 decoded images, "),  # 6 steps of 8 images: two epochs
        ({"train.steps": 2, "train.accumulate_steps": 3}, "cache: 24 decoded images, "),
        ({"train.steps": 5}, ""),
        ({"data.loader.batch_size": 7, "train.steps": None, "train.epochs": 2}, "cache: 24 decoded"),  # 3 are dropped
        ({"data.cache": None}, ""),
        ({"data.cache_gb": 1e-6}, "cache: none, data.cache_gb is 1e-06, and the decoded images need about 0.01 GB"),
    ],
)
def test_images_are_cached_if_they_are_read_again_and_fit(make_config, settings, line):
    _, printed = run(make_config(**settings))
    assert line in printed
    assert ("cache:" in printed) == bool(line)


def test_images_that_are_in_memory_are_cached_on_demand_alone(make_config, monkeypatch):
    monkeypatch.setattr(ImageFolder, "decoded", True)
    assert "cache:" not in run(make_config())[1]
    assert "cache: 24 decoded images, " in run(make_config(**{"data.cache": "memory", "train.steps": 7}))[1]


def test_a_run_learns_and_leaves_its_records(make_config):
    config = make_config(
        **{
            "train.steps": 20,
            "train.log_every": 10,
            "train.eval_every": 15,
            "train.tensorboard": True,
            "train.keep_last": 1,
            "train.checkpoint_every": 10,
            "optim.lr": 0.005,
            "evaluate.examples": 2,
        }
    )
    summary, printed = run(config)
    folder = _path(config)
    assert {entry.name for entry in folder.iterdir()} == {
        "config.yaml",
        "metrics.jsonl",
        "checkpoints",
        "tensorboard",
        "summary.json",
        "examples.png",
    }
    assert summary == json.loads((folder / "summary.json").read_text())
    assert summary["evaluation"]["top1"] > 0.9
    assert summary["parameters_active"] < summary["parameters_total"]
    assert summary["gflops_per_image"] > 0
    assert summary["images_per_second"] > 0
    lines = read_metrics(folder / "metrics.jsonl")
    assert [line["step"] for line in lines] == [10, 15, 20]
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    assert [image.step for image in events.Images("examples")] == [15]
    assert lines[-1]["evaluation/top1"] == summary["evaluation"]["top1"]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert 0 <= lines[-1]["data_wait_share"] <= 1
    assert lines[-1]["loss"] == pytest.approx(
        lines[-1]["task_loss"] + lines[-1]["routing/blocks.1.mlp/auxiliary_loss"], abs=1e-5
    )
    assert [step_of(checkpoint) for checkpoint in list_checkpoints(folder)] == [20]
    for words in ("active per token", "GFLOPs per image", "throughput", "top1"):
        assert words in printed

    # What was trained is what create_model loads, class names included.
    model = vmoe.create_model(pretrained=folder)
    assert model.num_classes == 3

    again, printed = run(config)
    assert again == summary
    assert "this run is finished (20 steps)" in printed


def test_a_folder_that_does_not_suit_is_refused_and_not_touched(make_config):
    config = make_config(**{"train.steps": 2})
    run(config)
    before = {path: path.stat().st_mtime_ns for path in _path(config).rglob("*")}
    with pytest.raises(ConfigError, match=r"already holds a run, and resume is 'never'"):
        run(make_config(resume="never", **{"train.steps": 2, "seed": 1}))
    with pytest.raises(ConfigError) as error:
        run(make_config(**{"train.steps": 4, "optim.lr": 0.5, "model.kwargs.num_experts": 2}))
    assert "model.kwargs.num_experts was 4, now 2" in str(error.value)
    assert "optim.lr was 0.001, now 0.5" in str(error.value)
    assert "train.steps" not in str(error.value)
    assert {path: path.stat().st_mtime_ns for path in _path(config).rglob("*")} == before
    for checkpoint in list_checkpoints(_path(config)):
        checkpoint.rename(_path(config) / "moved")
    with pytest.raises(ConfigError, match="finished run without its checkpoints"):
        run(config)


def test_a_loss_that_is_not_finite_stops_and_names_step_and_layer(make_config, monkeypatch):
    config = make_config(**{"train.checkpoint_every": 2})
    original, calls = Classification.loss, []

    def loss(self, model, batch, number):
        calls.append(number)
        if number == 4:  # the fifth batch: a layer overflows
            with torch.no_grad():
                model.blocks[1].norm2.weight.fill_(3e38)
        return original(self, model, batch, number)

    monkeypatch.setattr(Classification, "loss", loss)
    with pytest.raises(NonFiniteError) as error:
        run(config)
    assert "step 5: the loss (" in str(error.value)
    assert "blocks.1.norm2" in str(error.value)
    assert "step_000004" in str(error.value)
    assert [step_of(checkpoint) for checkpoint in list_checkpoints(_path(config))] == [2, 4]
    weights = load_file(list_checkpoints(_path(config))[-1] / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())
    assert [line["step"] for line in metrics_of(config)] == [1, 2, 3, 4]


def test_too_large_a_learning_rate_names_a_layer(make_config):
    config = make_config(**{"optim.lr": 1e30, "optim.name": "sgd", "train.clip_grad_norm": None, "train.steps": 20})
    with pytest.raises(NonFiniteError, match=r"step \d+: the (loss|gradient).*first such value is in the (output|w)"):
        run(config)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("kind", ["classification", "contrastive"])
def test_reduced_precision_trains(make_config, kind, precision):
    config = make_config(kind, **{"train.precision": precision, "train.steps": 2, "train.eval_every": 2})
    summary, _ = run(config)
    assert math.isfinite(summary["loss"])
    lines = metrics_of(config)
    assert ("grad_scale" in lines[-1]) == (precision == "fp16")


def test_accumulation_is_the_mean_gradient_of_its_batches(make_config, monkeypatch):
    """Two batches of 8 in one step: the gradient is that of their 16 images, for a dense model without noise."""
    gradients = {}
    for name, size, count in (("one", 16, 1), ("two", 8, 2)):
        config = make_config(
            output_dir=make_config().output_dir + name,
            **{
                "data.loader.batch_size": size,
                "train.accumulate_steps": count,
                "model.kwargs.num_experts": 0,
                "train.clip_grad_norm": None,
                "train.steps": 1,
                "data.augmentation.scale": "[1.0, 1.0]",
                "data.augmentation.ratio": "[1.0, 1.0]",
            },
        )
        run(config)
        gradients[name] = metrics_of(config)[0]
    assert gradients["one"]["loss"] == pytest.approx(gradients["two"]["loss"], rel=1e-5)
    assert gradients["one"]["grad_norm"] == pytest.approx(gradients["two"]["grad_norm"], rel=1e-4)


def test_fine_tuning_makes_a_new_head_and_resizes_positions(make_config, tmp_path):
    source = vmoe.create_model("vmoe_tiny_patch8_48", num_classes=7, **{**_tiny(make_config), "img_size": 48})
    torch.nn.init.normal_(source.pos_embed)
    vmoe.models.factory.save_pretrained(source, tmp_path / "source.safetensors")
    overrides = {
        "model.pretrained": tmp_path / "source.safetensors",
        "model.kwargs.img_size": 32,
        "train.freeze": '["blocks.*", "pos_embed"]',
        "train.steps": 2,
    }
    config = make_config(**overrides)
    run(config)
    (tmp_path / "source.safetensors").rename(tmp_path / "moved")  # a continued run does not need it any more
    config = make_config(**{**overrides, "train.steps": 3})
    run(config)
    weights = load_file(list_checkpoints(_path(config))[-1] / "model.safetensors")
    assert weights["head.weight"].shape == (3, 32)
    assert weights["pos_embed"].shape == (1, 17, 32)
    own = source.state_dict()
    assert torch.equal(weights["pos_embed"][:, 0], own["pos_embed"][:, 0])  # the class token's, frozen
    assert torch.equal(weights["blocks.0.attn.qkv.weight"], own["blocks.0.attn.qkv.weight"])
    assert not torch.equal(weights["patch_embed.proj.weight"], own["patch_embed.proj.weight"])


def _tiny(make_config):
    return make_config().model.kwargs


@pytest.mark.parametrize("kind", ["classification", "contrastive"])
def test_a_model_of_one_channel_trains_on_gray_images(make_config, kind):
    augmentation = {"data.augmentation.re_prob": 0.5, "data.augmentation.auto_augment": "rand-m5"}
    config = make_config(kind, **augmentation, **{"model.kwargs.in_chans": 1, "train.steps": 2, "evaluate.examples": 2})
    summary, _ = run(config)
    assert math.isfinite(summary["loss"])
    assert (_path(config) / "examples.png").is_file()
    weights = load_file(list_checkpoints(_path(config))[-1] / "model.safetensors")
    assert weights["patch_embed.proj.weight"].shape == (32, 1, 8, 8)


def test_weights_of_another_model_are_refused_with_tensors_and_shapes(make_config, tmp_path):
    other = vmoe.create_model("vmoe_tiny_patch8_48", num_classes=3, **{**_tiny(make_config), "embed_dim": 64})
    vmoe.models.factory.save_pretrained(other, tmp_path / "other.safetensors")
    config = make_config(**{"model.pretrained": tmp_path / "other.safetensors"})
    with pytest.raises(ValueError, match=r"proj\.weight is \(64, 3, 8, 8\) in the file, \(32, 3, 8, 8\) in"):
        run(config)
    assert not _path(config).exists()


def test_a_run_of_another_architecture_is_refused_with_both_names(make_config, tmp_path):
    limoe = make_config("contrastive", output_dir=tmp_path / "limoe", **{"train.steps": 1, "train.eval_every": 0})
    run(limoe)
    config = make_config(**{"model.pretrained": tmp_path / "limoe"})
    message = (
        "limoe holds limoe_tiny_patch8_48, which does not fit model.name vmoe_tiny_patch8_48: pass --model.name null"
    )
    with pytest.raises(ValueError, match=message):
        run(config)


@pytest.mark.parametrize(("task", "precision"), [("classification", "float32"), ("contrastive", "bf16")])
def test_gradient_checkpointing_gives_the_same_step(make_config, tmp_path, task, precision):
    settings = {"train.steps": 2, "train.precision": precision}
    plain = make_config(task, **settings)
    saving = make_config(task, output_dir=tmp_path / "saving", **settings, **{"train.grad_checkpointing": True})
    run(plain)
    run(saving)
    for ours, theirs in zip(metrics_of(plain), metrics_of(saving)):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)


def test_bad_validation_data_does_not_cost_the_training(make_config, images_dir, tmp_path):
    lines = (images_dir / "pairs.csv").read_text()
    (tmp_path / "val.csv").write_text(lines + "nowhere.png,an image that is not there\n")
    overrides = {"data.val.path": str(tmp_path / "val.csv"), "data.val.image_root": str(images_dir)}
    config = make_config("contrastive", **overrides, **{"train.steps": 2, "train.eval_every": 2})
    with pytest.raises(BadSample, match=r"nowhere\.png"):
        train(config)
    assert [step_of(folder) for folder in list_checkpoints(Path(config.output_dir))] == [2]
    # Continued with good data, the run still gets its evaluation.
    config.data.val = config.data.train
    assert train(config)["evaluation"]["num_samples"] == 24
    assert read_metrics(Path(config.output_dir) / "metrics.jsonl")[-1]["evaluation/num_samples"] == 24


def test_files_of_others_are_not_touched(make_config):
    config = make_config()
    run = Path(config.output_dir)
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"mine": 1}\n')
    for notes in (None, "my notes: {keep: this}\n"):
        if notes:
            (run / "config.yaml").write_text(notes)
        with pytest.raises(ConfigError, match="choose another"):
            train(config)
        assert (run / "metrics.jsonl").read_text() == '{"mine": 1}\n'
    assert (run / "config.yaml").read_text() == notes


def test_two_processes_do_not_share_a_folder(make_config):
    config = make_config(**{"train.steps": 1})
    with locked_folder(Path(config.output_dir)), pytest.raises(ConfigError, match="another process is training"):
        train(config)
    train(config)


def test_data_that_is_left_out_is_named(make_config):
    config = make_config(**{"train.eval_every": 1})
    config.data.val = SourceConfig()
    with pytest.raises(ConfigError, match=r"data\.val\.type is missing"):
        train(config)


def test_a_damaged_checkpoint_is_named_and_the_one_before_used(make_config, tmp_path, caplog):
    straight = make_config(**{"train.steps": 3, "optim.schedule": "constant"})
    run(straight)
    overrides = {"train.checkpoint_every": 1, "optim.schedule": "constant", "train.keep_last": 3}
    config = make_config(output_dir=tmp_path / "damaged", **overrides, **{"train.steps": 2})
    run(config)
    first, second = list_checkpoints(_path(config))
    (second / "model.safetensors").write_bytes(b"cut")
    config.train.steps = 3
    _, printed = run(config)
    assert "continuing after step 1" in printed
    assert "step_000002 is damaged (model.safetensors has 3 bytes instead of" in caplog.text
    assert "step_000001 is used instead" in caplog.text
    first, second, third = list_checkpoints(_path(config))  # the second was made again
    assert metrics_of(config) == metrics_of(straight)
    (ours,) = list_checkpoints(_path(straight))
    for file in ("model.safetensors", "optimizer.safetensors"):
        assert same_weights(load_file(third / file), load_file(ours / file)), file
    for checkpoint in (first, second, third):
        (checkpoint / "trainer.json").unlink()
    config.train.steps = 4
    with pytest.raises(CheckpointError, match=r"all checkpoints in .* are damaged.*trainer\.json is missing; choose"):
        train(config)


def test_a_run_is_complete_before_its_examples_are_drawn(make_config, monkeypatch, caplog):
    config = make_config(**{"train.steps": 1, "evaluate.examples": 2})
    seen = []

    def fail(*_, **__):
        seen.extend(path.name for path in _path(config).iterdir())
        raise RuntimeError("the font is broken")

    monkeypatch.setattr(objectives, "example_figure", fail)
    summary, printed = run(config)
    assert "summary.json" in seen
    assert summary == json.loads((_path(config) / "summary.json").read_text())
    assert "final task loss" in printed
    assert "no examples.png: the font is broken" in caplog.text


def test_the_orientation_of_the_training_is_kept_with_the_model(make_config, images_dir, tmp_path):
    """Evaluation of the same images lying on their sides, with EXIF data that say so, gives the same metrics."""
    exif = Image.Exif()
    exif[274] = 6
    for file in (images_dir / "folders").rglob("*.png"):
        side = tmp_path / "side" / file.relative_to(images_dir / "folders")
        side.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(file) as image:
            image.transpose(Image.Transpose.ROTATE_90).save(side, exif=exif)
    settings = {"data.train.exif_orientation": True, "data.val.path": tmp_path / "side", "train.eval_every": 2}
    config = make_config(**settings, **{"train.steps": 2})
    summary, _ = run(config)
    measured = []
    side = str(tmp_path / "side")
    for path, settings in ((str(images_dir / "folders"), {}), (side, {}), (side, {"exif_orientation": False})):
        data, output = SourceConfig("image_folder", path, **settings), str(tmp_path / "out.json")
        evaluation = EvaluationConfig(str(_path(config)), "classification", data, output=output)
        evaluation.loader.num_workers = 0
        measured.append(evaluate(evaluation)["results"])
    assert measured[0] == measured[1]
    assert measured[0]["ece"] != pytest.approx(measured[2]["ece"], abs=1e-6)
    assert measured[0]["top1"] == summary["evaluation"]["top1"]


class Numbers:
    """A loader of the numbers 0, 1, 2; the fourth cannot be read."""

    device, step = "cpu", 0

    def __next__(self):
        if self.step == 3:
            raise BadSample("3.png", "torn")
        self.step += 1
        return self.step - 1

    def state_dict(self):
        return {"step": self.step}


def test_batches_are_fetched_ahead_and_the_position_stays_behind_those_taken():
    batches = Prefetch(Numbers(), 1)
    assert batches.take() == [0]
    batches.fetch()
    assert batches.position == {"step": 1}
    assert batches.take() == [1]
    assert batches.take() == [2]
    batches.fetch()  # the error is of the next step, not of the present one
    assert batches.position == {"step": 3}
    with pytest.raises(BadSample, match=r"3\.png"):
        batches.take()
