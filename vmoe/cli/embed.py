"""Embeds images for `vmoe-search`: `vmoe-embed --images FOLDER --checkpoint RUN --output photos.parquet`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from vmoe.cli.command import exit_code
from vmoe.data.config import LoaderConfig, SourceConfig
from vmoe.data.images import Reading, find_images
from vmoe.utils.config import ConfigError, check_types, parse_config
from vmoe.utils.paths import check_checkpoint, check_new_index
from vmoe.utils.tables import make_console


@dataclass
class EmbedConfig:
    """What to embed.

    Attributes:
        checkpoint: The model: folder of a run (its last checkpoint) or of a checkpoint, or a .safetensors file.
        output: File to write, .parquet or .npz: embeddings in float16, paths, and captions and labels if there are any.
        images: An image, or a folder: all images in and below it; or a list of these. Instead of data.
        data: The images as a data set, such as shards.
        loader: Batches and worker processes; on_bad "skip" skips and reports unreadable images.
        precision: Arithmetic of the forward pass: float32, or autocast to bf16 or fp16.
        device: "auto" (CUDA, then MPS, then CPU) or a torch device such as "cuda:1".
    """

    checkpoint: str
    output: str
    images: list[str] | str | None = None
    data: SourceConfig = field(default_factory=SourceConfig)
    loader: LoaderConfig = field(default_factory=lambda: LoaderConfig(on_bad="skip"))
    precision: Literal["float32", "bf16", "fp16"] = "float32"
    device: str = "auto"

    def __post_init__(self) -> None:
        check_types(self)
        if (self.images is None) == (self.data.type is None):
            raise ConfigError("give either images, as in --images FOLDER, or data with its data.type")
        self.loader.check_evaluation(one_size=True)
        self.loader = replace(self.loader, on_bad=self.loader.on_bad or "skip")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code, see `exit_code`. After a stop the same command continues."""
    description = "Embed images, for vmoe-search; the same command again continues a stopped one."
    config = parse_config(EmbedConfig, argv, prog="vmoe-embed", description=description)
    return exit_code("vmoe-embed", lambda: run(config))


def run(config: EmbedConfig) -> None:
    """Writes the file, and says how many images are in it."""
    check_new_index(config.output)
    check_checkpoint(config.checkpoint)
    paths = [config.images] if isinstance(config.images, str) else config.images
    files = [] if paths is None else find_images(paths)
    from vmoe.data import build_dataset, with_orientation
    from vmoe.data.dataset import ImageFiles
    from vmoe.evaluation.embeddings import embed_images
    from vmoe.evaluation.loaded_model import load_model
    from vmoe.utils.world import world

    if world()[1] > 1:
        raise ConfigError("vmoe-embed runs in one process: start it without torchrun, once for each part of the data")
    console = make_console()
    loaded = load_model(config.checkpoint, config.device, config.precision)
    if config.images is None:
        source = with_orientation(config.data) if loaded.exif_orientation else config.data
        dataset = build_dataset(source, "data")
    else:
        dataset = ImageFiles(".", [str(file) for file in files])
        dataset.reading = Reading(loaded.exif_orientation)
    found = embed_images(loaded, dataset, config.output, config.loader, console)
    rows, width = found.embeddings_ND.shape
    skipped = len(found.about["skipped"])
    more = f", {skipped} bad ones skipped" if skipped else ""
    print(f"{rows} images with {width} features each in {config.output}{more}")
