"""Runs of two-tower models of a few steps, among them one with a locked image tower."""

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console

import vmoe
from vmoe.training.config import Config
from vmoe.training.trainer import train
from vmoe.utils.config import ConfigError, read_config

CONFIGS = Path(__file__).parents[2] / "configs"
NAME = "two_tower_tiny_patch8_48"
TEXT = {"width": 32, "depth": 2, "num_heads": 2, "num_experts": 4, "context_length": 8}
IMAGE = {"img_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_experts": 4}


def run(config):
    return train(config, Console(file=io.StringIO(), width=400))


def only(kwargs: dict, **overrides) -> dict:
    """Overrides for `make_config` that replace the model's settings."""
    return {"model.name": NAME, "model.kwargs": json.dumps(kwargs), **overrides}


def test_experts_in_both_towers_train_and_are_evaluated(make_config):
    kwargs = {"image": IMAGE, "text": TEXT, "embed_dim": 16}
    config = make_config("contrastive", **only(kwargs, **{"train.steps": 2, "train.eval_every": 2}))
    summary = run(config)
    assert summary["evaluation"]["image_to_text_recall@10"] > 0
    model = vmoe.create_model(pretrained=config.output_dir)
    assert model.text.blocks[1].mlp.num_experts == model.visual.blocks[1].mlp.num_experts == 4


def test_a_locked_image_tower_does_not_change(make_config, tmp_path):
    settings = {"train.freeze": '["visual.*"]', "optim.lr": 1e-2, "optim.schedule": "constant"}
    classifier = make_config("classification", **{"output_dir": str(tmp_path / "source"), "train.steps": 2})
    run(classifier)
    source = vmoe.create_model(pretrained=tmp_path / "source")
    image = {"pretrained": str(tmp_path / "source"), "num_classes": 0, "drop_path_rate": 0.5, "capacity_factor": 0.3}
    kwargs = {"image": image, "text": TEXT, "embed_dim": 32}
    run(make_config("contrastive", **only(kwargs, **settings, **{"train.steps": 2})))
    shutil.rmtree(tmp_path / "source")
    assert run(make_config("contrastive", **only(kwargs, **settings, **{"train.steps": 4})))["steps"] == 4
    model = vmoe.create_model(pretrained=tmp_path / "run")
    for name, tensor in model.visual.state_dict().items():
        assert torch.equal(tensor, source.state_dict()[name]), name
    pixels = torch.randn(3, 3, 16, 16)
    expected = source.eval().forward_head(source.forward_features(pixels), pre_logits=True)
    torch.testing.assert_close(model.eval().encode_image(pixels), expected)


def test_each_tower_must_leave_its_losses_to_the_loop(make_config):
    for tower in ("image", "text"):
        config = make_config("contrastive", **only({tower: {"auxiliary_loss": "attach"}}))
        with pytest.raises(ConfigError, match=f"model.kwargs.{tower}.auxiliary_loss must be 'record'"):
            config.check()


def test_clip_up_goes_on_from_a_dense_run_with_experts_in_both_towers(make_config, tmp_path):
    dense, clip_up = (read_config(Config, ["--config", f"{name}_tiny_emoji"]) for name in ("two_tower", "clip_up"))
    assert clip_up.optim.lr == pytest.approx(dense.optim.lr / 10)
    assert clip_up.model.pretrained == f"{dense.output_dir}_dense"
    kwargs = {"image": {**IMAGE, "num_experts": 0}, "text": {**TEXT, "num_experts": 0}, "embed_dim": 16}
    run(first := make_config("contrastive", **only(kwargs, output_dir=str(tmp_path / "first"), **{"train.steps": 2})))
    config = make_config("contrastive", **{"train.steps": 2})
    run(replace(config, model=replace(clip_up.model, pretrained=first.output_dir), optim=clip_up.optim))
    model = vmoe.create_model(pretrained=config.output_dir)
    for layer in (model.visual.blocks[1].mlp, model.text.blocks[1].mlp):
        assert (layer.num_experts, layer.num_selected_experts, layer.capacity_factor) == (8, 2, 2.0)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    weighted = {"gshard_loss": 0.01, "z_loss": 0.001}
    routed = [weighted.get(key.rpartition("/")[2], 0) * lines[0][key] for key in lines[0] if ".mlp/" in key]
    assert lines[0]["loss"] - lines[0]["task_loss"] == pytest.approx(sum(routed), rel=1e-3)


@pytest.mark.parametrize("name", ["two_tower_tiny_emoji", "lit_tiny_emoji"])
def test_shipped_configs_name_what_exists(name):
    config = read_config(Config, ["--config", str(CONFIGS / f"{name}.yaml")])
    config.check()
    image = config.model.kwargs["image"]
    if name.startswith("lit"):  # the run that the other config leaves, and its width
        source = yaml.safe_load((CONFIGS / "vmoe_tiny_emoji_groups.yaml").read_text())
        assert image.pop("pretrained") == source["output_dir"]
        image["name"] = source["model"]["name"]
    with torch.device("meta"):
        model = vmoe.create_model(config.model.name, **config.model.kwargs)
    assert list(config.train.freeze) == (["visual.*"] if name.startswith("lit") else [])
    assert model.embed_dim == 128
