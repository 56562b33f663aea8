"""Training and evaluation at native resolution, on images of several shapes."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image

import vmoe
from vmoe.cli.evaluate import run as evaluate
from vmoe.data import BadSample, LoaderConfig, SourceConfig, build_dataset, eval_loader, train_loader
from vmoe.data.config import NaFlexConfig
from vmoe.data.dataset import ImageFiles
from vmoe.data.naflex import build_naflex
from vmoe.data.sampler import NaFlexBatches, ShuffledSamples
from vmoe.evaluation.config import EvaluationConfig
from vmoe.evaluation.loaded_model import load_model
from vmoe.evaluation.results_file import output_file
from vmoe.training.trainer import train

SIZES = [(40, 16), (16, 40), (24, 24), (9, 33), (31, 12), (64, 8)]
PREPROCESS = {"input_size": (3, 48, 48), "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"}
LOADER = LoaderConfig(batch_size=5, num_workers=0, naflex=NaFlexConfig([6, 12], 36))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for number, size in enumerate(SIZES * 2):
        file = folder / "ab"[number % 2] / f"{number}.png"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(256, size=(*size, 3), dtype=np.uint8)).save(file)
    return SourceConfig("image_folder", path=str(folder))


@pytest.fixture
def config_of(make_config, photos):
    given = {"data.loader.naflex.seq_lens": "[6, 12]", "data.loader.naflex.tokens_per_batch": 36}
    given |= {"model.name": "vmoe_naflex_tiny_patch8", "train.steps": 3, "train.eval_every": 3}
    given |= {"data.train.path": photos.path, "data.val.path": photos.path}
    return lambda **more: make_config(**given | more)


def test_train_and_evaluate(config_of, photos):
    config = config_of()
    result = train(config)["evaluation"]
    settings = {"data": photos, "loader": LOADER, "device": "cpu", "ood_data": photos}
    same_data = {"auroc": 0.5, "fpr95": 1.0, "num_ood_skipped": 0}
    assert evaluate(EvaluationConfig(config.output_dir, "classification", **settings))["results"] == result | same_data


def test_models_of_patches_are_an_ensemble(photos, tmp_path):
    torch.manual_seed(0)
    tiny = {"embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 2}
    for name, patch_size in {"a": 8, "b": 8, "other": 4}.items():
        model = vmoe.create_model("vmoe_naflex_tiny_patch8", patch_size=patch_size, **tiny)
        torch.nn.init.normal_(model.head.weight)
        vmoe.save_pretrained(model, tmp_path / f"{name}.safetensors", extra={"class_names": ["a", "b"]})
    files = [str(tmp_path / f"{name}.safetensors") for name in ("a", "b", "other")]
    settings = {"data": photos, "loader": LOADER, "device": "cpu", "ensemble": True}
    results = evaluate(EvaluationConfig(files[:2], "classification", **settings))["results"]
    members = [load_model(file, "cpu", loader=LOADER) for file in files[:2]]
    batches = list(eval_loader(build_dataset(photos), members[0].transform, None, LOADER))
    with torch.no_grad():
        each = torch.cat([torch.stack([m.model(batch["image"]).softmax(-1) for m in members]) for batch in batches], 1)
    labels = torch.cat([batch["label"] for batch in batches])
    nll = -each.mean(0)[range(len(labels)), labels].log().mean()
    assert results["nll"] == pytest.approx(nll.item(), abs=1e-4)
    assert results["diversity"] > 0
    with pytest.raises(ValueError, match=r"other.safetensors has another preprocessing than .*b.safetensors"):
        evaluate(EvaluationConfig(files[1:], "classification", **settings))


def test_a_result_of_another_sequence_length_has_another_file(photos, tmp_path):
    """The longest sequence counts; a file that knows no naflex is of none."""

    def written(naflex, old=False):
        config = EvaluationConfig(str(tmp_path), "classification", photos, loader=LoaderConfig(naflex=naflex))
        settings, file = dataclasses.asdict(config), output_file(config)
        if old:
            del settings["loader"]["naflex"]
        file.write_text(json.dumps({"config": settings}))
        return file

    runs = [(None, True), (NaFlexConfig([6], 36),), (NaFlexConfig([6, 12], 36),), (NaFlexConfig([12], 99),), (None,)]
    first, second, third, again, plain = (written(*run) for run in runs)
    assert len({first, second, third}) == 3
    assert (again, plain) == (third, first)


def test_batches_of_patches_at_an_exact_position(photos):
    dataset, transform = build_dataset(photos), build_naflex(PREPROCESS, None, [6, 12], (8, 8))
    loader, part = (train_loader(dataset, transform, None, LOADER, 1, part=part) for part in (None, (0, 3)))
    batches = [next(loader) for _ in range(6)]
    part.load_state_dict({**loader.state_dict(), "step": 2})
    for batch, mine in zip(batches[2:], part):
        image, own = batch["image"], len(batch["index"]) // 3
        assert image["patches"].shape[:2] in {(6, 6), (3, 12)}
        assert image["patch_valid"].any(1).all()
        assert torch.equal(mine["index"], batch["index"][:own])
        assert torch.equal(mine["image"]["patches"], image["patches"][:own])


def test_batches_can_be_shared_by_eight_processes():
    """The default budget, and without a batch that is larger; small batches have all images that fit."""
    sizes = LoaderConfig(naflex=NaFlexConfig()).batch_sizes
    assert all(size % 8 == 0 and 16384 - 8 * seq_len < size * seq_len <= 16384 for seq_len, size in sizes.items())
    assert LoaderConfig(naflex=NaFlexConfig([7, 8, 9, 64], 64)).batch_sizes == {7: 8, 8: 8, 9: 7, 64: 1}


def test_every_epoch_has_the_same_lengths_in_another_order():
    batches = NaFlexBatches(ShuffledSamples(3, 100), {16: 8, 32: 4, 64: 2}, 3)
    steps = batches.steps_per_epoch
    epochs = [[batches.batch(epoch * steps + step) for step in range(steps)] for epoch in (0, 1)]
    for keys in epochs:
        assert all(len(key.indices) * key.seq_len == 128 for key in keys)
        seen = [index for key in keys for index in key.indices]
        assert 100 - 8 < len(set(seen)) == len(seen) == round(batches.batch_size * steps)
    lengths = [[key.seq_len for key in keys] for keys in epochs]
    assert sorted(lengths[0]) == sorted(lengths[1])
    assert lengths[0] != lengths[1]


def test_errors(config_of, tmp_path):
    wrong = {
        r"data.loader.naflex\) needs a NaFlexVit of timm's": {"model.name": "softmoe_tiny_patch8_48"},
        "mixup or cutmix needs images of one size": {"data.augmentation.mixup": 0.5},
        r"data.loader.naflex.tokens_per_batch must hold .* 12": {"data.loader.naflex.tokens_per_batch": 11},
        "200 images of 6 patches .* 12 .*: make data.loader.naflex.tok": {"data.loader.naflex.tokens_per_batch": 1200},
        r"data.loader.naflex.seq_lens must be whole numbers >= 1": {"data.loader.naflex.seq_lens": "[0]"},
    }
    for message, changed in wrong.items():
        with pytest.raises(ValueError, match=message):
            train(config_of(**changed))
    Image.new("RGB", (30, 7)).save(tmp_path / "small.png")
    dataset, transform = ImageFiles(tmp_path, ["small.png"], labels=[0]), build_naflex(PREPROCESS, None, [6], (8, 8))
    with pytest.raises(BadSample, match=r"small.png: 30 x 7 pixels, smaller than a patch \(8 x 8\)"):
        next(iter(eval_loader(dataset, transform, None, LOADER)))
