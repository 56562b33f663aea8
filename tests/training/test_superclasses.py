"""Super-classes: those of a confusion matrix, the loss of the gates, and a run that learns them."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import vmoe
from vmoe.evaluation.confusion import write_csv
from vmoe.moe import SparseMoE
from vmoe.training.logger import read_metrics
from vmoe.training.superclasses import SuperclassLoss, cluster_classes
from vmoe.utils.config import ConfigError

from .test_trainer import run

COLOURS = ["blue", "green", "red"]


def test_confused_classes_are_clustered():
    confusion = torch.diag(torch.tensor([90, 900, 90, 90, 90]))
    confusion[0, 3], confusion[1, 4], confusion[2, 1], confusion[2, 4] = 8, 70, 1, 1  # shares count, not images
    assert cluster_classes(confusion, 3) == [0, 1, 2, 0, 1]
    assert cluster_classes(confusion, 2) == [0, 1, 1, 0, 1]
    assert cluster_classes(confusion, 5) == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="5 classes cannot be 6 super-classes, as many as experts; set num_experts"):
        cluster_classes(confusion, 6)
    with pytest.raises(ValueError, match="no image is taken for another class"):
        cluster_classes(torch.eye(3).long(), 2)


@pytest.mark.parametrize("settings", [{"per_image": True}, {}, {"per_image": True, "ensemble_size": 2}])
def test_the_loss_is_the_cross_entropy_of_the_gates(tmp_path, settings):
    torch.manual_seed(0)
    M = settings.get("ensemble_size", 1)
    layer = SparseMoE(8, 8, num_experts=2 * M, **settings)
    (tmp_path / "map.json").write_text('{"a": 0, "b": 1, "c": 0}')
    settings = SimpleNamespace(source=str(tmp_path / "map.json"), weight=1.0)
    superclasses = SuperclassLoss(settings, layer, ["a", "b", "c"])
    assert superclasses.describe() == "super-classes: a, c | b"
    x = torch.randn(2 * M, 5, 8)
    mask = (torch.arange(5) < torch.tensor([[3], [5]])).repeat_interleave(M, 0)
    with vmoe.record_routing(layer) as record:
        layer(x, mask)
    labels, share = torch.tensor([2, 1]), torch.tensor([[0.3, 0.6, 0.1], [0.0, 1.0, 0.0]])
    losses, right = [], []
    for b in range(2 * M):
        gate = layer.router.weight.chunk(M)[b % M]
        tokens = x[b, mask[b]]
        logits = (tokens.mean(0, keepdim=True) if layer.settings.per_image else tokens) @ gate.T
        losses.append(-logits.log_softmax(-1).mean(0))
        right.append((logits.argmax(-1) == (labels[b // M] == 1)).float().mean())
    loss = lambda target: torch.stack([target[b // M] @ losses[b] for b in range(2 * M)]).mean()  # noqa: E731
    found = superclasses(record, labels)
    torch.testing.assert_close(found["superclass_loss"], loss(torch.eye(2)))
    torch.testing.assert_close(found["superclass_top1"], torch.stack(right).mean())
    mixed = superclasses(record, share)["superclass_loss"]  # as mixup mixes labels
    torch.testing.assert_close(mixed, loss(torch.tensor([[0.4, 0.6], [0.0, 1.0]])))


def test_a_run_learns_to_route_its_classes(make_config, tmp_path):
    counts = [[9, 0, 4], [0, 9, 1], [4, 0, 9]]
    matrix = tmp_path / "dense_confusion.csv"
    rows = [["class", *COLOURS], *([name, *row] for name, row in zip(COLOURS, counts, strict=True))]
    write_csv(matrix, rows)
    model = {"model.kwargs.num_experts": 2, "model.kwargs.per_image": True}
    guided = {"train.superclasses.source": str(matrix), "train.steps": 25, "optim.lr": 3e-3}
    config = make_config(**model, **guided)
    _, printed = run(config)
    assert "super-classes: blue, red | green\n" in printed
    lines = read_metrics(Path(config.output_dir) / "metrics.jsonl")
    assert lines[0]["superclass_loss"] > 0.5
    assert lines[-1]["superclass_loss"] < 0.2
    assert lines[-1]["superclass_top1"] == 1
    total = lines[0]["task_loss"] + 0.3 * lines[0]["superclass_loss"]
    assert math.isclose(lines[0]["loss"], total + lines[0]["routing/blocks.1.mlp/auxiliary_loss"], rel_tol=1e-3)
    rows[1], rows[2] = ["blue", 9, 5, 0], ["green", 5, 9, 0]
    write_csv(matrix, rows)
    with pytest.raises(ConfigError, match="confusion.csv has other groups than when .*run began; give those"):
        run(make_config(**model, **guided | {"train.steps": 26}))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("m.json", "[0, 1]", r"m.json: must be a JSON object \{class: number of its super-class\}"),
        ("m.json", '{"blue": 0, "green": 1}', "only one of them has 'red'"),
        ("m.json", '{"blue": 0, "green": 0, "red": 0}', r"super-classes must be 0..1, one for each expert, got \[0\]"),
        ("m.json", "{", r"m.json: not valid JSON"),
        ("m.csv", "class,blue,green\nblue,1,2\ngreen,0,1\n", "and data.train 3; they must agree"),
        ("m.csv", "class,blue,green,red\nblue,1,2\ngreen,0,1,2\nred,1,1,1\n", "a count is missing or no whole number"),
        ("m.csv", "class,blue,green,red\nblue,1,2,3,4\ngreen,0,1,2,3\nred,1,1,1,1\n", "or no whole number"),
        ("m.csv", "class,blue,green,red\nblue,1,2,3\ngreen,0,-1,2\nred,1,1,1\n", "a count is negative"),
        ("m.csv", "index,sample\n", "m.csv: is no confusion matrix of eval.py"),
        (None, "", r"gone: cannot be read \(No such file or directory\); give the FILE_confusion.csv of eval.py"),
    ],
)
def test_bad_maps_are_one_sentence(tmp_path, name, content, message):
    source = tmp_path / (name or "gone")
    if name is not None:
        source.write_text(content)
    settings = SimpleNamespace(source=str(source), weight=1.0)
    with pytest.raises(ConfigError, match=message) as error:
        SuperclassLoss(settings, SparseMoE(8, 8, num_experts=2), COLOURS)
    assert str(error.value).startswith("train.superclasses.source") or "they must agree" in message
    with pytest.raises(ConfigError, match="needs sparse layers with router='top_k'"):
        SuperclassLoss(settings, nn.Linear(2, 2), COLOURS)
