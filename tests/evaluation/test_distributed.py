"""The same figures from 1, 2 and 3 processes and with batch sizes 1, 7 and 64."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import vmoe
from vmoe.evaluation.distributed import gather_rows
from vmoe.models.factory import save_pretrained

CLASSES = ("cat", "dog", "eel")
IMAGES_PER_CLASS = 9  # 27 in all: neither 2 processes nor 7 to a batch divide it

# One start of torchrun for all tasks: starting is what takes the time.
SCRIPT = """
import os, sys
from vmoe.distributed.processes import joined as processes
from vmoe.evaluation.run import main

folder, world, *sizes = sys.argv[1:]
data = ["--data.type", "image_folder", "--data.path", folder + "/tree"]
captions = ["--data.type", "pairs", "--data.path", folder + "/pairs.csv"]
fit = [*data, "--train_data.type", "image_folder", "--train_data.path", folder + "/train"]
fit += ["--features.k", "[1, 10]", "--features.shots", "[1, 5]", "--features.l2_range", "[1, 100]", "--features.cache"]
common = ["--loader.num_workers", "0", "--device", "cpu", "--loader.on_bad", "skip"]
with processes():
    for size in sizes:
        for task, checkpoint, source in (
            ("classification", "classifier", data), ("zero_shot", "limoe", data), ("retrieval", "limoe", captions),
            ("few_shot", "limoe", [*fit, f"{folder}/cache_{world}"]),  # from the second batch size on from the cache
            ("linear_probe", "classifier", [*fit, "null"]),
            ("knn", "limoe", [*fit, "null"]),
        ):
            code = main(["--task", task, "--checkpoint", f"{folder}/{checkpoint}", *source, *common,
                         "--loader.batch_size", size, "--output", f"{folder}/{task}_{world}_{size}.json"])
            assert code == 0, code
"""


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
    model = vmoe.create_model("limoe_tiny_patch8_48", width=32, embed_dim=16, **tiny)
    save_pretrained(model, root / "limoe" / "model.safetensors")
    model = vmoe.create_model("vmoe_tiny_patch8_48", num_classes=3, embed_dim=32, **tiny)
    save_pretrained(model, root / "classifier" / "model.safetensors", extra={"class_names": list(CLASSES)})
    (root / "script.py").write_text(SCRIPT)
    return root


@pytest.mark.parametrize(
    "sizes_of_world",
    [
        {1: (64,), 2: (7,), 3: (1,)},
        pytest.param(dict.fromkeys((1, 2, 3), (1, 7, 64)), marks=pytest.mark.exhaustive),
    ],
    ids=["three", "all"],
)
def test_processes_and_batch_sizes_do_not_matter(folder, sizes_of_world):
    jobs = {}
    for world, sizes in sizes_of_world.items():
        start = [sys.executable]
        if world > 1:
            start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"]
        command = [*start, str(folder / "script.py"), str(folder), *map(str, (world, *sizes))]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        jobs[world] = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    for world, job in jobs.items():
        output = job.communicate(timeout=240)[0].decode()
        assert job.returncode == 0, output
        assert output.count("measure") == 6 * len(sizes_of_world[world])  # tables, from one process
    for task in ("classification", "zero_shot", "retrieval", "few_shot", "linear_probe", "knn"):
        reports = {
            (world, size): json.loads((folder / f"{task}_{world}_{size}.json").read_text())
            for world, sizes in sizes_of_world.items()
            for size in sizes
        }
        expected = reports[1, 64]
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


def test_rows_come_in_the_order_of_the_data():
    index, rows = gather_rows(torch.tensor([3, 0, 2]), a=torch.tensor([30, 0, 20]), b=torch.eye(3))
    assert index.tolist() == [0, 2, 3]
    assert rows["a"].tolist() == [0, 20, 30]
    assert rows["b"].argmax(1).tolist() == [1, 2, 0]
