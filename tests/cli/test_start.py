"""`--help` and a wrong argument import neither PyTorch nor timm, which takes seconds."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMANDS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
# Each runs as its console script does; a process of its own for each would take longer.
SCRIPT = """
import contextlib, importlib, io, json, sys

results = []
for target in json.load(sys.stdin):
    module, name = target.split(":")
    for arguments in (["--help"], ["--nonsense", "1"]):
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
            try:
                code = getattr(importlib.import_module(module), name)(arguments)
            except SystemExit as stopped:
                code = stopped.code
        heavy = sorted({"torch", "timm", "torchvision", "open_clip", "matplotlib"} & set(sys.modules))
        results.append([target, code, out.getvalue(), err.getvalue(), heavy])
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def results():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], input=json.dumps(list(COMMANDS.values())), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    by_target = {}
    for target, *result in json.loads(done.stdout):
        by_target.setdefault(target, []).append(result)
    return by_target


@pytest.mark.parametrize("command", COMMANDS)
def test_help_and_mistakes_import_no_pytorch(results, command):
    shown, wrong = results[COMMANDS[command]]
    assert (shown[0], wrong[0]) == (0, 2)
    assert re.match(rf"usage: {command}\b", shown[1])
    assert len(shown[1].splitlines()) < 60  # a page, not every setting
    assert re.search(rf"^{command}: error: .*(nonsense|required)", wrong[2], re.MULTILINE)
    assert shown[3] == wrong[3] == []


@pytest.mark.slow
def test_the_models_are_registered_once_a_command_needs_them():
    code = "import vmoe_command, vmoe, timm; import vmoe.models.manifest; assert timm.is_model('vmoe_base_patch16_224')"
    subprocess.run([sys.executable, "-c", code], check=True)
