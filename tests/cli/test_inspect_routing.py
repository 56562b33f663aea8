"""The command as a user runs it."""

import io
import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

import vmoe
from vmoe.cli import inspect_routing as command
from vmoe.cli.inspect_routing import describe, main, summary_table, validation_data
from vmoe.data import BadSample
from vmoe.data.config import SourceConfig
from vmoe.inspection import routing_statistics, style
from vmoe.models.factory import save_pretrained
from vmoe.models.manifest import describe_files, write_manifest
from vmoe.utils.config import ConfigError

LIMOE = {"img_size": 16, "patch_size": 8, "width": 32, "depth": 2, "num_heads": 2, "embed_dim": 16, "num_experts": 4}
QUICK = ["--loader.num_workers", "0", "--num_images", "3", "--num_patches", "2"]


def folder_arguments(folder):
    return ["--data.type", "image_folder", "--data.path", str(folder)]


@pytest.fixture(autouse=True)
def coarse_figures(monkeypatch):
    """They are looked at in test_plots.py; here they only take time."""
    monkeypatch.setattr(style, "DPI", 50)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two class folders of three images, and a file of pairs of the same images."""
    root = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    lines = ["image,caption"]
    for name in ("cat", "dog"):
        (root / "folder" / name).mkdir(parents=True)
        for i in range(3):
            Image.fromarray(generator.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(
                root / "folder" / name / f"{i}.png"
            )
            lines.append(f"folder/{name}/{i}.png,a {name} number {i}")
    (root / "pairs.csv").write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture(scope="module")
def run(tmp_path_factory, data):
    """The folder of a run with one checkpoint, which validated on the pairs."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("run")
    model = vmoe.create_model("limoe_tiny_patch8_48", context_length=8, **LIMOE)
    checkpoint = folder / "checkpoints/step_000002"
    save_pretrained(model, checkpoint / "model.safetensors")
    write_manifest(checkpoint, {}, describe_files(checkpoint, ["model.safetensors"]))
    config = {"data": {"val": {"type": "pairs", "path": str(data / "pairs.csv")}}}
    (folder / "config.yaml").write_text(json.dumps(config))
    return folder


def test_all_that_it_writes(run, data, capsys):
    out = run / "looked at"
    arguments = ["--checkpoint", str(run), "--output_dir", str(out), "--eval_capacity_factor", "1", *QUICK]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {"statistics.json", "statistics.npz", "figures", "report.html"}
    for name in ("statistics.json", "statistics.npz", "report.html", "figures"):
        assert str(out / name) in printed
    found = json.loads((out / "statistics.json").read_text())
    assert found["data"]["name"] == f"pairs · {data / 'pairs.csv'}"
    assert found["data"]["num_samples"] == 6
    assert len(found["data"]["fingerprint"]) == len(found["sha256"]) == 64
    assert found["config"]["eval_capacity_factor"] == 1
    assert found["config"]["data"]["type"] == "pairs"  # what the run validated on
    assert found["versions"]["torch"] == torch.__version__
    [first] = found["layers"]
    assert first["name"] == "blocks.1.mlp"
    assert first["eval_capacity_factor"] == 1
    assert first["name"] in printed
    assert f"{first['modalities']['text']['share_dropped']:.1%}" in printed
    assert found["agreement"]["image"][0][0] == pytest.approx(1)
    words = [word["name"] for expert in first["experts"] for word in expert["text_tokens"]]
    assert set(words) & {"cat", "dog"}
    arrays = np.load(out / "statistics.npz")
    assert set(arrays["blocks.1.mlp/text_tokens"]) >= {"cat", "dog", "number"}
    assert arrays["blocks.1.mlp/expert_token"].sum() == sum(first["modalities"]["text"]["kept"])


def test_labelled_images_of_a_folder(run, data, tmp_path):
    options = [*folder_arguments(data / "folder"), f"--output_dir={tmp_path}", *QUICK, "--num_patches", "0"]
    assert main(["--checkpoint", str(run), *options]) == 0
    assert not list((tmp_path / "figures").glob("patches_*"))  # none is asked for
    assert (tmp_path / "report.html").exists()
    found = json.loads((tmp_path / "statistics.json").read_text())
    assert found["data"]["texts_from"] == "class names"
    arrays = np.load(tmp_path / "statistics.npz")
    assert arrays["class_names"].tolist() == ["cat", "dog"]
    assert arrays["blocks.1.mlp/expert_class"].shape == (4, 2)
    assert arrays["blocks.1.mlp/expert_class"].sum() == 6 * 4
    classes = [entry["name"] for expert in found["layers"][0]["experts"] for entry in expert["classes"]]
    assert set(classes) <= {"cat", "dog"}


def test_the_data_of_a_run_are_found_from_any_of_its_folders(run, tmp_path):
    step = run / "checkpoints/step_000002"
    for source in (run, step, step / "model.safetensors"):
        assert validation_data(str(source)).type == "pairs"
    with pytest.raises(ConfigError, match="data.type is missing"):
        validation_data(str(tmp_path))
    (tmp_path / "config.yaml").write_text("data: {val: {type: null}}")
    with pytest.raises(ConfigError, match="data.type is missing"):
        validation_data(str(tmp_path))
    (tmp_path / "config.yaml").write_text("data: {val: {type: emoji, colour: red}}")
    with pytest.raises(ConfigError, match=r"data.val cannot be read .*colour"):
        validation_data(str(tmp_path))
    assert describe(SourceConfig("emoji", split="all")) == "emoji · all"


