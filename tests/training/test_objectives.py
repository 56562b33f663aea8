import math
import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file
from timm.models._hub import save_for_hf

from vmoe.data import build_transform, train_loader
from vmoe.models.factory import create_model, preprocess_config, save_pretrained
from vmoe.models.manifest import list_checkpoints
from vmoe.models.serialization import WeightsError
from vmoe.moe import quantize_experts
from vmoe.training.config import Config, to_yaml
from vmoe.training.distill import Distiller
from vmoe.training.objectives import create_task, with_steps
from vmoe.training.optim import freeze
from vmoe.training.trainer import train
from vmoe.utils.config import ConfigError, read_config
from vmoe.utils.meta import meta_device

from .test_trainer import run

CPU = torch.device("cpu")


def first_batch(task, model, config):
    transform = build_transform(preprocess_config(model), config.data.augmentation)
    return next(train_loader(task.train_data, transform, task.tokenizer, config.data.loader, config.seed))


def similarities(model, batch):
    images = F.normalize(model.encode_image(batch["image"]), dim=-1)
    texts = F.normalize(model.encode_text(batch["text"]), dim=-1)
    return model.logit_scale.exp() * images @ texts.T


def test_softmax_loss_is_the_mean_of_both_cross_entropies(make_config):
    config = make_config("contrastive")
    task = create_task(config)
    model = task.create_model(None).eval()
    batch = first_batch(task, model, config)
    logits, own = similarities(model, batch), torch.arange(8)
    expected = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    torch.testing.assert_close(task.loss(model, batch, 0), expected, rtol=1e-4, atol=1e-5)


def test_sigmoid_loss_is_siglips(make_config):
    config = make_config("contrastive", **{"train.loss": "sigmoid", "model.kwargs.init_logit_bias": -10.0})
    task = create_task(config)
    model = task.create_model(None).eval()
    batch = first_batch(task, model, config)
    logits = similarities(model, batch) + model.logit_bias
    expected = -F.logsigmoid(logits * (2 * torch.eye(8) - 1)).sum(dim=1).mean()
    torch.testing.assert_close(task.loss(model, batch, 0), expected, rtol=1e-4, atol=1e-5)


def test_sigmoid_loss_without_a_bias_says_what_to_set(make_config):
    with pytest.raises(ConfigError, match="init_logit_bias"):
        create_task(make_config("contrastive", **{"train.loss": "sigmoid"})).create_model(None)


def test_weights_for_inference_alone_are_refused(make_config, tmp_path):
    task = create_task(make_config("contrastive"))
    save_pretrained(quantize_experts(task.create_model(None), "int8"), tmp_path / "small.safetensors")
    with pytest.raises(ConfigError, match=r"small.safetensors keeps its experts as int8, for inference alone"):
        task.create_model(str(tmp_path / "small.safetensors"))


SIGLIP = 4.77  # log of the logit scale of Google's SigLIP B/16, about 118
TOP = math.log(100)


def test_weights_of_another_architecture_name_the_remedy(make_config, tmp_path):
    file = tmp_path / "m.safetensors"
    save_pretrained(create_task(make_config("contrastive")).create_model(None), file)
    task = create_task(make_config("classification", **{"model.pretrained": file}))
    with pytest.raises(ConfigError) as error:
        task.create_model(str(file))
    assert str(error.value) == (
        f"model.pretrained {file} holds limoe_tiny_patch8_48, which does not fit model.name vmoe_tiny_patch8_48: "
        "pass --model.name null to take the architecture of the file"
    )


@pytest.mark.parametrize("name", ["limoe_huge_patch14", "two_tower_base_patch16"])
def test_so_do_those_of_an_architecture_that_is_much_larger(name, make_config, tmp_path):
    file = tmp_path / "m.safetensors"
    task = create_task(make_config("contrastive"))
    save_pretrained(task.create_model(None), file)
    task.config.model.kwargs.clear()
    task.config.model.name = name
    with pytest.raises(ConfigError, match=f"holds limoe_tiny_patch8_48, which does not fit model.name {name}: pass"):
        task.create_model(str(file))


