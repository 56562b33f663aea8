"""The lines at the start of a run say which weights it has."""

from vmoe.models.factory import create_model, save_pretrained

from .conftest import TINY_VIT
from .test_trainer import run

ONE_STEP = {"train.steps": 1, "train.epochs": None}


def start(config):
    """{"device": what follows it, ...}"""
    pairs = [line.partition(": ") for line in run(config)[1].splitlines()]
    return {key: text for key, _, text in pairs if key in ("device", "data", "steps", "model", "weights")}


def test_a_new_run(make_config):
    found = start(make_config(**{"train.steps": None, "train.epochs": 1, "train.eval_every": 3}))
    model = create_model("vmoe_tiny_patch8_48", **TINY_VIT, num_classes=3)
    total = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert found["device"] == "cpu, float32"
    assert found["data"] == "24 images to train on (image_folder), 24 to evaluate on (image_folder), 3 classes"
    assert found["steps"] == "3 (1 epoch) of 8 images"
    assert found["model"].startswith(f"vmoe_tiny_patch8_48, {total:.2f} M parameters, ")
    assert found["weights"] == "new"


def test_loaded_weights_are_named(make_config, tmp_path):
    model = create_model("vmoe_tiny_patch8_48", **{**TINY_VIT, "img_size": 32}, num_classes=5)
    save_pretrained(model, tmp_path / "old.safetensors")
    number = len(model.state_dict())
    given = {"model.pretrained": tmp_path / "old.safetensors", **ONE_STEP}
    config = make_config(**given, **{"train.accumulate_steps": 2, "train.freeze": '["patch_embed.*"]'})
    found = start(config)
    assert found["weights"] == (
        f"{number - 2} tensors of {tmp_path / 'old.safetensors'}, new: head.weight, head.bias, "
        "resized to the new image size: pos_embed"
    )
    assert found["steps"] == "1 of 2 x 8 images"
    assert found["model"].endswith(" M trained")
    assert "this run is finished (1 step); a larger train.steps continues it" in run(config)[1]
    config.train.steps = 2
    assert start(config)["weights"].startswith(f"all {number} tensors of {config.output_dir}/checkpoints/step_000001/")


def test_an_image_tower_is_named(make_config, tmp_path):
    """Weights of a part: the image tower of two towers."""
    tower = create_model("vmoe_tiny_patch8_48", **TINY_VIT, num_classes=0)
    save_pretrained(tower, tmp_path / "tower.safetensors")
    config = make_config("contrastive", **ONE_STEP)
    config.model.name = "two_tower_tiny_patch8_48"
    text = {"width": 32, "depth": 2, "num_heads": 2, "num_experts": 4, "context_length": 8}
    config.model.kwargs = {"image": {"pretrained": str(tmp_path / "tower.safetensors")}, "text": text, "embed_dim": 16}
    expected = f"visual: {len(tower.state_dict())} tensors of {tmp_path / 'tower.safetensors'}"
    assert start(config)["weights"] == f"{expected}, new: head.weight, head.bias"
