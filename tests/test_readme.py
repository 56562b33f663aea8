"""The README's Python examples run as they stand."""

import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from vmoe.models.factory import create_model, save_pretrained

BLOCKS = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[1] / "README.md").read_text(), re.DOTALL)


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (60, 40), "red").save("photo.png")
    save_pretrained(
        create_model("limoe_tiny_patch12_48"), "runs/limoe_tiny_emoji/checkpoints/step_000001/model.safetensors"
    )


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.split("\n")[2][:30])
@pytest.mark.usefixtures("workplace")
def test_example(block):
    names = {"loader": [(torch.randn(2, 3, 48, 48), torch.tensor([1, 7]))]}
    # The same model at a size that a test can afford.
    block = block.replace('"vmoe_base_patch16_224", ', '"vmoe_tiny_patch8_48", ')
    exec(block, names)  # our own README
    if "probabilities" in names:
        torch.testing.assert_close(names["probabilities"].sum(-1), torch.ones(1))
