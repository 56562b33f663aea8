"""Distillation: its losses, what the teacher sees, and whole runs of a few steps."""

import math
import socket
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from timm.data import create_transform
from timm.models._hub import save_for_hf

import vmoe
from vmoe.data import build_transform
from vmoe.models.factory import preprocess_config
from vmoe.models.manifest import list_checkpoints
from vmoe.training.config import DistillConfig, to_yaml
from vmoe.training.distill import PROJECTION, Distiller, soft_loss
from vmoe.training.logger import read_metrics
from vmoe.training.trainer import Stopped, Trainer
from vmoe.utils.config import ConfigError

from .test_trainer import ctrl_c, interrupt_after, run, same_weights

CPU = torch.device("cpu")
TIMES = ("images_per_second", "data_wait_share", "teacher_share")
CLASSES = ["blue", "green", "red"]
CONV = "test_efficientnet"  # timm's, of some thousand parameters
TEACHING = {"train.distill.features": 0.5, "train.distill.temperature": 2.0}


def save_teacher(folder, name=CONV, cfg=(), **kwargs):
    """A folder of timm's with a new model, which another preprocessing than the student's belongs to."""
    torch.manual_seed(1)
    model = timm.create_model(name, pretrained_cfg_overlay=dict(cfg), **kwargs).eval()
    with torch.no_grad():
        model.get_classifier().weight.mul_(30)  # opinions
    save_for_hf(model, folder, safe_serialization=True)
    return f"local-dir:{folder}", model


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """(source, model): of three classes, 40 pixels, and its own mean and std."""
    cfg = {"mean": (0.2, 0.3, 0.4), "std": (0.3, 0.2, 0.1), "input_size": (3, 40, 40), "crop_pct": 1.0}
    return save_teacher(tmp_path_factory.mktemp("teacher"), cfg=cfg, num_classes=3)


def weights_of(config):
    return load_file(list_checkpoints(Path(config.output_dir))[-1] / "model.safetensors")


def metrics_of(config):
    lines = read_metrics(Path(config.output_dir) / "metrics.jsonl")
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def data_of(classes, columns=None):
    return SimpleNamespace(classes=classes, class_columns=columns, synsets=None)


def distiller_for(student, source, columns=None, **settings):
    return Distiller(DistillConfig(teacher=source, **settings), student, data_of(CLASSES, columns), None, CPU)


def test_the_gradient_is_that_of_hintons_loss():
    torch.manual_seed(0)
    student, teacher, T = torch.randn(5, 7, dtype=torch.float64, requires_grad=True), torch.randn(5, 7).double(), 3.0
    p, q = ((logits / T).exp() for logits in (teacher, student))
    p, q = (each / each.sum(dim=1, keepdim=True) for each in (p, q))
    torch.testing.assert_close(soft_loss(student, teacher, T), T**2 * (p * (p / q).log()).sum() / 5)
    soft_loss(student, teacher, T).backward()
    torch.testing.assert_close(student.grad, T * (q - p).detach() / 5)  # written down by hand


def test_the_teacher_sees_images_as_its_own_transform_makes_them(teacher):
    source, model = teacher
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((64, 64), Image.Resampling.BICUBIC)
    student = vmoe.create_model("vit_tiny_patch16_224", img_size=64, num_classes=3)
    seen = build_transform({**preprocess_config(student), "crop_pct": 1.0}, None)(image)[None]
    taught = distiller_for(student, source)
    own = create_transform(**preprocess_config(model))(image)[None]
    assert taught.theirs["mean"] == (0.2, 0.3, 0.4)
    assert own.shape == (1, 3, 40, 40)
    torch.testing.assert_close(taught.adapt(seen), own, rtol=0, atol=0.05)  # PIL rounds to 1/255, divided by the std
    assert not torch.allclose(F.interpolate(seen, (40, 40)), own, atol=0.5)
    torch.testing.assert_close(taught.teacher(taught.adapt(seen)), model(own), rtol=0.03, atol=0.03)
    assert not taught.teacher.training
    assert not any(p.requires_grad for p in taught.teacher.parameters())


