import math

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from vmoe.data import build_transform, train_loader
from vmoe.models.factory import create_model, preprocess_config, save_pretrained
from vmoe.moe import quantize_experts
from vmoe.training.optim import freeze
from vmoe.training.tasks import create_task
from vmoe.training.trainer import train
from vmoe.utils.config import ConfigError

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


def scale_after_step(make_config, start, stepped, **overrides):
    """The logit scale, as a logarithm, that starts at `start` and that the optimizer moved to `stepped`."""
    config = make_config("contrastive", **{"model.kwargs.init_logit_scale": start, **overrides})
    task = create_task(config)
    model = task.create_model(None)
    freeze(model, config.train.freeze)
    return [_step(task, model, value) for value in stepped]


def _step(task, model, value):
    with torch.no_grad():
        model.logit_scale.fill_(value)
    task.after_step(model)
    return model.logit_scale.item()


SIGLIP = 4.77  # log of the logit scale of Google's SigLIP B/16, about 118


def test_the_logit_scale_stays_between_1_and_100(make_config):
    assert scale_after_step(make_config, 2.6, [9.0, 4.0, -1.0]) == pytest.approx([math.log(100), 4.0, 0.0])


def test_a_logit_scale_that_starts_outside_the_bounds_is_free_until_it_is_inside(make_config):
    steps = [SIGLIP - 0.01, SIGLIP + 0.01, 4.6, SIGLIP]
    assert scale_after_step(make_config, SIGLIP, steps) == pytest.approx([*steps[:3], math.log(100)])
    assert scale_after_step(make_config, -0.5, [-0.6, 0.1, -0.1]) == pytest.approx([-0.6, 0.1, 0.0])


def test_a_frozen_logit_scale_is_not_clamped(make_config):
    frozen = {"train.freeze": '["logit_scale"]'}
    assert scale_after_step(make_config, SIGLIP, [SIGLIP], **frozen) == pytest.approx([SIGLIP])


def test_the_logit_scale_of_the_sigmoid_loss_has_no_bound(make_config):
    sigmoid = {"train.loss": "sigmoid", "model.kwargs.init_logit_bias": -10}
    assert scale_after_step(make_config, 2.3, [SIGLIP], **sigmoid) == pytest.approx([SIGLIP])


@pytest.mark.parametrize("patterns", ["[]", '["logit_scale"]'])
def test_training_keeps_a_logit_scale_above_100(make_config, tmp_path, patterns):
    settings = {"model.kwargs.init_logit_scale": SIGLIP, "train.freeze": patterns, "train.steps": 4, "optim.lr": 1e-4}
    train(make_config("contrastive", **settings))
    scale = create_model(pretrained=str(tmp_path / "run")).logit_scale.item()
    assert scale == pytest.approx(SIGLIP, abs=1e-6 if patterns != "[]" else 4.1e-4)  # at most lr in each step of AdamW


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
    (tmp_path / "val" / "violet" / "0.png").unlink()
    (tmp_path / "val" / "violet").rmdir()
    with pytest.raises(ConfigError, match=r"3 classes and data\.val 2; only one of them has green"):
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
    samples = task.examples(5)
    names = task.example_names(samples)
    assert len(samples) == 5
    assert len(set(names)) == len(names)
    assert {sample.caption for sample in samples} <= set(names)
