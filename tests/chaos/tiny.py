"""The run that the chaos script and the survival tests train: a V-MoE of two blocks on generated images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

# Router noise, drop path, augmentation and a moving average: whatever is random or kept over many steps.
CONFIG = {
    "task": "classification",
    "device": "cpu",
    "model": {
        "name": "vmoe_tiny_patch8_48",
        "kwargs": {
            "img_size": 16,
            "patch_size": 8,
            "embed_dim": 32,
            "depth": 2,
            "num_heads": 2,
            "num_experts": 4,
            "noise_std": 1.0,
            "drop_path_rate": 0.1,
        },
    },
    "data": {"loader": {"batch_size": 8, "num_workers": 0}},
    "train": {"log_every": 1, "ema_decay": 0.99, "tensorboard": False},
    "optim": {"warmup_steps": 2},
    "evaluate": {"examples": 0, "batch_size": 8},
}


def make_images(folder: Path, per_class: int = 9) -> Path:
    """A folder with one folder per colour of noisy squares."""
    random = np.random.default_rng(0)
    for name, colour in {"blue": (30, 40, 220), "green": (40, 200, 60), "red": (220, 30, 40)}.items():
        (folder / name).mkdir(parents=True)
        for index in range(per_class):
            pixels = np.clip(random.normal(colour, 40, (16, 16, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index}.png")
    return folder


def write_config(file: Path, images: Path) -> Path:
    """The configuration as a file."""
    source: dict[str, Any] = {"type": "image_folder", "path": str(images)}
    file.write_text(yaml.safe_dump(CONFIG | {"data": {**CONFIG["data"], "train": source, "val": dict(source)}}))
    return file


def arguments(config: Path, run: Path, **settings: Any) -> list[str]:
    """train.py's arguments; `__` in the name of a setting stands for a point."""
    pairs = {"output_dir": run, **{name.replace("__", "."): value for name, value in settings.items()}}
    return ["--config", str(config), *(part for name, value in pairs.items() for part in (f"--{name}", str(value)))]
