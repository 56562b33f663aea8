"""Writes any data set as shards, which `vmoe.data.shards` reads, as do WebDataset and open_clip.

`python -m vmoe.data.write_shards --source.type pairs --source.path my.csv --output DIR`
"""

from __future__ import annotations

import io
import json
import sys
import tarfile
from dataclasses import dataclass, field
from pathlib import Path

from vmoe.command import exit_code
from vmoe.config_io import ConfigError, parse_config
from vmoe.data.build import build_dataset
from vmoe.data.config import SourceConfig
from vmoe.data.dataset import ImageDataset
from vmoe.data.shard_index import IMAGE_ENDINGS
from vmoe.whole import whole_file


@dataclass
class WriteConfig:
    """What to write.

    Args:
        output: folder of the shards; it must be empty or not there.
        source: the data set.
        per_shard: samples in a shard.
    """

    output: str
    source: SourceConfig = field(default_factory=SourceConfig)
    per_shard: int = 1000

    def __post_init__(self) -> None:
        if self.per_shard < 1:
            raise ValueError(f"per_shard must be >= 1, got {self.per_shard}")


def write_shards(dataset: ImageDataset, folder: str | Path, per_shard: int = 1000) -> int:
    """Writes 00000.tar, 00001.tar, ... with .jpg (or .png, .webp), .txt and .cls members, in the data set's order.

    Files of pictures are copied as they are if shards may hold them, else saved as PNG. `sizes.json` tells how many
    samples each shard has, `classes.txt` the names of the classes, where there are any.

    Args:
        dataset: its samples.
        folder: made if it is not there.
        per_shard: samples in a shard.

    Returns:
        The number of shards.

    Raises:
        BadSample: at the first sample that cannot be read.
        ValueError: the folder holds something already, or a name of a class has more than one line.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise ValueError(f"output {folder} holds files already; choose an empty folder")
    sizes = {}
    for first in range(0, len(dataset), per_shard):
        indices = range(first, min(first + per_shard, len(dataset)))
        name = f"{len(sizes):05}.tar"
        with whole_file(folder / name) as draft, tarfile.open(draft, "w", format=tarfile.PAX_FORMAT) as tar:
            for index in indices:
                for ending, content in _parts(dataset, index).items():
                    info = tarfile.TarInfo(f"{index:09}.{ending}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
        sizes[name] = len(indices)
    if dataset.classes is not None:
        if any(len(str(name).splitlines()) != 1 for name in dataset.classes):
            raise ValueError("a name of a class has more than one line, or none")
        (folder / "classes.txt").write_text("".join(f"{name}\n" for name in dataset.classes), encoding="utf-8")
    (folder / "sizes.json").write_text(json.dumps(sizes, indent=1) + "\n", encoding="utf-8")
    return len(sizes)


def _parts(dataset: ImageDataset, index: int) -> dict[str, bytes]:
    sample, file = dataset[index], dataset.file_of(index)
    ending = file[1].suffix.lower()[1:] if file is not None else ""
    if ending in IMAGE_ENDINGS:
        parts = {ending: file[1].read_bytes()}
    else:
        png = io.BytesIO()
        sample.image.save(png, "png")
        parts = {"png": png.getvalue()}
    if sample.caption is not None:
        parts["txt"] = sample.caption.encode()
    if sample.label is not None:
        parts["cls"] = str(sample.label).encode()
    return parts


def main() -> int:
    """The command."""
    config = parse_config(WriteConfig, None, "write_shards", "Writes a data set as shards.")

    def run() -> None:
        if config.source.type is None:
            raise ConfigError("source.type is missing: say which data set to write")
        dataset = build_dataset(config.source)
        number = write_shards(dataset, config.output, config.per_shard)
        print(f"{len(dataset)} samples in {number} shards in {config.output}")

    return exit_code("write_shards", run)


if __name__ == "__main__":
    sys.exit(main())
