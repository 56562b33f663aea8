"""What would fill the memory, in a process that has little of it."""

from __future__ import annotations

from .hostile import with_settings
from .test_hostile_data import IMAGES
from .test_hostile_settings import LAUGHS
from .test_hostile_weights import PACKED

IN_LITTLE_MEMORY = """
import json, resource, sys
from pathlib import Path
import vmoe
from vmoe.utils.config import parse_config, read_config
from vmoe.convert.sharded import open_flax
from vmoe.data.images import load_image
from vmoe.training.config import Config

folder = Path(sys.argv[1])
pages = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (pages + 400 * 2**20,) * 2)
for name, read in (
    ("laughs.yaml", lambda file: read_config(Config, ["--config", str(file)])),
    ("checkpoint", open_flax),
    ("image.png", load_image),
    ("comment.png", load_image),
    ("model.safetensors", lambda file: vmoe.create_model(pretrained=file)),
):
    try:
        read(folder / name)
    except Exception as error:
        print(name, type(error).__name__, len(str(error).splitlines()))
"""


def test_all_that_would_fill_the_memory_in_a_process_with_little_of_it(forks, good_file, tmp_path):
    (tmp_path / "laughs.yaml").write_text(LAUGHS)
    (tmp_path / "checkpoint").write_bytes(PACKED["long names"])
    (tmp_path / "image.png").write_bytes(IMAGES["100,000 x 100,000"][0])
    (tmp_path / "comment.png").write_bytes(IMAGES["a comment of 100 MB"][0])
    with_settings(
        good_file, tmp_path / "model.safetensors", lambda settings: settings["kwargs"].update(embed_dim=2**20)
    )
    (tmp_path / "script.py").write_text(IN_LITTLE_MEMORY)
    said = forks.run(tmp_path / "script.py", [str(tmp_path)], tmp_path / "output.txt")
    assert said.split("\n")[:-1] == [
        "laughs.yaml ConfigError 1",
        "checkpoint CheckpointError 1",
        "image.png BadSample 1",
        "comment.png BadSample 1",
        "model.safetensors WeightsError 1",
    ]
