"""Task "adversarial" on a small V-MoE that was trained a little."""

import csv
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import vmoe
from vmoe.cli.evaluate import main
from vmoe.data.config import SourceConfig
from vmoe.evaluation.config import AdversarialConfig, EvaluationConfig
from vmoe.evaluation.tasks import check_task
from vmoe.models.factory import save_pretrained
from vmoe.utils.config import ConfigError

CLASSES = ["blue", "gray", "green", "red"]
EPSILONS = ["1/255", "8/255", "24/255"]
SMALL = {"depth": 2, "num_heads": 2, "moe_layers": "every1", "img_size": 16}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Gray noise with a tint: ten images of each class."""
    root, generator = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for name, tint in zip(CLASSES, ([0, 0, 1], [0, 0, 0], [0, 1, 0], [1, 0, 0]), strict=True):
        (root / name).mkdir()
        for number in range(10):
            pixels = 100 + generator.integers(0, 60, (16, 16, 3)) + generator.integers(0, 30) * np.array(tint)
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def checkpoint(tree, tmp_path_factory):
    torch.manual_seed(0)
    model = vmoe.create_model("vmoe_tiny_patch8_48", num_classes=4, embed_dim=32, **SMALL)
    files = sorted(tree.glob("*/*.png"))
    pixels = torch.stack([torch.from_numpy(np.array(Image.open(file))) for file in files]).movedim(-1, 1) / 255
    label, optimizer = torch.arange(4).repeat_interleave(10), torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(25):
        with vmoe.record_routing(model) as record:
            loss = torch.nn.functional.cross_entropy(model((pixels - 0.5) / 0.5), label)
        loss = loss + record.auxiliary_loss()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("run")
    save_pretrained(model.eval(), folder / "model.safetensors", extra={"class_names": CLASSES})
    return folder


def arguments(checkpoint, tree, output, *others):
    data = ["--data.path", str(tree), "--loader.num_workers", "0", "--output", str(output)]
    settings = ["--adversarial.steps", "5", "--adversarial.epsilons", json.dumps(EPSILONS)]
    return ["--config", "adversarial", "--checkpoint", str(checkpoint), *data, *settings, *others]


@pytest.fixture(scope="module")
def report(checkpoint, tree, tmp_path_factory):
    output = tmp_path_factory.mktemp("results") / "out.json"
    assert main(arguments(checkpoint, tree, output)) == 0
    with (output.parent / "out_samples.csv").open(newline="") as stream:
        return json.loads(output.read_text()), list(csv.DictReader(stream))


def test_accuracy_falls_as_epsilon_grows(report):
    results = report[0]["results"]
    assert results["top1"] > 0.7
    for name in ("pgd", "apgd_ce", "apgd_t", "all"):
        top1 = [results["top1"], *(results[f"top1_{name}_{epsilon}"] for epsilon in EPSILONS)]
        assert top1 == sorted(top1, reverse=True)
        assert top1[-1] < 0.2
    for epsilon in EPSILONS:
        assert results[f"top1_all_{epsilon}"] <= min(results[f"top1_{name}_{epsilon}"] for name in ("pgd", "apgd_t"))


def test_the_file_has_all_of_each_setting(report):
    report, _ = report
    points = report["checkpoints"][0]["details"]["points"]
    assert [(point["epsilon"], point["attack"]) for point in points[:4]] == [
        ("1/255", "pgd"),
        ("1/255", "apgd_ce"),
        ("1/255", "apgd_t"),
        ("8/255", "pgd"),
    ]
    assert points[3]["epsilon_value"] == 8 / 255
    for point in points:
        assert point["top1"] == report["results"][f"top1_{point['attack']}_{point['epsilon']}"]
        assert list(point["routing_changed"]) == ["blocks.0.mlp", "blocks.1.mlp"]
        assert all(0 <= share <= 1 for share in point["routing_changed"].values())
    small, large = (points[number]["routing_changed"]["blocks.1.mlp"] for number in (0, 6))
    assert small < large


def test_the_table_of_samples_gives_the_metrics(report, checkpoint, tree, tmp_path):
    report, rows = report
    assert [row["index"] for row in rows] == [str(index) for index in range(40)]
    assert rows[11]["sample"].endswith("gray/1.png")
    for name, value in report["results"].items():
        if name.startswith("top1") and "all" not in name:
            assert np.mean([int(row[name.removeprefix("top1_")]) for row in rows]) == pytest.approx(value)
    plain = ["--config", "classification_folder", "--checkpoint", str(checkpoint), "--data.path", str(tree)]
    assert main([*plain, "--loader.num_workers", "0", "--output", str(tmp_path / "plain.json")]) == 0
    with (tmp_path / "plain_samples.csv").open(newline="") as stream:
        others = list(csv.DictReader(stream))
    for name in ("index", "sample", "label", "top1"):
        assert [row[name] for row in others] == [row[name] for row in rows]
    assert all((row["predicted"] == row["label"]) == (row["top1"] == "1") for row in others)


def test_results_repeat_whatever_the_batches_and_the_other_images(report, checkpoint, tree, tmp_path):
    _, rows = report
    some = ["--adversarial.attacks", "[pgd, apgd_ce]", "--adversarial.max_samples", "15", "--loader.batch_size", "4"]
    assert main(arguments(checkpoint, tree, tmp_path / "some.json", *some)) == 0
    with (tmp_path / "some_samples.csv").open(newline="") as stream:
        found = list(csv.DictReader(stream))
    assert len(found) == 15
    assert len({row["label"] for row in found}) > 2  # drawn at random
    for row in found:
        assert row == {name: rows[int(row["index"])][name] for name in row}


def test_a_dense_model_has_no_routing_to_change(tree, tmp_path):
    torch.manual_seed(0)
    model = vmoe.create_model("vit_tiny_patch16_224", num_classes=4, img_size=16, depth=1, embed_dim=24)
    torch.nn.init.normal_(model.head.weight)
    save_pretrained(model, tmp_path / "model.safetensors", extra={"class_names": CLASSES})
    few = ["--adversarial.attacks", "[pgd]", "--adversarial.epsilons", "[0.1]"]
    assert main(arguments(tmp_path, tree, tmp_path / "out.json", *few)) == 0
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["results"]["top1_pgd_0.1"] < report["results"]["top1"]
    assert report["checkpoints"][0]["details"]["points"][0]["routing_changed"] == {}


def test_an_image_text_model_is_attacked_by_the_names(tree, tmp_path):
    torch.manual_seed(0)
    model = vmoe.create_model("limoe_tiny_patch8_48", width=32, embed_dim=16, **SMALL)
    save_pretrained(model, tmp_path / "model.safetensors")
    few = ["--adversarial.attacks", "[pgd]", "--adversarial.epsilons", "[24/255]"]
    assert main(arguments(tmp_path, tree, tmp_path / "out.json", *few)) == 0
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    assert set(results) == {"top1", "top1_pgd_24/255", "num_samples", "num_skipped"}
    assert results["top1_pgd_24/255"] < results["top1"]


@pytest.mark.parametrize("epsilons", [["8"], [8], ["8/0"], ["tiny"], [0.0], [], ["1/255", "2/510"]])
def test_epsilons_that_are_no_shares_of_a_pixel(epsilons):
    with pytest.raises(ConfigError, match="epsilons must be > 0 and <= 1, shares of the range of a pixel"):
        AdversarialConfig(epsilons=epsilons)


def test_what_cannot_be_attacked(checkpoint, tree, tmp_path, capsys):
    def problem(*others, data=tree):
        assert main(arguments(checkpoint, data, tmp_path / "out.json", *others)) != 0
        return capsys.readouterr().err

    assert "experts kept as int8 have none" in problem("--experts", "int8")
    for name in CLASSES[:2]:
        shutil.copytree(tree / name, tmp_path / "two" / name)
    assert "'apgd_t' needs four classes, and the data has 2: leave it out" in problem(data=tmp_path / "two")
    with pytest.raises(SystemExit):
        main(arguments(checkpoint, tree, tmp_path / "out.json", "--precision", "fp16"))
    assert "precision must be float32 or bf16 for task 'adversarial'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(arguments(checkpoint, tree, tmp_path / "out.json", "--adversarial.attacks", "[pgd, pgd]"))
    assert "adversarial.attacks must name at least one attack and none twice" in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()


LIMIT = {"eval_capacity_factor": 1.0}
FREE = {"eval_capacity_factor": None, "capacity": None, "group_size": None}


@pytest.mark.parametrize(
    ("settings", "refused"),
    [
        (LIMIT, True),
        ({"capacity": 4}, True),
        (LIMIT | {"group_size": 10}, True),  # two images
        (LIMIT | {"group_size": 5}, False),  # an image
        ({"group_size": 10}, False),  # no limit
        ({"eval_capacity_factor": float("inf")}, False),
        ({"router": "expert_choice"}, False),
        ({"router": "expert_choice", "group_size": 10}, True),
    ],
)
def test_images_must_not_share_a_capacity(checkpoint, tree, tmp_path, capsys, settings, refused):
    few = ["--adversarial.attacks", "[pgd]", "--adversarial.epsilons", "[0.1]", "--adversarial.max_samples", "2"]
    names = {"class_names": CLASSES}
    save_pretrained(vmoe.create_model(pretrained=checkpoint, **settings), tmp_path / "m.safetensors", extra=names)
    code = main(arguments(tmp_path / "m.safetensors", tree, tmp_path / "out.json", *few))
    error = capsys.readouterr().err
    assert (code != 0) == refused == ("layer blocks.0.mlp of" in error), error
    if refused:
        assert "limited capacity for the images of a batch: save the model of vmoe.create_model(" in error
        free = vmoe.create_model(pretrained=tmp_path / "m.safetensors", **FREE)  # the remedy
        save_pretrained(free, tmp_path / "free.safetensors", extra=names)
        assert main(arguments(tmp_path / "free.safetensors", tree, tmp_path / "out.json", *few)) == 0


def test_images_of_several_classes_have_no_class_to_leave():
    config = EvaluationConfig("a run", "adversarial", data=SourceConfig("imagenet_real", "val"))
    loaded = SimpleNamespace(model=torch.nn.Identity(), tokenizer=None, checkpoint="a run")
    dataset = SimpleNamespace(classes=CLASSES, label_sets=[(0, 1)], has_captions=False)
    with pytest.raises(ConfigError, match="needs one class per image, and data of type 'imagenet_real' has more"):
        check_task(config, loaded, dataset)
