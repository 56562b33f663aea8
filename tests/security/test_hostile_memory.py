"""What would fill the memory, in a process that has little of it."""

import multiprocessing

import vmoe
from vmoe.convert.sharded import open_sharded
from vmoe.data.images import load_image
from vmoe.training.config import Config
from vmoe.utils.config import read_config

from .bounds import limited_memory
from .hostile import with_settings
from .test_hostile_data import IMAGES
from .test_hostile_settings import LAUGHS
from .test_hostile_weights import PACKED


def read_all(folder):
    """Reads each file; the kind of its error and the number of its lines are written to said.txt."""
    with limited_memory(400), open(folder / "said.txt", "w") as said:
        for name, read in (
            ("laughs.yaml", lambda file: read_config(Config, ["--config", str(file)])),
            ("checkpoint.index", lambda file: open_sharded(file.with_suffix(""))),
            ("image.png", load_image),
            ("comment.png", load_image),
            ("model.safetensors", lambda file: vmoe.create_model(pretrained=file)),
        ):
            try:
                read(folder / name)
            except Exception as error:
                print(name, type(error).__name__, len(str(error).splitlines()), file=said)


def test_all_that_would_fill_the_memory_in_a_process_with_little_of_it(good_file, tmp_path):
    (tmp_path / "laughs.yaml").write_text(LAUGHS)
    (tmp_path / "checkpoint.index").write_bytes(PACKED["long names"])
    (tmp_path / "image.png").write_bytes(IMAGES["100,000 x 100,000"][0])
    (tmp_path / "comment.png").write_bytes(IMAGES["a comment of 70 MB"][0])
    with_settings(
        good_file, tmp_path / "model.safetensors", lambda settings: settings["kwargs"].update(embed_dim=2**20)
    )
    process = multiprocessing.get_context("fork").Process(target=read_all, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert (tmp_path / "said.txt").read_text().splitlines() == [
        "laughs.yaml ConfigError 1",
        "checkpoint.index CheckpointError 1",
        "image.png BadSample 1",
        "comment.png BadSample 1",
        "model.safetensors WeightsError 1",
    ]
