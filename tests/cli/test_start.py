"""`--help`, a wrong argument and a wrong path import neither PyTorch nor timm, which takes seconds."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# What a command names in one sentence: a missing file, or an output that cannot be written.
WRONG_PATHS = {
    "vmoe-search": [
        (["x", "--index", "nope.npz"], "no index at nope.npz"),
        (["x", "--index", "{here}"], "must end with .parquet or .npz"),
        (["x", "--index", "{index}", "--checkpoint", "nope"], "no weights at nope"),
        (["--image", "nope.jpg", "--index", "{index}"], "nope.jpg: no such file"),
    ],
    "vmoe-embed": [
        (["--checkpoint", "{here}", "--images", "{here}", "--output", "x.foo"], "must end with .parquet or .npz"),
        (["--checkpoint", "nope", "--images", "{here}", "--output", "x.npz"], "no weights at nope"),
        (["--checkpoint", "{here}", "--images", "nope.jpg", "--output", "x.npz"], "nope.jpg: no such file or folder"),
    ],
    "vmoe-classify": [
        (["{here}", "--checkpoint", "{here}", "--output", "x.txt"], "output x.txt must end with .csv or .jsonl"),
        (["{here}", "--checkpoint", "local-dir:nope"], "no weights at nope"),
        (["nope.jpg", "--checkpoint", "{here}"], "nope.jpg: no such file or folder"),
    ],
    "vmoe-eval": [
        (["--task=retrieval", "--data.type=emoji", "--checkpoint=nope"], "no weights at nope"),
        (
            ["--task=retrieval", "--data.type=emoji", "--checkpoint={here}", "--output={here}/x"],
            "cannot be written: give another file",
        ),
    ],
    "vmoe-demo": [
        (["--checkpoint", "{here}", "--index", "nope.npz"], "no index at nope.npz"),
        (["--checkpoint", "nope"], "no weights at nope"),
    ],
    "vmoe-inspect": [(["--checkpoint", "nope"], "no weights at nope")],
    "vmoe-export": [
        (["nope", "--output", "x.safetensors"], "no weights at nope"),
        (["{here}", "--output", "x.pt2", "--format", "pth"], "format must be one of"),
    ],
    "vmoe-convert": [(["--from", "nope", "--config", "x", "--to", "x.csv"], "x.csv must end with .safetensors")],
    "vmoe-clip-benchmark": [(["--task=retrieval", "--data.type=emoji", "--checkpoint=nope"], "no weights at nope")],
}
COMMANDS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
# Each runs as its console script does; a process of its own for each would take longer.
SCRIPT = """
import contextlib, importlib, io, json, sys

results = []
for target, *arguments in json.load(sys.stdin):
    module, name = target.split(":")
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            code = getattr(importlib.import_module(module), name)(arguments)
        except SystemExit as stopped:
            code = stopped.code
    heavy = sorted({"torch", "timm", "torchvision", "open_clip", "matplotlib"} & set(sys.modules))
    results.append([code, out.getvalue(), err.getvalue(), heavy])
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """{command: its results for --help, a wrong argument, and its wrong paths}"""
    index = tmp_path_factory.mktemp("start") / "index.npz"
    index.touch()
    calls = []
    for command, target in COMMANDS.items():
        calls += [[command, target, "--help"], [command, target, "--nonsense", "1"]]
        for arguments, _ in WRONG_PATHS.get(command, []):
            calls.append([command, target, *(word.format(here=__file__, index=index) for word in arguments)])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], input=json.dumps([call[1:] for call in calls]), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    by_command = {}
    for (command, *_), result in zip(calls, json.loads(done.stdout), strict=True):
        by_command.setdefault(command, []).append(result)
    return by_command


@pytest.mark.parametrize("command", COMMANDS)
def test_help_and_mistakes_import_no_pytorch(results, command):
    shown, wrong, *_ = results[command]
    assert (shown[0], wrong[0]) == (0, 2)
    assert re.match(rf"usage: {command}\b", shown[1])
    assert len(shown[1].splitlines()) < 60  # a page, not every setting
    assert re.search(rf"^{command}: error: .*(nonsense|required)", wrong[2], re.MULTILINE)
    assert shown[3] == wrong[3] == []


@pytest.mark.parametrize("command", WRONG_PATHS)
def test_wrong_paths_import_no_pytorch(results, command):
    for (code, out, err, heavy), (_, message) in zip(results[command][2:], WRONG_PATHS[command], strict=True):
        assert err.startswith(f"{command}: error: ")
        assert message in err
        assert (code in (1, 2), out, err.count("\n"), heavy) == (True, "", 1, [])


@pytest.mark.slow
def test_the_models_are_registered_once_a_command_needs_them():
    code = "import vmoe_command, vmoe, timm; import vmoe.models.manifest; assert timm.is_model('vmoe_base_patch16_224')"
    subprocess.run([sys.executable, "-c", code], check=True)
