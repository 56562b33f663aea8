"""Writes any data set as shards, which `vmoe.data.sources.webdataset` reads, as do WebDataset and open_clip."""

from __future__ import annotations

import io
import itertools
import json
import logging
import os
import shutil
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from vmoe.cli.command import exit_code
from vmoe.data.config import SourceConfig
from vmoe.data.images import BadSample, load_image
from vmoe.utils.config import ConfigError, parse_config
from vmoe.utils.printable import printable

if TYPE_CHECKING:
    from vmoe.data.dataset import ImageDataset

logger = logging.getLogger("vmoe.data")

PER_SHARD = 10_000  # as img2dataset; shuffling 100,000 samples then keeps about a dozen shards open


@dataclass
class WriteConfig:
    """What to write.

    Args:
        output: folder of the shards; it must be empty or not there.
        source: the data set.
        per_shard: samples in a shard.
        on_bad: what happens to an unreadable image or an empty caption: "fail" or "skip" (it is counted).
    """

    output: str
    source: SourceConfig = field(default_factory=SourceConfig)
    per_shard: int = PER_SHARD
    on_bad: Literal["fail", "skip"] = "fail"

    def __post_init__(self) -> None:
        if self.per_shard < 1:
            raise ValueError(f"per_shard must be >= 1, got {self.per_shard}")


def write_shards(
    dataset: ImageDataset, folder: str | Path, per_shard: int = PER_SHARD, on_bad: Literal["fail", "skip"] = "fail"
) -> tuple[int, int, int]:
    """Writes 00000.tar, 00001.tar, ... with .jpg (or .png, .webp), .txt and .cls members, in the data set's order.

    Returns (shards, samples in them, bad samples that were skipped). An image's file is copied if shards may hold it
    and the data set takes the whole image; else the data set's image is saved as PNG. `sizes.json` has the number of
    samples of each shard, `classes.txt` the names of the classes. Until all is written, the folder's name ends in
    ".unfinished".

    Raises:
        BadSample: at the first sample that cannot be read or is too long for a shard, unless it is to be skipped.
        ValueError: the folder is not empty, the data set has what shards cannot hold, or all samples are bad.
    """
    for name in ("label_sets", "class_columns", "conditions"):
        if getattr(dataset, name) is not None:
            raise ValueError(f"{type(dataset).__name__} has {name}, which shards cannot hold")
    if dataset.prompt_names is not None:
        logger.warning("shards do not hold the names of the classes for zero-shot prompts, only those that are shown")
    with _atomic_folder(Path(folder)) as draft:
        if dataset.classes is not None:
            _write_classes([str(name) for name in dataset.classes], draft / "classes.txt")
        sizes: dict[str, int] = {}
        samples = _samples(dataset, on_bad)
        for first in samples:
            name = f"{len(sizes):05}.tar"
            sizes[name] = 0
            with tarfile.open(draft / name, "w", format=tarfile.PAX_FORMAT) as tar:
                for index, parts in itertools.chain([first], itertools.islice(samples, per_shard - 1)):
                    for ending, content in parts.items():
                        info = tarfile.TarInfo(f"{index:09}.{ending}")
                        info.size = len(content)
                        tar.addfile(info, io.BytesIO(content))
                    sizes[name] += 1
        if not sizes:
            raise ValueError(f"all {len(dataset)} samples are bad; there is nothing to write")
        (draft / "sizes.json").write_text(json.dumps(sizes, indent=1) + "\n", encoding="utf-8")
    written = sum(sizes.values())
    return len(sizes), written, len(dataset) - written


@contextmanager
def _atomic_folder(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder` that takes its name when the block ends, and is removed if the block raises."""
    target = Path(os.path.realpath(folder))
    if target.exists():
        if not target.is_dir() or any(target.iterdir()):
            raise ValueError(f"output {folder} holds files already; choose an empty folder")
        target.rmdir()  # now: one that cannot be replaced, such as a disk's root, must not fail at the end
    draft = target.with_name(f"{target.name}.unfinished")
    if draft.exists():
        raise ValueError(f"output {draft} is there already, being written or left by a run that was killed; remove it")
    draft.mkdir(parents=True)
    try:
        yield draft
        draft.rename(target)
    except BaseException:
        shutil.rmtree(draft)
        raise


def _write_classes(names: list[str], file: Path) -> None:
    from vmoe.data.sources.folder import read_class_names

    try:
        file.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
        if read_class_names(file) != names:
            raise ValueError("one of them has more than one line")
    except ValueError as error:
        raise ValueError(f"the names of the classes cannot be written ({error})") from None


def _samples(dataset: ImageDataset, on_bad: str) -> Iterator[tuple[int, dict[str, bytes]]]:
    """(index, members by ending) of each sample that is not bad."""
    for index in range(len(dataset)):
        try:
            yield index, _parts(dataset, index)
        except BadSample as error:
            if on_bad == "fail":
                raise
            logger.warning("bad sample skipped: %s: %s", printable(error.path), error.reason)


def _parts(dataset: ImageDataset, index: int) -> dict[str, bytes]:
    from vmoe.data.shards import IMAGE_ENDINGS, MAX_MEMBER_BYTES

    sample, (_, file) = dataset[index], dataset.file_of(index) or ("", Path())
    ending = file.suffix.lower()[1:]
    content = file.read_bytes() if ending in IMAGE_ENDINGS else None
    as_stored = dataset.reading._replace(exif_orientation=False)
    # Some data sets change what they read: ObjectNet cuts off the border.
    stored = None if content is None else load_image(file, content, as_stored)
    if stored is None or (stored.size, stored.tobytes()) != (sample.image.size, sample.image.tobytes()):
        png = io.BytesIO()
        sample.image.save(png, "png")
        ending, content = "png", png.getvalue()
    if len(content) > MAX_MEMBER_BYTES:
        raise BadSample(sample.path, f"{len(content)} bytes, more than the {MAX_MEMBER_BYTES} that a shard may hold")
    parts = {ending: content}
    if sample.caption is not None:
        parts["txt"] = sample.caption.encode()
    if sample.label is not None:
        parts["cls"] = str(sample.label).encode()
    return parts


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code, see `exit_code`."""
    config = parse_config(WriteConfig, argv, "vmoe-write-shards", "Write a data set as shards.")
    return exit_code("vmoe-write-shards", lambda: run(config))


def run(config: WriteConfig) -> None:
    """Writes the shards, and says how many. ConfigError: no data set."""
    if config.source.type is None:
        raise ConfigError("source.type is missing: say which data set to write")
    from vmoe.data.build import build_dataset

    dataset = build_dataset(config.source, "source")
    shards, samples, skipped = write_shards(dataset, config.output, config.per_shard, config.on_bad)
    more = f", {skipped} bad ones skipped" if skipped else ""
    print(f"{samples} samples in {shards} shard{'s' * (shards != 1)} in {config.output}{more}")