def error(capsys, *arguments):
    """(exit code, the message)"""
    try:
        code = main([*arguments, *QUICK])
    except SystemExit as exit:
        code = exit.code
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    return code, lines[0]


def test_mistakes_are_one_sentence_with_an_exit_code(run, data, tmp_path, capsys):
    dense = vmoe.create_model("limoe_tiny_patch8_48", context_length=8, **{**LIMOE, "num_experts": 0})
    save_pretrained(dense, tmp_path / "dense.safetensors")
    code, message = error(
        capsys, "--checkpoint", str(tmp_path / "dense.safetensors"), *folder_arguments(data / "folder")
    )
    assert code == 2
    assert "dense.safetensors holds a dense model, which has no experts to look at" in message
    code, message = error(capsys, "--checkpoint", str(run), "--eval_capacity_factor", "0")
    assert (code, "eval_capacity_factor must be > 0, got 0" in message) == (2, True)
    code, message = error(capsys, "--checkpoint", str(run), "--loader.on_bad", "replace")
    assert (code, "loader.on_bad must be 'fail' or 'skip' here" in message) == (2, True)
    code, message = error(capsys, "--checkpoint", str(run), "--loader.naflex.seq_lens", "[16]")
    assert (code, "loader.naflex is for train.py and eval.py" in message) == (2, True)
    code, message = error(capsys, "--checkpoint", str(run), "--num_image", "3")
    assert (code, "the nearest known key is 'num_images'" in message) == (2, True)
    code, message = error(capsys, "--checkpoint", str(tmp_path / "missing"), "--data.type", "emoji")
    assert code == 1
    assert "missing" in message
    broken = tmp_path / "photos" / "a"
    broken.mkdir(parents=True)
    (broken / "1.jpg").write_bytes(b"no image")
    code, message = error(capsys, "--checkpoint", str(run), *folder_arguments(tmp_path / "photos"))
    assert code == 1
    assert "1.jpg" in message


def test_fields_of_the_data_without_a_type_change_those_of_the_run(run, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(run / "checkpoints", folder / "checkpoints")
    (folder / "config.yaml").write_text("data: {val: {type: emoji_groups, split: val, image_size: 16}}")
    given = []

    def stop(source, _setting):
        given.append(source)
        raise BadSample("x", "is not read here")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vmoe.data.build.build_dataset", stop)
        for extra in ([], ["--data.split", "train"], ["--data.image_size=24"], ["--data.type", "emoji"]):
            assert main(["--checkpoint", str(folder), *extra, *QUICK]) == 1
    assert given == [
        SourceConfig("emoji_groups", split="val", image_size=16),
        SourceConfig("emoji_groups", split="train", image_size=16),
        SourceConfig("emoji_groups", split="val", image_size=24),
        SourceConfig("emoji"),
    ]
    capsys.readouterr()
    code, message = error(capsys, "--checkpoint", str(folder), "--data.split", "held_out")
    assert (code, "split of data source 'emoji_groups' must be one of train, val" in message) == (2, True)
    with pytest.raises(ConfigError, match=r"set data.type"):
        command.run(command.InspectConfig(str(folder), data=SourceConfig(split="val")))


def test_what_cannot_work_is_an_error_before_the_data_are_read(run, data, tmp_path, capsys, monkeypatch):
    def read(*_, **__):
        raise AssertionError("the data were read")

    monkeypatch.setattr(routing_statistics, "gather_statistics", read)
    pairs, folders = ["--checkpoint", str(run)], ["--checkpoint", str(run), *folder_arguments(data / "folder")]
    (tmp_path / "file").touch()
    classifier = vmoe.create_model("vmoe_tiny_patch8_48", img_size=16, embed_dim=16, depth=2, num_heads=2)
    save_pretrained(classifier, tmp_path / "classifier.safetensors")
    of_classifier = ["--checkpoint", str(tmp_path / "classifier.safetensors"), *folder_arguments(data / "folder")]
    wrong = [
        (
            folders,
            ["--output_dir", str(tmp_path / "file" / "x")],
            r"output_dir .*file/x cannot be written to: choose",
        ),
        (folders, ["--templates", "a photo"], "templates 'a photo': no such file"),
        (pairs, ["--templates", "a {}"], "templates are for image-text models and data with class names"),
        (of_classifier, ["--templates", "a {}"], "templates are for image-text models and data"),
    ]
    for start, arguments, match in wrong:
        code, message = error(capsys, *start, *arguments)
        assert code == 2, message
        assert re.search(match, message), message


def test_the_table_counts_what_experts_took(example_statistics):
    statistics = example_statistics(num_layers=1, num_experts=4, text=False)
    layer = statistics.layers[0]
    layer.asked["image"], layer.kept["image"] = np.array([10, 10, 10, 10]), np.array([0, 9, 3, 0])
    console = Console(file=io.StringIO(), width=200)
    console.print(summary_table(statistics))
    assert "3.00" in console.file.getvalue()
    assert "2 of 4" in console.file.getvalue()
