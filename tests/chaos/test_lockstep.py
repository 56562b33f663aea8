"""Evaluation during training, where the processes hold parts of the model and must call it together."""

import json

import pytest

from tests.forked import free_port, printed

from .tiny import arguments

# 27 validation images, one of them torn.
MESHES = {
    # 4 batches of 7 for 2 processes, the last of them with one sample too few
    "fsdp": {"parallel__dp_shard": 2, "evaluate__batch_size": 7},
    # a single batch: the second process has none
    "ep": {"parallel__ep": 2, "evaluate__batch_size": 64},
}
COMMON = {
    "train__steps": 3,
    "train__eval_every": 3,
    "evaluate__on_bad": "skip",
    "parallel__timeout": 60,
    "optim__lr": 1e-12,  # routing groups differ: the weights must not
}
# Both draw images with the model; once is enough, it takes the time
IMAGES = {"evaluate__examples": 2, "train__tensorboard": True}
CONTRASTIVE = {
    "task": "contrastive",
    "model__name": "limoe_tiny_patch8_48",
    "model__kwargs": "{img_size: 16, patch_size: 8, width: 32, depth: 2, num_heads: 2, embed_dim: 16, num_experts: 4}",
    "data__train__type": "pairs",
    "data__val__type": "pairs",
    "train__ema_decay": "null",  # classification has one
}


@pytest.fixture(scope="module")
def data(config, tmp_path_factory):
    """{"val": a folder with a torn image, "pairs": all images with captions}"""
    images = config.parent / "images"
    root = tmp_path_factory.mktemp("val")
    lines = ["image,caption"]
    for number, file in enumerate(sorted(images.glob("*/*.png"))):
        copy = root / "images" / file.relative_to(images)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(b"torn" if number == 13 else file.read_bytes())
        lines.append(f"{file},a {file.parent.name} square number {number}")
    (root / "pairs.csv").write_text("\n".join(lines) + "\n")
    return {"val": root / "images", "pairs": root / "pairs.csv"}


@pytest.mark.parametrize("task", ["classification", "contrastive"])
def test_a_sharded_model_is_evaluated_as_one_process_does(task, forks, config, data, tmp_path):
    settings = COMMON | {"data__val__path": data["val"]}
    if task == "contrastive":
        settings = COMMON | CONTRASTIVE
        for source in ("data__train", "data__val"):
            settings |= {f"{source}__path": data["pairs"], f"{source}__image_root": config.parent}
    jobs = {"alone": [forks.start(arguments(config, tmp_path / "alone", **settings), tmp_path / "alone.txt")]}
    for name, mesh in MESHES.items():
        images = IMAGES if (task, name) == ("classification", "fsdp") else {}
        given = arguments(config, tmp_path / name, **settings, **mesh, **images)
        jobs[name] = forks.group(given, tmp_path / f"{name}.txt", free_port())
    for name, processes in jobs.items():
        said = "".join(file.read_text() for file in tmp_path.glob(f"{name}.*"))
        assert [process.wait() for process in processes] == [0] * len(processes), said
        assert "no images" not in said
        assert "no examples" not in said
        assert "Exception" not in said
    if task == "classification":
        assert (tmp_path / "fsdp" / "examples.png").stat().st_size > 10_000
    figures = {name: json.loads((tmp_path / name / "summary.json").read_text())["evaluation"] for name in jobs}
    expected = figures.pop("alone")
    assert expected["num_samples"] == (26 if task == "classification" else 27)
    assert expected["num_skipped"] == (1 if task == "classification" else 0)
    for name in MESHES:
        assert figures[name] == pytest.approx(expected, abs=1e-4), name


def test_a_bad_validation_image_stops_all_processes_with_one_sentence(forks, config, data, tmp_path):
    given = arguments(
        config,
        tmp_path / "run",
        train__steps=3,
        train__eval_every=2,
        data__val__path=data["val"],
        parallel__timeout=60,
    )
    processes = forks.group(given, tmp_path / "out", free_port())
    assert [process.wait() for process in processes] == [1, 1]
    said = [printed(tmp_path / f"out.{rank}") for rank in range(2)]
    assert said[0].count("error") == 1
    assert ".png" in said[0]
    assert said[1] == ""
    assert (tmp_path / "run" / "checkpoints" / "step_000002").exists()  # the training up to here is kept