def test_equal_preprocessing_changes_no_bit_and_gray_images_become_colours(tmp_path):
    cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "input_size": (3, 32, 32)}
    source, _ = save_teacher(tmp_path, cfg=cfg, num_classes=3)
    student = vmoe.create_model("vit_tiny_patch16_224", img_size=32, num_classes=3)
    images = torch.randn(2, 3, 32, 32)
    assert distiller_for(student, source).adapt(images) is images
    gray = vmoe.create_model("vit_tiny_patch16_224", img_size=64, num_classes=3, in_chans=1)
    assert distiller_for(gray, source).adapt(images[:, :1]).shape == (2, 3, 32, 32)
    source, _ = save_teacher(tmp_path / "gray", num_classes=3, in_chans=1)
    with pytest.raises(ConfigError, match="have 1 channel, and the student's 3; they must agree"):
        distiller_for(student, source)


@pytest.mark.parametrize("name", [CONV, "vit_tiny_patch16_224"])
def test_the_size_of_the_teachers_images_can_be_chosen(name, tmp_path):
    kwargs = {"depth": 1, "embed_dim": 24, "num_heads": 2, "img_size": 48} if "vit" in name else {}
    source, _ = save_teacher(tmp_path, name, num_classes=3, **kwargs)
    student = vmoe.create_model("vit_tiny_patch16_224", img_size=32, num_classes=3)
    taught = distiller_for(student, source, image_size=96)
    assert taught.adapt(torch.zeros(1, 3, 32, 32)).shape == (1, 3, 96, 96)
    assert taught.teacher(torch.zeros(1, 3, 96, 96)).shape == (1, 3)
    if "vit" in name:
        with pytest.raises(ConfigError, match="cannot take images of 8 x 8 pixels .*change train.distill.image_size"):
            distiller_for(student, source, image_size=8)


def test_a_teacher_of_imagenet_is_asked_for_the_classes_of_the_data(tmp_path):
    source, _ = save_teacher(tmp_path)  # 1,000 classes
    student = vmoe.create_model("vit_tiny_patch16_224", img_size=32, num_classes=3)
    taught = distiller_for(student, source, columns=[[3, 7], [9], [5]], weight=0.25)  # by the data set's own columns
    assert "asked for 3 of ImageNet's classes" in taught.describe(None)
    logits, images = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3, 32, 32)
    loss = taught.classification(logits.sum() * 0 + 2.0, images, logits)
    outputs = taught.teacher(taught.adapt(images))
    theirs = torch.stack([outputs[:, [3, 7]].amax(1), outputs[:, 9], outputs[:, 5]], 1)
    torch.testing.assert_close(loss, 0.75 * 2 + 0.25 * soft_loss(logits, theirs, 1.0))
    with pytest.raises(ConfigError, match=r"1000 classes and data.train 3; they must agree: give a teacher of these"):
        distiller_for(student, source)
    assert distiller_for(student, source, weight=0.0, features=1.0).columns is None  # features need no classes


def test_labels_and_teacher_teach_a_run(make_config, teacher):
    settings = {"train.distill.teacher": teacher[0], "data.augmentation.mixup": 0.5, "train.eval_every": 6}
    config = make_config(**TEACHING, **settings)
    summary, printed = run(config)
    for line in metrics_of(config):
        expected = 0.5 * line["task_loss"] + 0.5 * line["distill_loss"] + 0.5 * line["feature_loss"]
        auxiliary = sum(value for key, value in line.items() if key.endswith("auxiliary_loss"))
        assert math.isclose(line["loss"], expected + auxiliary, rel_tol=1e-5)
    assert "teacher: local-dir:" in printed
    assert "sees 40 x 40 pixels, mean [0.2, 0.3, 0.4]" in printed
    assert "on 24 images of data.val" in printed
    assert "% of the time" in printed
    assert 0 < summary["teacher_share"] < 1
    assert summary["loss"] == metrics_of(config)[-1]["task_loss"]
    # The projection is no part of the model, which files and evaluations take as any other.
    checkpoint = list_checkpoints(Path(config.output_dir))[-1]
    assert {*load_file(checkpoint / f"{PROJECTION}.safetensors")} == {"weight", "bias"}
    assert not any(PROJECTION in name for name in weights_of(config))
    assert any(PROJECTION in name for name in load_file(checkpoint / "optimizer.safetensors"))
    assert vmoe.create_model(pretrained=config.output_dir).num_classes == 3