def test_weights_that_cannot_be_downloaded_are_one_sentence(make_config, monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no network\nat all")

    monkeypatch.setattr("timm.models._hub.hf_hub_download", offline)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", offline)
    for name in ("vit_tiny_patch16_224.augreg_in21k", "hf-hub:timm/vit_tiny_patch16_224.augreg_in21k"):
        task = create_task(make_config("classification", **{"model.name": None, "model.pretrained": name}))
        task.config.model.kwargs.clear()
        with pytest.raises(
            WeightsError, match=rf"^weights of {name} cannot be downloaded \(no network\): check .* file$"
        ):
            task.create_model(name)


def test_a_vit_of_timm_by_its_name_is_upcycled_and_trained(make_config, tmp_path, monkeypatch):
    name, small = "vit_tiny_patch16_224.augreg_in21k", {"depth": 2, "embed_dim": 32, "num_heads": 2}
    torch.manual_seed(0)
    dense = timm.create_model(name, num_classes=7, **small)
    save_for_hf(dense, tmp_path / "hub", safe_serialization=True)
    monkeypatch.setattr("timm.models._hub.hf_hub_download", lambda *repo, filename, **kw: tmp_path / "hub" / filename)
    upcycle = {"model.upcycle.num_experts": 4, "model.upcycle.layers": "[1]", "train.steps": 1, "optim.lr": 1e-9}
    config = make_config("classification", **{"model.name": None, "model.pretrained": name, **upcycle})
    config.model.kwargs = {**small, "img_size": 32}
    train(config)
    model = create_model(pretrained=str(tmp_path / "run"))
    assert model.head.out_features == len(create_task(config).class_names)
    torch.testing.assert_close(model.blocks[0].attn.qkv.weight, dense.blocks[0].attn.qkv.weight)
    torch.testing.assert_close(model.blocks[1].mlp.experts.fc1.weight[2], dense.blocks[1].mlp.fc1.weight)


def test_a_clip_of_open_clip_by_its_name_and_tag_is_upcycled_and_trained(make_config, tmp_path, monkeypatch):
    vision = {"image_size": 16, "layers": 2, "width": 32, "patch_size": 8, "head_width": 16}
    text = {"context_length": 8, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny-clip-to-train", config)
    dense = open_clip.create_model("tiny-clip-to-train")
    save_file(dense.state_dict(), tmp_path / "clip.safetensors")
    tags = {"mine": {"file": str(tmp_path / "clip.safetensors")}}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny-clip-to-train", tags)
    upcycle = {"model.upcycle.num_experts": 4, "model.upcycle.layers": "[1]", "train.steps": 1, "optim.lr": 1e-9}
    config = make_config("contrastive", **{"model.pretrained": "mine", **upcycle})
    config.model.name, config.model.kwargs = "tiny-clip-to-train", {}
    train(config)
    model = create_model(pretrained=str(tmp_path / "run"))
    torch.testing.assert_close(model.token_embedding.weight, dense.token_embedding.weight)
    config.train.steps = 2
    train(config)  # continues from the checkpoint


@pytest.mark.parametrize(
    ("start", "stepped", "expected", "overrides"),
    [
        (2.6, [9.0, 4.0, -1.0], [TOP, 4.0, 0.0], {}),  # it stays between 1 and 100
        # One that starts outside is free until it is inside.
        (SIGLIP, [SIGLIP - 0.01, SIGLIP + 0.01, 4.6, SIGLIP], [SIGLIP - 0.01, SIGLIP + 0.01, 4.6, TOP], {}),
        (-0.5, [-0.6, 0.1, -0.1], [-0.6, 0.1, 0.0], {}),
        (SIGLIP, [SIGLIP], [SIGLIP], {"train.freeze": '["logit_scale"]'}),
        (2.3, [SIGLIP], [SIGLIP], {"train.loss": "sigmoid", "model.kwargs.init_logit_bias": -10}),
    ],
)
def test_a_trained_logit_scale_of_softmax_stays_in_bounds(make_config, start, stepped, expected, overrides):
    config = make_config("contrastive", **{"model.kwargs.init_logit_scale": start, **overrides})
    task = create_task(config)
    model = task.create_model(None)
    freeze(model, config.train.freeze)
    for value, wanted in zip(stepped, expected, strict=True):
        with torch.no_grad():
            model.logit_scale.fill_(value)
        task.after_step(model)
        assert model.logit_scale.item() == pytest.approx(wanted)


def test_training_keeps_a_logit_scale_above_100(make_config, tmp_path):
    settings = {"model.kwargs.init_logit_scale": SIGLIP, "train.steps": 4, "optim.lr": 1e-4}
    train(make_config("contrastive", **settings))
    scale = create_model(pretrained=str(tmp_path / "run")).logit_scale.item()
    assert scale == pytest.approx(SIGLIP, abs=4.1e-4)  # at most lr in each step of AdamW


def test_mixup_is_a_function_of_the_batch_number_and_leaves_the_batch_alone(make_config):
    config = make_config(**{"data.augmentation.mixup": 0.8, "data.augmentation.cutmix": 1.0})
    task = create_task(config)
    model = task.create_model(None).eval()
    torch.nn.init.normal_(model.head.weight)  # it starts at zero
    batch = first_batch(task, model, config)
    before = batch["image"].clone()
    losses = [task.loss(model, batch, number).item() for number in (3, 4, 3)]
    assert torch.equal(batch["image"], before)
    assert losses[0] == losses[2] != losses[1]


def test_label_smoothing_is_applied(make_config):
    config = make_config(**{"data.augmentation.label_smoothing": 0.3})
    task = create_task(config)
    model = task.create_model(None).eval()
    torch.nn.init.normal_(model.head.weight)
    batch = first_batch(task, model, config)
    expected = F.cross_entropy(model(batch["image"]), batch["label"], label_smoothing=0.3)
    torch.testing.assert_close(task.loss(model, batch, 0), expected)


def test_the_head_has_the_classes_of_the_data(make_config):
    assert create_task(make_config()).create_model(None).num_classes == 3
    with pytest.raises(ConfigError, match=r"num_classes is 5, but data.train has 3 classes"):
        create_task(make_config(**{"model.kwargs.num_classes": 5})).create_model(None)


def test_other_classes_in_the_validation_data_are_named(make_config, tmp_path):
    for name in ("blue", "red", "violet"):
        (tmp_path / "val" / name).mkdir(parents=True)
        Image.new("RGB", (16, 16)).save(tmp_path / "val" / name / "0.png")
    config = make_config(**{"train.eval_every": 1, "data.val.path": tmp_path / "val"})
    with pytest.raises(ConfigError, match=r"class 1 is 'green' in data\.train and 'red' in data\.val"):
        create_task(config)
    shutil.rmtree(tmp_path / "val" / "violet")
    (tmp_path / "val" / "red").rename(tmp_path / "val" / "green")
    with pytest.raises(ConfigError, match=r"data\.train has 3 classes and data\.val 2; .* only one of them has 'red'"):
        create_task(config)


@pytest.mark.parametrize(
    ("kind", "name", "words"),
    [
        ("contrastive", "vmoe_tiny_patch8_48", "needs an image-text model"),
        ("classification", "limoe_tiny_patch8_48", "needs a classifier"),
    ],
)
def test_a_model_of_the_other_kind_is_refused(make_config, kind, name, words):
    config = make_config(kind)
    config.model.name, config.model.kwargs = name, {}
    task = create_task(config)
    with pytest.raises(ConfigError, match=words):
        task.create_model(None)


def test_data_without_labels_or_captions_is_refused(make_config, images_dir):
    labels = {"data.train.type": "image_folder", "data.train.path": images_dir / "folders"}
    captions = {"data.train.type": "pairs", "data.train.path": images_dir / "pairs.csv"}
    with pytest.raises(ConfigError, match=r"needs captions, and data\.train has none"):
        create_task(make_config("contrastive", **labels))
    with pytest.raises(ConfigError, match="needs labels"):
        create_task(make_config("classification", **captions))


def test_contrastive_evaluation_follows_the_data(make_config, images_dir):
    config = make_config("contrastive", **{"train.eval_every": 1})
    task = create_task(config)
    measured = task.evaluate(task.create_model(None), CPU)
    assert measured["num_samples"] == 24
    assert 0 <= measured["image_to_text_recall@1"] <= measured["image_to_text_recall@5"] <= 1
    labels = {"data.val.type": "image_folder", "data.val.path": images_dir / "folders"}
    task = create_task(make_config("contrastive", **{"train.eval_every": 1, **labels}))
    assert {"top1", "ece"} < set(task.evaluate(task.create_model(None), CPU))
    with pytest.raises(ConfigError, match="'zero_shot' needs class names"):
        create_task(make_config("contrastive", **{"train.eval_every": 1, "evaluate.task": "zero_shot"}))


def test_example_names_hold_the_captions_of_the_examples(make_config):
    task = create_task(make_config("contrastive"))
    samples = list((task.val_data or task.train_data).examples(5))
    names = task.example_names(samples)
    assert len(samples) == 5
    assert len(set(names)) == len(names)
    assert {sample.caption for sample in samples} <= set(names)


def test_steps_follow_from_epochs(make_config, tmp_path):
    """24 images in batches of 8, two batches in a step."""
    for epochs, accumulate, steps in ((2, 1, 6), (0.1, 1, 1), (2.5, 1, 8), (3, 2, 5), (1, 7, 1)):
        overrides = {"train.epochs": epochs, "train.accumulate_steps": accumulate, "train.steps": None}
        resolved = with_steps(make_config(**overrides))
        assert (resolved.train.steps, resolved.train.epochs) == (steps, epochs)
        file = tmp_path / "config.yaml"  # is read back, with both
        file.write_text(to_yaml(resolved), encoding="utf-8")
        assert with_steps(read_config(Config, ["--config", str(file)])) == resolved
    assert with_steps(make_config(**{"train.steps": None})).train.steps == 1000
    assert with_steps(make_config(**{"train.steps": 5})).train.steps == 5


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"train.epochs": 2, "train.steps": 7},
            r"train.steps is 7, and train.epochs 2 makes 6 steps; give one of them",
        ),
        ({"train.epochs": 0, "train.steps": None}, "train.epochs must be > 0 and finite, got 0"),
        ({"train.epochs": 2, "optim.warmup_steps": 6, "train.steps": None}, r"must be < train.steps \(6\), got 6"),
        ({"train.epochs": 2, "data.train.type": None, "train.steps": None}, "data.train.type is missing"),
    ],
)
def test_epochs_that_do_not_fit(make_config, overrides, message):
    config = make_config(**overrides)
    with pytest.raises(ConfigError, match=message):
        train(config)
    assert not Path(config.output_dir).exists()


