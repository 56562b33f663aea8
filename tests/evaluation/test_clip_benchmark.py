"""Our metrics against the metrics code of LAION's CLIP_benchmark (pip install clip-benchmark), on the same data."""

import json
import shutil
import sys
import tarfile

import pytest
import torch
from rich.console import Console

import vmoe
from vmoe.cli import clip_benchmark as command
from vmoe.data import LoaderConfig, SourceConfig, build_dataset
from vmoe.evaluation import clip_benchmark as benchmark
from vmoe.evaluation.config import EvaluationConfig
from vmoe.models.factory import save_pretrained

pytest.importorskip("clip_benchmark", reason="needs CLIP_benchmark (pip install -e '.[benchmark]')")

TOLERANCE = 1e-6
NUM_IMAGES = 60
TEMPLATES = ["{}", "an image of {}.", "{} in {{braces}}"]


@pytest.fixture(scope="module", params=["limoe", "two_tower"])
def checkpoint(request, tmp_path_factory):
    """A random model that tells images and texts apart."""
    torch.manual_seed(0)
    if request.param == "limoe":
        model = vmoe.create_model("limoe_tiny_patch12_48", depth=2, width=32, num_heads=2, embed_dim=16)
    else:
        image, text = {"depth": 2, "embed_dim": 32, "num_heads": 2}, {"depth": 2, "width": 32, "num_heads": 2}
        model = vmoe.create_model("two_tower_tiny_patch12_48", image=image, text=text, embed_dim=16)
    file = tmp_path_factory.mktemp(request.param) / "model.safetensors"
    save_pretrained(model, file)
    return str(file)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Held-out emoji: in folders of classes, and as a file of pairs, every third with two captions."""
    folder = tmp_path_factory.mktemp("images")
    dataset = build_dataset(SourceConfig("emoji", split="held_out"))
    lines = ["image\tcaption"]
    for index in range(NUM_IMAGES):
        file = folder / "classes" / f"kind {index // 6}" / f"{index}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        sample = dataset[index]
        sample.image.save(file)
        lines.append(f"{file}\t{sample.caption}")
        if index % 3 == 0:
            lines.append(f"{file}\ta drawing of {sample.caption}")
    (folder / "pairs.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def _compare(**settings):
    config = EvaluationConfig(**settings, device="cpu", loader=LoaderConfig(batch_size=7, num_workers=0))
    rows = benchmark.compare(config, Console(quiet=True))
    for name, ours, theirs in rows:
        assert ours == pytest.approx(theirs, abs=TOLERANCE), name
    return {name: ours for name, ours, _ in rows}


@pytest.mark.parametrize("templates", [None, TEMPLATES], ids=["bare names", "templates"])
def test_zero_shot_equals_clip_benchmark(checkpoint, images, templates):
    data = SourceConfig(type="image_folder", path=str(images / "classes"))
    metrics = _compare(checkpoint=checkpoint, task="zero_shot", data=data, templates=templates)
    assert set(metrics) == {"top1", "top5", "mean_per_class"}
    assert 0 < metrics["top5"] < 1


def test_retrieval_with_several_captions_equals_clip_benchmark(checkpoint, images):
    data = SourceConfig(type="pairs", path=str(images / "pairs.tsv"))
    metrics = _compare(checkpoint=checkpoint, task="retrieval", data=data)
    assert len(metrics) == 6
    assert 0 < metrics["text_to_image_recall@10"] < 1
    assert 0 < metrics["image_to_text_recall@10"] < 1


@pytest.fixture
def two_classes(tmp_path, images):
    for name in ("kind 0", "kind 1"):
        shutil.copytree(images / "classes" / name, tmp_path / "two" / name)
    return tmp_path / "two"


def _run(checkpoint, path, *more):
    arguments = ["--config", "zero_shot_folder", "--checkpoint", str(checkpoint), "--data.path", str(path)]
    return command.main([*arguments, "--device", "cpu", "--loader.num_workers", "0", *more])


@pytest.mark.parametrize("checkpoint", ["limoe"], indirect=True)
def test_with_two_classes_there_is_no_top5(checkpoint, two_classes, capsys):
    data = SourceConfig(type="image_folder", path=str(two_classes))
    metrics = _compare(checkpoint=checkpoint, task="zero_shot", data=data)
    assert set(metrics) == {"top1", "mean_per_class"}
    assert _run(checkpoint, two_classes) == 0
    assert "top5 is left out: CLIP_benchmark has none for 2 classes" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(("theirs", "code"), [(0.5 + 5e-7, 0), (0.5 + 2e-6, 3), (float("nan"), 3), (None, 3)], ids=str)
def test_the_exit_code_says_whether_metrics_agree(monkeypatch, theirs, code):
    rows = [] if theirs is None else [("top1", 0.25, 0.25), ("top5", 0.5, theirs)]
    monkeypatch.setattr(benchmark, "compare", lambda *_: rows)
    assert _run(__file__, "none") == code


@pytest.mark.parametrize("checkpoint", ["limoe"], indirect=True)
def test_what_cannot_be_compared_is_refused(checkpoint, images, monkeypatch, capsys):
    folder = images / "classes"
    assert _run(checkpoint, folder, "--loader.on_bad", "skip") == 2
    assert "loader.on_bad 'skip' cannot be compared" in capsys.readouterr().err
    assert _run(checkpoint, folder, "--task", "retrieval", "--templates", "null") == 2
    assert "needs captions" in capsys.readouterr().err
    for name, what in (("label_sets", "several right labels"), ("conditions", "several conditions")):
        dataset = build_dataset(SourceConfig(type="image_folder", path=str(folder)))
        setattr(dataset, name, [(0,)] * NUM_IMAGES)
        monkeypatch.setattr(benchmark, "build_dataset", lambda *_, dataset=dataset: dataset)
        assert _run(checkpoint, folder) == 2
        assert f"data of type 'image_folder' has {what}" in capsys.readouterr().err


@pytest.mark.parametrize("checkpoint", ["limoe"], indirect=True)
def test_the_data_sets_crop_is_kept(checkpoint, images, monkeypatch):
    data, loader = SourceConfig(type="image_folder", path=str(images / "classes")), LoaderConfig(num_workers=0)
    config = EvaluationConfig(checkpoint=checkpoint, task="zero_shot", data=data, device="cpu", loader=loader)
    plain = benchmark.compare(config, Console(quiet=True))
    dataset = build_dataset(config.data)
    dataset.crop_pct = 0.3
    monkeypatch.setattr(benchmark, "build_dataset", lambda *_: dataset)
    cropped = benchmark.compare(config, Console(quiet=True))
    assert cropped != plain
    assert benchmark.agree(cropped)


@pytest.mark.parametrize("checkpoint", ["limoe"], indirect=True)
def test_errors_are_one_sentence(checkpoint, two_classes, monkeypatch, capsys):
    torn = next((two_classes / "kind 1").iterdir())
    torn.write_bytes(torn.read_bytes()[:100])
    assert _run(checkpoint, two_classes) == 1
    error = capsys.readouterr().err
    assert torn.name in error
    assert "Traceback" not in error
    assert _run(two_classes / "none", two_classes) == 1
    assert "Traceback" not in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "clip_benchmark", None)
    monkeypatch.setitem(sys.modules, "clip_benchmark.metrics", None)
    for arguments in (["cli", "eval"], None):
        code = command.main(arguments) if arguments else _run(checkpoint, two_classes)
        assert code == 1
        assert "pip install -e '.[benchmark]'" in capsys.readouterr().err


@pytest.mark.parametrize("checkpoint", ["limoe"], indirect=True)
def test_clip_benchmarks_own_command_knows_our_checkpoints(checkpoint, images, tmp_path):
    pytest.importorskip("requests", reason="CLIP_benchmark's command needs requests (pip install -e '.[benchmark]')")
    data = SourceConfig(type="image_folder", path=str(images / "classes"))
    ours = _compare(checkpoint=checkpoint, task="zero_shot", data=data)
    folders = sorted((images / "classes").iterdir())
    (tmp_path / "test").mkdir()
    with tarfile.open(tmp_path / "test" / "0.tar", "w") as tar:
        for label, folder in enumerate(folders):
            for file in sorted(folder.iterdir()):
                (tmp_path / "label").write_text(str(label))
                tar.add(file, f"{file.stem}.png")
                tar.add(tmp_path / "label", f"{file.stem}.cls")
    (tmp_path / "test" / "nshards.txt").write_text("1")
    (tmp_path / "classnames.txt").write_text("\n".join(folder.name for folder in folders))
    (tmp_path / "zeroshot_classification_templates.txt").write_text("{c}")
    result = tmp_path / "result.json"
    arguments = ["--dataset", "wds/ours", "--dataset_root", str(tmp_path), "--task", "zeroshot_classification"]
    options = ["--no_amp", "--num_workers", "0", "--batch_size", "7", "--quiet", "--output", str(result)]
    model = ["--model_type", "vmoe", "--model", "vmoe", "--pretrained", checkpoint]
    assert benchmark.their_command(["eval", *arguments, *options, *model]) == 0
    theirs = json.loads(result.read_text())["metrics"]
    assert theirs["acc1"] == pytest.approx(ours["top1"], abs=TOLERANCE)
    assert theirs["acc5"] == pytest.approx(ours["top5"], abs=TOLERANCE)
    assert theirs["mean_per_class_recall"] == pytest.approx(ours["mean_per_class"], abs=TOLERANCE)