def test_the_teachers_accuracy_is_that_of_its_own_evaluation(make_config, teacher):
    source, model = teacher
    task = Trainer(make_config(**{"train.distill.teacher": source, "train.eval_every": 1}), CPU, _quiet(), None).task
    transform = create_transform(**preprocess_config(model))
    samples = [task.val_data[index] for index in range(24)]
    right = sum(model(transform(sample.image)[None]).argmax().item() == sample.label for sample in samples)
    assert f"top1 {right / 24:.3f} on 24 images of data.val" in task.distiller.describe(task.val_data)


def _quiet():
    return Console(quiet=True)


def test_with_weight_zero_the_labels_teach_as_without_a_teacher(make_config, tmp_path, teacher):
    """But for the features, whose gradient vanishes here beside that of the labels."""
    alone = make_config(**{"train.steps": 2})
    settings = {"train.distill.weight": 0.0, "train.distill.features": 1e-30, "train.steps": 2}
    taught = make_config(output_dir=tmp_path / "taught", **settings, **{"train.distill.teacher": teacher[0]})
    run(alone), run(taught)
    lines = metrics_of(taught)
    assert all(0 < line.pop("feature_loss") < 2 for line in lines)
    assert metrics_of(alone) == lines
    assert same_weights(weights_of(alone), weights_of(taught))


def test_asking_the_teacher_draws_no_random_number(make_config, tmp_path):
    sparse = vmoe.create_model(
        "vmoe_tiny_patch8_48", num_classes=3, img_size=16, depth=2, noise_std=1.0, drop_path_rate=0.5
    )
    torch.nn.init.normal_(sparse.head.weight)
    vmoe.save_pretrained(sparse, tmp_path / "t.safetensors", {"class_names": CLASSES})
    config = make_config(**{"train.distill.teacher": tmp_path / "t.safetensors"})
    trainer = Trainer(config, CPU, _quiet(), None)
    images, state = torch.randn(2, 3, 16, 16), torch.get_rng_state()
    with vmoe.record_routing(trainer.model) as record:
        losses = [trainer.task.distiller.classification(torch.zeros(()), images, torch.zeros(2, 3)) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), state)
    assert losses[0] == losses[1] > 0
    assert not record.layers


@pytest.mark.parametrize(
    "overrides",
    [
        {"train.ema_decay": 0.9, "train.accumulate_steps": 2, "model.kwargs.noise_std": 1.0},
        {"train.precision": "bf16", "optim.layer_decay": 0.8, "train.async_checkpoints": True},
    ],
)
def test_a_stopped_run_continues_bit_by_bit(make_config, tmp_path, monkeypatch, teacher, overrides):
    overrides |= {**TEACHING, "train.distill.teacher": teacher[0]}
    straight, stopped = make_config(**overrides), make_config(**overrides, output_dir=tmp_path / "stopped")
    run(straight)
    with monkeypatch.context() as context:
        interrupt_after(context, 3, ctrl_c)
        with pytest.raises(Stopped):
            run(stopped)
    run(stopped)
    assert metrics_of(stopped) == metrics_of(straight)
    ends = [list_checkpoints(Path(config.output_dir))[-1] for config in (straight, stopped)]
    files = [file.name for file in ends[0].glob("*.safetensors")]
    assert {"model.safetensors", "optimizer.safetensors", f"{PROJECTION}.safetensors"} <= {*files}
    for file in files:
        assert same_weights(*(load_file(end / file) for end in ends)), file


