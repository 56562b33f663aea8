"""The README's Python examples run as they stand, each in an interpreter of its own, as a reader would start it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from vmoe.models.factory import create_model, save_pretrained

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
DATA = """
import torch as _torch
loader = [(_torch.randn(2, 3, 48, 48), _torch.tensor([1, 7]))]
del _torch
"""
CHECK = """
if "probabilities" in globals():
    assert abs(probabilities.sum().item() - 1) < 1e-5, probabilities
"""


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    Image.new("RGB", (60, 40), "red").save("photo.png")
    save_pretrained(
        create_model("limoe_tiny_patch12_48"), "runs/limoe_tiny_emoji/checkpoints/step_000001/model.safetensors"
    )


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.split("\n")[2][:30])
@pytest.mark.usefixtures("workplace")
def test_example(block):
    # The same model at a size that a test can afford.
    block = block.replace('"vmoe_base_patch16_224", ', '"vmoe_tiny_patch8_48", ')
    result = subprocess.run([sys.executable, "-c", DATA + block + CHECK], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
