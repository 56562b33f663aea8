"""What a run leaves in TensorBoard about its routing, and that training does not depend on it."""

import io

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import vmoe
from vmoe.training import run_images
from vmoe.training.logger import expert_metrics, read_metrics
from vmoe.training.trainer import train

TIMES = ("images_per_second", "data_wait_share")
TAG = "routing/patches"


@pytest.fixture(autouse=True)
def few_images(monkeypatch):
    monkeypatch.setattr(run_images, "NUM_IMAGES", 2)


def quietly(config):
    return train(config, Console(file=io.StringIO()))


def events_of(folder):
    events = EventAccumulator(str(folder / "run" / "tensorboard"), size_guidance={"images": 0, "scalars": 0})
    events.Reload()
    return events


def results_of(folder):
    """(weights, logged metrics without clock times) of a run."""
    weights = load_file(sorted((folder / "run" / "checkpoints").iterdir())[-1] / "model.safetensors")
    lines = read_metrics(folder / "run" / "metrics.jsonl")
    return weights, [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def test_images_change_nothing_of_training(make_config, tmp_path):
    results = []
    for name, every in (("with", 1), ("without", 0)):
        folder = tmp_path / name
        drawn = {"train.tensorboard": every > 0, "train.routing_images_every": every}
        settings = {"output_dir": folder / "run", "train.steps": 2, "train.ema_decay": 0.9}
        quietly(make_config("contrastive", **settings, **drawn))
        results.append(results_of(folder))
    (weights, lines), (plain_weights, plain_lines) = results
    assert lines == plain_lines
    assert all(torch.equal(tensor, plain_weights[name]) for name, tensor in weights.items())
    events = events_of(tmp_path / "with")
    assert [image.step for image in events.Images(TAG)] == [1, 2]
    for modality in ("image", "text"):  # every expert has its load and importance
        for kind in ("load", "importance"):
            tags = [f"experts/blocks.1.mlp/{modality}/{kind}_{expert:02d}" for expert in range(4)]
            values = [events.Scalars(tag)[-1].value for tag in tags]
            assert sum(values) == pytest.approx(1, abs=1e-5)
            assert len(set(values)) > 1
    assert not any(key.startswith("experts/") for line in lines for key in line)


@pytest.mark.parametrize(
    ("every", "evaluations", "expected"), [(2, 0, [2, 3]), (None, 2, [2, 3]), (None, 0, []), (0, 2, [])]
)
def test_images_come_when_they_are_asked_for(make_config, tmp_path, every, evaluations, expected):
    settings = {"train.routing_images_every": every, "train.eval_every": evaluations, "train.tensorboard": True}
    quietly(make_config(**settings, **{"train.steps": 3}))
    events = events_of(tmp_path)
    found = events.Images(TAG) if TAG in events.Tags()["images"] else []
    assert [image.step for image in found] == expected
    assert all(image.width > 300 for image in found)


def test_expert_metrics_are_those_of_the_record():
    torch.manual_seed(0)
    model = vmoe.create_model("vmoe_tiny_patch8_48", img_size=16, embed_dim=16, num_heads=2, depth=2, num_experts=4)
    with vmoe.record_routing(model.eval()) as record:
        model(torch.randn(3, 3, 16, 16))
    layer, measured = record.layers["blocks.1.mlp"], expert_metrics(record)
    for expert in range(4):
        name = f"experts/blocks.1.mlp/image/{{}}_{expert:02d}"
        assert measured[name.format("load")] == pytest.approx(layer.load[expert].item() / layer.load.sum().item())
        assert measured[name.format("importance")] == pytest.approx(layer.gates[..., expert].mean().item())


def test_a_dense_model_has_no_image(make_config, tmp_path):
    settings = {"train.tensorboard": True, "train.steps": 2, "train.routing_images_every": 1}
    quietly(make_config(**settings, **{"model.kwargs.num_experts": 0}))
    assert events_of(tmp_path).Tags()["images"] == []


def test_an_image_that_cannot_be_drawn_costs_nothing_but_itself(make_config, tmp_path, monkeypatch, caplog):
    steps = []

    def fail(*_, **__):
        steps.append([folder.name for folder in (tmp_path / "run" / "checkpoints").iterdir()])
        raise RuntimeError("the font is broken")

    monkeypatch.setattr(run_images, "example_figure", fail)
    settings = {"train.steps": 2, "train.tensorboard": True, "train.checkpoint_every": 1, "train.keep_last": 3}
    summary = quietly(make_config(**settings, **{"train.routing_images_every": 1}))
    assert summary["steps"] == 2
    assert steps == [["step_000001"]]  # saved before, and not tried again
    assert [r.getMessage() for r in caplog.records] == ["no image of the routing: the font is broken"]
