"""The same metrics from 1, 2 and 3 processes and with batch sizes 1, 7 and 64."""

import json
import re
import runpy

import numpy as np
import pytest
import torch
from PIL import Image

import vmoe
from vmoe.evaluation import synchronized
from vmoe.evaluation.synchronized import Rows
from vmoe.models.factory import save_pretrained

CLASSES = ("cat", "dog", "eel")
IMAGES_PER_CLASS = 9  # 27 in all: neither 2 processes nor 7 to a batch divide it

RUNS = (  # task and model
    *(("classification", "classifier"), ("linear_probe", "classifier"), ("capacity", "classifier")),
    *(("zero_shot", "limoe"), ("retrieval", "limoe"), ("few_shot", "limoe")),
    *(("knn", "limoe"), ("capacity", "limoe")),  # only in the exhaustive form: their parts are in those before
)

# torchrun's agent, for all tasks and numbers of processes, from one process that forks the others: importing is what
# takes the time.
SCRIPT = (
    f"RUNS = {RUNS}"
    + """
import sys
import torch
import matplotlib.figure, open_clip  # what the tasks import when they need it
from PIL import Image
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from vmoe.distributed.process_group import joined as processes
from vmoe.cli.evaluate import main

def evaluate(folder, world, sizes, runs):
    data = ["--data.type", "image_folder", "--data.path", folder + "/tree"]
    fit = [*data, "--train_data.type", "image_folder", "--train_data.path", folder + "/train"]
    fit += ["--features.k", "[1, 10]", "--features.shots", "[1, 5]", "--features.l2_range", "[1, 10]"]
    arguments = {
        "classification": data,
        "zero_shot": data,
        "retrieval": ["--data.type", "pairs", "--data.path", folder + "/pairs.csv"],
        "few_shot": [*fit, "--features.cache", f"{folder}/cache_{world}"],
        **dict.fromkeys(["linear_probe", "knn"], [*fit, "--features.cache", "null"]),
        "capacity": [*data, "--capacity.images_per_group", "6", "--capacity.factors", "[0.2, null]",
                     "--capacity.timing_rounds", "0"],
    }
    common = ["--loader.num_workers", "0", "--device", "cpu", "--loader.on_bad", "skip"]
    for size in sizes:
        for task, checkpoint in RUNS[:runs]:
            code = main(["--task", task, "--checkpoint", f"{folder}/{checkpoint}", *arguments[task], *common,
                         "--loader.batch_size", str(size),
                         "--output", f"{folder}/{task}_{checkpoint}_{world}_{size}.json"])
            assert code == 0, code

def work(*arguments):
    torch.set_num_threads(1)  # the processes share the cores
    with processes():
        evaluate(*arguments)

if __name__ == "__main__":
    Image.init()
    folder, runs, *worlds = sys.argv[1:]  # such as "3:1" and "2:7,64": the number of processes and the batch sizes
    for text in worlds:
        world, sizes = text.split(":")
        config = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=int(world), start_method="fork", run_id=world,
                              rdzv_backend="c10d", rdzv_endpoint="localhost:0", monitor_interval=0.1, max_restarts=0)
        elastic_launch(config, work)(folder, int(world), sizes.split(","), int(runs))
"""
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("processes")
    generator = np.random.default_rng(0)
    rows = ["image,caption"]
    for name in CLASSES:
        (root / "tree" / name).mkdir(parents=True)
        (root / "train" / name).mkdir(parents=True)
        for number in range(IMAGES_PER_CLASS):
            pixels = generator.integers(0, 255, (50, 60, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "train" / name / f"{number}.png")
            path = f"tree/{name}/{number}.png"
            Image.fromarray(generator.integers(0, 255, (50, 60, 3), dtype=np.uint8)).save(root / path)
            rows += [f"{path},a {name}, the {number}th".replace(", ", " "), f"{path},{number} times {name}"]
    (root / "tree" / "eel" / "4.png").write_bytes(b"torn")
    (root / "pairs.csv").write_text("\n".join(rows))
    torch.manual_seed(0)
    tiny = {"depth": 2, "num_heads": 2}
    model = vmoe.create_model("limoe_tiny_patch8_48", width=32, embed_dim=16, moe_layers="every1", **tiny)
    save_pretrained(model, root / "limoe" / "model.safetensors")
    settings = {"num_classes": 3, "embed_dim": 32, "num_selected_experts": 1, "moe_layers": "every1"}
    model = vmoe.create_model("vmoe_tiny_patch8_48", **settings, **tiny)
    for weight in (model.head.weight, *(block.mlp.router.weight for block in model.blocks)):
        torch.nn.init.normal_(weight)  # fresh ones hardly tell images apart
    save_pretrained(model, root / "classifier" / "model.safetensors", extra={"class_names": list(CLASSES)})
    (root / "script.py").write_text(SCRIPT)
    return root


@pytest.mark.parametrize(
    ("sizes_of_world", "count"),
    [
        ({1: (64,), 2: (7,), 3: (1,)}, 6),
        pytest.param(dict.fromkeys((1, 2, 3), (1, 7, 64)), len(RUNS), marks=pytest.mark.exhaustive),
    ],
    ids=["three", "all"],
)
def test_processes_and_batch_sizes_do_not_matter(forks, folder, sizes_of_world, count, capsys):
    several = {world: sizes for world, sizes in sorted(sizes_of_world.items(), reverse=True) if world > 1}
    worlds = [f"{world}:{','.join(map(str, sizes))}" for world, sizes in several.items()]
    job = forks.script(folder / "script.py", [str(folder), str(count), *worlds], folder / "output.txt")
    try:
        runpy.run_path(str(folder / "script.py"))["evaluate"](str(folder), 1, sizes_of_world[1], count)
        code, output = job.wait(), (folder / "output.txt").read_text()
    finally:
        job.end()
    assert code == 0, output
    output += capsys.readouterr().out
    runs = [(world, size) for world, sizes in sizes_of_world.items() for size in sizes]
    assert output.count("measure") == len(runs) * count  # tables, from one process
    for task, checkpoint in RUNS[:count]:
        reports = {
            (world, size): json.loads((folder / f"{task}_{checkpoint}_{world}_{size}.json").read_text())
            for world, size in runs
        }
        expected = reports[1, 64]
        if task == "capacity":
            details = json.dumps(expected["checkpoints"][0]["details"])
            assert len(set(re.findall(r'"share_dropped": ([\d.]+)', details))) > 1  # the settings do differ
        else:
            torn = expected["checkpoints"][0]["details"]["skipped"]
            assert len(torn) == 1
            assert torn[0].endswith("4.png")
        assert expected["results"]["num_samples"] == (52 if task == "retrieval" else 26)
        assert expected["results"]["num_skipped"] == (2 if task == "retrieval" else 1)
        for (world, _), report in reports.items():
            assert report["processes"] == world
            assert report["results"] == expected["results"]
            assert report["checkpoints"] == expected["checkpoints"]
            assert report["data"] == expected["data"]
        for ending in ("per_class.csv", "confusion.csv", "confusion.png", "samples.csv"):
            files = [folder / f"{task}_{checkpoint}_{world}_{size}_{ending}" for world, size in runs]
            there = task in ("classification", "zero_shot")
            assert [file.exists() for file in files] == [there] * len(files)
            assert len({file.read_bytes() for file in files if file.exists()}) == there


def test_rows_come_in_the_order_of_the_data():
    rows = Rows()
    rows.add(torch.tensor([3, 0]), a=torch.tensor([30, 0]), b=torch.eye(3)[:2])
    rows.add(torch.tensor([2]), a=torch.tensor([20]), b=torch.eye(3)[2:])
    index, rows = rows.gather()
    assert index.tolist() == [0, 2, 3]
    assert rows["a"].tolist() == [0, 20, 30]
    assert rows["b"].argmax(1).tolist() == [1, 2, 0]


def test_a_blank_batch_of_patches_is_of_real_ones_in_the_first_position(monkeypatch):
    """Of a process that has no batch left, while another has."""
    image = {"patches": torch.rand(5, 6, 192), "patch_coord": torch.randint(2, 9, (5, 6, 2))}
    image["patch_valid"] = torch.rand(5, 6) < 0.5
    theirs = [{name: part[:1].to("meta") for name, part in image.items()}, None]
    monkeypatch.setattr(synchronized, "world", lambda: (1, 2))
    monkeypatch.setattr(synchronized, "is_sharded", lambda model: True)
    monkeypatch.setattr(synchronized, "gather_lists", lambda own: [(None, theirs.pop(0)), *own])
    [batch] = synchronized.SynchronizedBatches([], torch.nn.Identity())
    assert batch.keys() == {"image"}
    assert {name: (part.shape, part.dtype) for name, part in batch["image"].items()} == {
        name: (part[:1].shape, part.dtype) for name, part in image.items()
    }
    assert batch["image"]["patch_valid"].all()
    assert not batch["image"]["patches"].any()
    assert not batch["image"]["patch_coord"].any()
