"""Training and evaluation at native resolution, on images of several shapes."""

import numpy as np
import pytest
import torch
from PIL import Image

from vmoe.cli.evaluate import run as evaluate
from vmoe.data import BadSample, LoaderConfig, SourceConfig, build_dataset, eval_loader, train_loader
from vmoe.data.config import NaFlexConfig
from vmoe.data.dataset import ImageFiles
from vmoe.data.naflex import build_naflex
from vmoe.data.sampler import NaFlexBatches, ShuffledSamples
from vmoe.evaluation.config import EvaluationConfig
from vmoe.training.config import Config
from vmoe.training.trainer import train
from vmoe.utils.config import read_config

SIZES = [(40, 16), (16, 40), (24, 24), (9, 33), (31, 12), (64, 8)]
PREPROCESS = {"input_size": (3, 48, 48), "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"}
NAFLEX = {"seq_lens": [6, 12], "tokens_per_batch": 36}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for number, size in enumerate(SIZES * 2):
        file = folder / "ab"[number % 2] / f"{number}.png"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(256, size=(*size, 3), dtype=np.uint8)).save(file)
    return folder


SETTINGS = {
    "data.loader.naflex.seq_lens": "[6, 12]",
    "data.loader.naflex.tokens_per_batch": 36,
    "data.loader.num_workers": 0,
    "model.kwargs": "{pos_embed: rope, embed_dim: 32, depth: 2, num_heads: 2}",
    "train.steps": 3,
    "train.eval_every": 3,
    "train.tensorboard": "false",
    "optim.warmup_steps": 1,
    "evaluate.examples": 0,
    "device": "cpu",
}


def config_of(photos, run, **more):
    """The shipped config, for a small model and some steps."""
    paths = {"data.train.path": photos, "data.val.path": photos, "output_dir": run}
    words = [f"--{key}={value}" for key, value in (SETTINGS | paths | more).items()]
    return read_config(Config, ["--config", "vmoe_naflex_folder", *words])


def test_train_and_evaluate(photos, tmp_path):
    summary = train(config_of(photos, tmp_path / "run"))
    loader = LoaderConfig(batch_size=5, num_workers=0, naflex=NaFlexConfig(**NAFLEX))
    source = SourceConfig("image_folder", path=str(photos))
    result = evaluate(EvaluationConfig(str(tmp_path / "run"), "classification", source, loader=loader, device="cpu"))
    assert result["results"] == summary["evaluation"]


def test_batches_of_patches_at_an_exact_position(photos):
    dataset = build_dataset(SourceConfig("image_folder", path=str(photos)))
    config = LoaderConfig(num_workers=0, naflex=NaFlexConfig(**NAFLEX))
    transform = build_naflex(PREPROCESS, None, NAFLEX["seq_lens"], (8, 8))
    loader, part, other = (train_loader(dataset, transform, None, config, 1, part=p) for p in (None, (0, 3), (2, 3)))
    batches = [next(loader) for _ in range(6)]
    part.load_state_dict({**loader.state_dict(), "step": 2})
    for batch in batches[2:]:
        image, mine = batch["image"], next(part)
        assert image["patches"].shape[:2] in {(6, 6), (3, 12)}
        assert image["patch_valid"].any(1).all()
        assert torch.equal(mine["index"], batch["index"][: len(mine["index"])])
        assert torch.equal(mine["image"]["patches"], image["patches"][: len(mine["index"])])
    assert len(next(other)["index"]) * 3 == len(batches[0]["index"])


def test_every_epoch_has_the_same_lengths_in_another_order():
    batches = NaFlexBatches(ShuffledSamples(3, 100), {16: 8, 32: 4, 64: 2}, 3)
    epochs = [[batches.batch(e * batches.steps_per_epoch + n) for n in range(batches.steps_per_epoch)] for e in (0, 1)]
    for keys in epochs:
        assert all(len(key.indices) * key.seq_len == 128 for key in keys)
        seen = [index for key in keys for index in key.indices]
        assert 100 - 8 < len(set(seen)) == len(seen) == round(batches.batch_size * batches.steps_per_epoch)
    lengths = [[key.seq_len for key in keys] for keys in epochs]
    assert sorted(lengths[0]) == sorted(lengths[1])
    assert lengths[0] != lengths[1]


def test_errors(photos, tmp_path):
    wrong = {
        "loader.naflex needs a NaFlexVit of timm's": {"model.name": "vmoe_tiny_patch8_48"},
        "mixup or cutmix takes images of one size": {"data.augmentation.mixup": 0.5},
        "must hold the longest of naflex.seq_lens, 12": {"data.loader.naflex.tokens_per_batch": 11},
        "batch_size 200 is more than the data set's 12": {"data.loader.naflex.tokens_per_batch": 1200},
    }
    for message, changed in wrong.items():
        with pytest.raises(ValueError, match=message):
            train(config_of(photos, tmp_path / "run", **changed))
    Image.new("RGB", (30, 7)).save(tmp_path / "small.png")
    dataset, config = ImageFiles(tmp_path, ["small.png"], labels=[0]), LoaderConfig(num_workers=0)
    with pytest.raises(BadSample, match=r"small.png: 30 x 7 pixels, smaller than a patch \(8 x 8\)"):
        next(iter(eval_loader(dataset, build_naflex(PREPROCESS, None, [6], (8, 8)), None, config)))
