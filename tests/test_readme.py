"""The README's Python examples run as they stand, in a fresh interpreter, as a reader would start it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from vmoe.models.factory import create_model, save_pretrained

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
# Each example has names of its own; starting Python is what takes the time.
SCRIPT = """
import json, sys, torch

for block in json.load(sys.stdin):
    print(block, flush=True)
    names = {"loader": [(torch.randn(2, 3, 48, 48), torch.tensor([1, 7]))]}
    exec(block, names)
    assert "vmoe" in names  # no example lives on another's import
    if "probabilities" in names:
        assert abs(names["probabilities"].sum().item() - 1) < 1e-5, names["probabilities"]
"""


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    Image.new("RGB", (60, 40), "red").save("photo.png")
    save_pretrained(create_model("limoe_tiny_patch12_48"), "runs/limoe_tiny_emoji/model.safetensors")


@pytest.mark.usefixtures("workplace")
def test_examples():
    # The same model at a size that a test can afford.
    blocks = [block.replace('"vmoe_base_patch16_224", ', '"vmoe_tiny_patch8_48", ') for block in BLOCKS]
    assert len(blocks) >= 3
    result = subprocess.run([sys.executable, "-c", SCRIPT], input=json.dumps(blocks), capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