def test_more_epochs_continue_a_run(make_config, tmp_path):
    straight = make_config(output_dir=tmp_path / "straight", **{"train.steps": 6, "optim.schedule": "constant"})
    train(straight, Console(quiet=True))
    for epochs, steps in ((1, 3), (2, 6)):
        more = {"train.steps": None, "train.epochs": epochs, "optim.schedule": "constant"}
        assert train(make_config(**more), Console(quiet=True))["steps"] == steps
    assert "a larger train.epochs continues it" in run(make_config(**more))[1]
    runs = [tmp_path / "run", tmp_path / "straight"]
    ours, theirs = (load_file(list_checkpoints(folder)[-1] / "model.safetensors") for folder in runs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_labels_are_repeated_for_the_copies_of_an_ensemble(make_config):
    config = make_config(**{"model.kwargs.ensemble_size": 2, "model.kwargs.noise_std": 0.0})
    task = create_task(config)
    model, taught = task.create_model(None).train(), torch.randn(8, 3)
    batch = first_batch(task, model, config)
    losses = F.cross_entropy(model(batch["image"]), batch["label"].repeat_interleave(2), reduction="none")
    loss = task.loss(model, batch, 0)
    torch.testing.assert_close(loss, losses.view(8, 2).mean(1).mean())
    task.distiller = SimpleNamespace(classification=Distiller.classification.__get__(teacher(taught)))
    own = model(batch["image"]).log_softmax(1)
    expected = F.kl_div(own, taught.repeat_interleave(2, 0).log_softmax(1), reduction="batchmean", log_target=True)
    torch.testing.assert_close(task.loss(model, batch, 0), loss / 2 + expected / 2)


def teacher(logits):
    """What the loss of a distiller needs of it, with a teacher of known logits."""
    known = {"settings": SimpleNamespace(weight=0.5, features=0.0, temperature=1.0), "adapt": lambda images: images}
    found = SimpleNamespace(**known, _scores=lambda _images: logits, _timed=nullcontext)
    found._together = Distiller._together.__get__(found)
    return found


def test_templates_are_checked_where_a_model_has_no_values(make_config, images_dir, monkeypatch):
    """In a sharded run all processes but the first build their model so."""
    settings = {"data.val.type": "image_folder", "data.val.path": str(images_dir / "folders"), "train.eval_every": 1}
    task = create_task(make_config("contrastive", **settings, **{"evaluate.templates": ["a photo of a {}"]}))
    monkeypatch.setattr("vmoe.training.objectives.from_first", lambda make: 2.0)  # the first process has the value
    with meta_device():
        model = task.create_model(None)
    assert next(model.parameters()).is_meta
    assert task.evaluation == "zero_shot"