def test_a_run_is_not_continued_with_another_teacher(make_config, tmp_path):
    source, model = save_teacher(tmp_path / "t", num_classes=3)
    run(make_config(**{"train.distill.teacher": source, "train.steps": 1}))
    model.get_classifier().bias.data += 1
    save_for_hf(model, tmp_path / "t", safe_serialization=True)
    longer = make_config(**{"train.distill.teacher": source, "train.steps": 2})
    with pytest.raises(ConfigError, match="t has other weights than when .*run began; give those back, or choose"):
        run(longer)
    save_teacher(tmp_path / "t", num_classes=3)
    run(longer)


@pytest.fixture(scope="module")
def pairs_teacher(tmp_path_factory):
    """A run's file of an image-text model with another size, context and width than the student's."""
    torch.manual_seed(2)
    small = {"depth": 2, "num_heads": 2, "num_classes": 24}
    kwargs = {"image": {**small, "img_size": 24, "embed_dim": 32}, "text": {**small, "width": 32, "context_length": 12}}
    file = tmp_path_factory.mktemp("pairs") / "t.safetensors"
    vmoe.save_pretrained(vmoe.create_model("two_tower_tiny_patch8_48", embed_dim=24, **kwargs), file)
    return str(file)


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_an_image_text_teacher_gives_its_similarities(make_config, pairs_teacher, loss):
    settings = {"train.distill.teacher": pairs_teacher, "train.distill.weight": 1.0, "train.loss": loss}
    settings |= {"model.kwargs.init_logit_bias": -10.0} if loss == "sigmoid" else {}
    trainer = Trainer(make_config("contrastive", **settings), CPU, _quiet(), None)
    trainer.model.eval()
    batch, task = trainer.batches.take()[0], trainer.task
    teacher = vmoe.create_model(pretrained=pairs_teacher).eval()
    captions = task.train_data.read_captions(batch["index"].tolist())
    images = F.interpolate(batch["image"] / 2 + 0.5, (24, 24), mode="bicubic", antialias=True).clamp(0, 1) * 2 - 1
    theirs = teacher(images, vmoe.get_tokenizer(teacher)(captions))
    own = trainer.model(batch["image"], task.tokenizer(captions))
    own, theirs = ([x.detach() for x in (each.values() if isinstance(each, dict) else each)] for each in (own, theirs))
    own, theirs = (each[2] * each[0] @ each[1].T for each in (own, theirs))
    expected = sum(
        F.kl_div(a.log_softmax(1), b.softmax(1), reduction="sum") / 8 / 2 for a, b in ((own, theirs), (own.T, theirs.T))
    )
    torch.testing.assert_close(task.loss(trainer.model, batch, 0).detach(), expected, rtol=1e-3, atol=1e-4)
    assert task.distiller.parts.keys() == {"task_loss", "distill_loss"}
    assert expected > 0


def test_open_clips_models_teach_with_their_own_tokenizer(make_config, tmp_path):
    torch.manual_seed(0)
    vision = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16, "head_width": 32}
    text = {"context_length": 20, "width": 32, "heads": 2, "layers": 1}
    model = vmoe.create_model("ViT-B-32", embed_dim=24, vision_cfg=vision, text_cfg=text)
    vmoe.save_hub_folder(model, tmp_path / "clip")
    config = make_config("contrastive", **{"train.distill.teacher": f"local-dir:{tmp_path}/clip", "train.steps": 1})
    run(config)
    assert metrics_of(config)[0]["distill_loss"] > 0


