"""A tiny world: coloured squares in class folders, the same as captioned pairs, and configs that train on them."""

import copy

import pytest

from tests.chaos.tiny import make_images
from vmoe.training import trainer
from vmoe.training.config import Config
from vmoe.utils.config import read_config

TINY_VIT = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_experts": 4}
TINY_LIMOE = {
    "img_size": 16,
    "patch_size": 8,
    "width": 32,
    "depth": 2,
    "num_heads": 2,
    "embed_dim": 16,
    "num_experts": 4,
    "context_length": 8,
}


@pytest.fixture(scope="session")
def images_dir(tmp_path_factory):
    """Folder with one folder per colour, 8 noisy squares each, and pairs.csv that captions them."""
    root = tmp_path_factory.mktemp("images")
    files = sorted(make_images(root / "folders", per_class=8).glob("*/*.png"))
    lines = [f"folders/{f.parent.name}/{f.name},a {f.parent.name} square number {f.stem}" for f in files]
    (root / "pairs.csv").write_text("\n".join(["image,caption", *lines]) + "\n")
    return root


@pytest.fixture(autouse=True)
def _no_curves(request, monkeypatch):
    """Only a test of curves draws them: that takes longer than a run of a few steps."""
    if "curves" not in request.node.name:
        monkeypatch.setattr(trainer, "draw_curves", lambda *_: None)


@pytest.fixture
def make_config(images_dir, tmp_path):
    """make_config(task, **{"train.steps": 3}) -> Config of a run in tmp_path/run."""

    def make(task: str = "classification", **overrides) -> Config:
        if task == "classification":
            source = {"type": "image_folder", "path": str(images_dir / "folders")}
            model = {"name": "vmoe_tiny_patch8_48", "kwargs": copy.deepcopy(TINY_VIT)}
        else:
            source = {"type": "pairs", "path": str(images_dir / "pairs.csv")}
            model = {"name": "limoe_tiny_patch8_48", "kwargs": copy.deepcopy(TINY_LIMOE)}
        settings = {
            "output_dir": str(tmp_path / "run"),
            "task": task,
            "device": "cpu",
            "model.name": model["name"],
            **{f"model.kwargs.{key}": value for key, value in model["kwargs"].items()},
            **{f"data.train.{key}": value for key, value in source.items()},
            **{f"data.val.{key}": value for key, value in source.items()},
            "data.loader.batch_size": 8,
            "data.loader.num_workers": 0,
            "train.steps": 6,
            "train.log_every": 1,
            "train.tensorboard": False,
            "evaluate.examples": 0,
            **overrides,
        }
        return read_config(Config, [f"--{key}={'null' if value is None else value}" for key, value in settings.items()])

    return make
