"""The lower bounds of what vmoe is installed with are those that CI runs."""

import importlib
import re
import tomllib
from pathlib import Path

import pytest
import torch

import vmoe

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TOOLS = {"benchmark", "test", "dev"}  # extras for those who work on vmoe itself


def lower_bounds():
    extras = [needs for extra, needs in PROJECT["optional-dependencies"].items() if extra not in TOOLS]
    return {
        match[1]: match[2]
        for requirement in sum(extras, PROJECT["dependencies"])
        if (match := re.fullmatch(r"([\w-]+)(?:\[\w+\])?(?:>=([\d.]+))?", requirement)) and match[1] != "vmoe"
    }


def padded(version):
    return (*map(int, version.split(".")), 0, 0)[:3]


def test_ci_runs_the_lower_bounds():
    lines = [line for line in (ROOT / ".ci" / "oldest.txt").read_text().splitlines() if not line.startswith("#")]
    tested = dict(line.split("==") for line in lines)
    bounds = lower_bounds()
    assert None not in bounds.values()
    # Gradio's own bound is its newest version, which the first environment has.
    assert {name: padded(bound) for name, bound in bounds.items() if name != "gradio"} == {
        name: padded(version) for name, version in tested.items()
    }


def test_an_older_pytorch_is_named_at_import(monkeypatch):
    assert padded(".".join(map(str, vmoe.MIN_TORCH))) == padded(lower_bounds()["torch"])
    monkeypatch.setattr(torch, "__version__", "2.9.1+cu128")
    with pytest.raises(ImportError, match=r"needs PyTorch 2\.10 or newer and found 2\.9\.1\+cu128: run pip install"):
        importlib.reload(vmoe)