@pytest.mark.parametrize(("kind", "mesh"), [("classification", {"parallel.dp_shard": 2}), ("contrastive", {})])
def test_two_processes_are_one(make_config, tmp_path, forks, teacher, pairs_teacher, kind, mesh):
    settings = {"train.distill.teacher": teacher[0] if kind == "classification" else pairs_teacher}
    settings |= TEACHING if kind == "classification" else {}
    settings |= {"model.kwargs.num_experts": 0, "model.kwargs.depth": 1, "optim.lr": 1e-4, "train.steps": 2}
    alone = make_config(kind, **settings)
    both = make_config(kind, output_dir=tmp_path / "both", **settings, **mesh)
    run(alone)
    (tmp_path / "both.yaml").write_text(to_yaml(both))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    jobs = forks.group(["--config", str(tmp_path / "both.yaml")], tmp_path / "output.txt", port)
    assert [job.wait(120) for job in jobs] == [0, 0], (tmp_path / "output.0").read_text()[-3000:]
    for ours, theirs in zip(metrics_of(alone), metrics_of(both), strict=True):
        names = [name for name in ours if "loss" in name or name == "grad_norm"]
        assert "distill_loss" in names
        for name in names:
            assert math.isclose(ours[name], theirs[name], rel_tol=1e-4, abs_tol=1e-5), (name, ours, theirs)
    first, second = (vmoe.create_model(pretrained=config.output_dir).state_dict() for config in (alone, both))
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], rtol=0, atol=2e-5, msg=name)


WRONG = {
    "/nowhere": "train.distill.teacher: no weights at /nowhere: it does not exist; give",
    "local-dir:/nowhere": "train.distill.teacher: no weights at /nowhere",
    "PAIRS": "PAIRS is an image-text model, and task 'classification' needs a classifier",
    "TEN": "TEN has 10 classes and data.train 3; they must agree; only one of them has '0', '1'",
    "HEADLESS": "HEADLESS has no classifier: give a teacher of these classes",
    "NAMES": "class 2 is 'yellow' in train.distill.teacher NAMES and 'red' in data.train; they must agree: give",
}


@pytest.mark.parametrize("source", WRONG)
def test_teachers_that_do_not_suit_are_one_sentence(make_config, tmp_path, pairs_teacher, source):
    given = {"PAIRS": pairs_teacher}.get(source, source)
    if source in ("TEN", "NAMES"):
        given = str(tmp_path / "t.safetensors")
        names = ["blue", "green", "yellow"] if source == "NAMES" else [str(number) for number in range(10)]
        vmoe.save_pretrained(vmoe.create_model(CONV, num_classes=len(names)), given, {"class_names": names})
    if source == "HEADLESS":
        given = str(tmp_path / "t.safetensors")
        vmoe.save_pretrained(vmoe.create_model(CONV, num_classes=0), given)
    with pytest.raises(ConfigError) as error:
        run(make_config(**{"train.distill.teacher": given}))
    assert WRONG[source].replace(source, given) in str(error.value)
    assert "\n" not in str(error.value)
    assert not Path(make_config().output_dir).exists()


def test_a_classifier_does_not_teach_pairs(make_config, teacher):
    with pytest.raises(ConfigError, match="is a classifier, and task 'contrastive' needs an image-text model"):
        run(make_config("contrastive", **{"train.distill.teacher": teacher[0]}))


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("classification", {"teacher": "t", "weight": 1.5}, "train.distill.weight must be >= 0 and <= 1, got 1.5"),
        ("classification", {"teacher": "t", "temperature": 0}, "distill.temperature must be > 0 and finite, got 0"),
        ("classification", {"teacher": "t", "features": -1}, "train.distill.features must be >= 0, got -1"),
        ("classification", {"teacher": "t", "image_size": 0}, "train.distill.image_size must be >= 1, got 0"),
        ("classification", {"weight": 0.9}, "train.distill.teacher is missing"),
        (
            "classification",
            {"teacher": "t", "weight": 0.0},
            "features are 0, so the teacher teaches nothing; raise one",
        ),
        ("contrastive", {"teacher": "t", "features": 1}, "train.distill.features needs task 'classification'"),
        ("contrastive", {"teacher": "t", "image_size": 9}, "train.distill.image_size needs task 'classification'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(make_config, kind, settings, message):
    with pytest.raises(ConfigError, match=message):
        make_config(kind, **{f"train.distill.{key}": value for key, value in settings.items()}).check()
    accumulated = {"train.accumulate_steps": 2, "train.accumulate_features": True, "train.distill.teacher": "t"}
    with pytest.raises(ConfigError, match="set that to false"):
        make_config("contrastive", **accumulated).check()
