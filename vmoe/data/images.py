"""Reads any image file as 8-bit RGB; an error gives the reason in one sentence."""

import io
import logging
import math
import os
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageOps, JpegImagePlugin, PngImagePlugin

from vmoe.utils.printable import printable

logger = logging.getLogger("vmoe.data")

MAX_ASPECT_RATIO = 100  # evaluation scales the short side up, for which a longer strip would need gigabytes
# Pillow's own limit of 89 million pixels, at which it warns of a decompression bomb (an error only at twice that).
MAX_PIXELS = 1024 * 1024 * 1024 // 4 // 3
# Of the text in a PNG file, which is not used; Pillow's 1 MiB for a compressed one is less than some programs write.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY

# What Pillow may take a file for. It reads more, some by calling other programs (Ghostscript), some by rare decoders.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "PPM", "TIFF")

HEIC_REMEDY = "install pillow-heif (pip install -e '.[heic]' in a checkout)"
# What follows "ftyp" in files of formats that phones write. pillow-heif reads HEIC and HEIF, if it is installed.
OTHER_FORMATS = {b"heic": "HEIC", b"heix": "HEIC", b"hevc": "HEIC", b"mif1": "HEIF", b"msf1": "HEIF", b"avif": "AVIF"}

PHONE_SUFFIXES = (".heic", ".heif", ".avif")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".ppm", ".pgm", ".tif", ".tiff")


class DataError(ValueError):
    """Data that cannot be read on at all; the message is one sentence that names the file and the remedy."""


@contextmanager
def file_errors(where: str | Path, remedy: str = "", kind: type[ValueError] = DataError) -> Iterator[None]:
    """Turns the errors of reading a file into one of a `kind` that starts with `where` and ends in `remedy`."""
    try:
        yield
    except kind:
        raise
    except OSError as error:
        raise kind(f"{where}: cannot be read ({error.strerror or error}){remedy}") from None
    except UnicodeDecodeError as error:
        raise kind(f"{where}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
    except ValueError as error:
        raise kind(f"{where}: {error}{remedy}") from None


class BadSample(Exception):
    """A sample that cannot be used: its file (or another name) and a few words on what is wrong with it."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)  # both: so that it can be pickled
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class Reading(NamedTuple):
    """How image files are read."""

    exif_orientation: bool = False  # whether an image is turned as its EXIF data say (TIFF files are, by Pillow)
    # Width x height of the largest image. A JPEG file of up to 4 times as many is read at half its size, unless it is
    # progressive, which takes the memory of its full size.
    max_pixels: int = MAX_PIXELS


DEFAULT = Reading()


def load_image(path: str | Path, content: bytes | None = None, reading: Reading = DEFAULT) -> Image.Image:
    """Reads an image: the first frame, transparency laid on white, 8 bits, RGB.

    Where its bytes are given as `content`, `path` is a name for messages. BadSample: the file is missing, truncated, no
    image of FORMATS, has too many pixels, or is a strip with sides beyond 1 : MAX_ASPECT_RATIO.
    """
    try:
        if content is None and not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would never end
            raise BadSample(str(path), "not a regular file")
        with open(path, "rb") if content is None else io.BytesIO(content) as file:
            return _read(file, path, reading)
    except FileNotFoundError:
        raise BadSample(str(path), "no such file") from None
    except BadSample:
        raise
    except Exception as error:  # on broken bytes Pillow raises OSError, SyntaxError, ValueError, struct.error...
        raise BadSample(str(path), f"unreadable image ({printable(error)})") from error


def _read(file: BinaryIO, path: str | Path, reading: Reading) -> Image.Image:
    start = file.read(12)
    file.seek(0)
    if start.startswith(b"\xff\xd8\xff"):
        image = JpegImagePlugin.jpeg_factory(file)  # Image.open would refuse large ones, before they are read smaller
        halved = math.prod((side + 1) // 2 for side in image.size) <= reading.max_pixels < math.prod(image.size)
        if halved and not image.info.get("progressive"):
            image.draft(None, tuple(max(1, side // 2) for side in image.size))
    else:
        if reading.max_pixels > MAX_PIXELS and Image.MAX_IMAGE_PIXELS is not None:
            Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, reading.max_pixels)
        other = OTHER_FORMATS.get(start[8:12]) if start[4:8] == b"ftyp" else None
        with_heif = other in ("HEIC", "HEIF") and reads_heif()
        try:
            image = Image.open(file, formats=(*FORMATS, "HEIF") if with_heif else FORMATS)
        except Image.UnidentifiedImageError:
            hint = f"; it is {other}, save it as one of these" if other else ""
            hint += f" or {HEIC_REMEDY}" if other in ("HEIC", "HEIF") else ""
            raise BadSample(str(path), f"not an image file ({', '.join(FORMATS)}){hint}") from None
    with image:
        check_size(image.size, reading.max_pixels)  # the header alone is read so far
        image.load()
        if reading.exif_orientation:
            with suppress(Exception):  # whatever Pillow raises on broken EXIF data
                image = ImageOps.exif_transpose(image)
        elif "exif" in image.info and not _warned:
            _warn_of_orientation(image, str(path))
        return to_rgb(image)


@cache
def reads_heif() -> bool:
    """Whether pillow-heif is there, which is optional; Pillow then reads HEIC, upright whatever the EXIF data say."""
    try:
        import pillow_heif
    except ImportError:
        return False
    pillow_heif.register_heif_opener()
    return True


def find_images(paths: Sequence[str]) -> list[Path]:
    """The image files of files (with any ending) and folders, each once, in their order; sorted in a folder.

    HEIC and AVIF count among them, so that they are named where they cannot be read. Other files of a folder are
    counted in a warning. ValueError: a path that does not exist or has no image.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_file():
            files.append(path)
            continue
        if not path.is_dir():
            raise ValueError(f"{path}: no such file or folder")
        inside = (one for one in path.rglob("*") if not any(p[0] == "." for p in one.relative_to(path).parts))
        by_ending = {one: one.suffix.lower() for one in sorted(inside) if one.is_file()}
        known = IMAGE_SUFFIXES + PHONE_SUFFIXES
        if not reads_heif() and not set(IMAGE_SUFFIXES).intersection(by_ending.values()):
            known = IMAGE_SUFFIXES
        images = [one for one, ending in by_ending.items() if ending in known]
        others = Counter(ending or "none" for ending in by_ending.values() if ending not in known)
        counts = ", ".join(f"{count} {printable(ending)}" for ending, count in others.most_common(5))
        if not images:
            but = f", but other files: {counts}" if others else ""
            but += f"; for HEIC {HEIC_REMEDY}" if {".heic", ".heif"} & others.keys() else ""
            raise ValueError(f"{path}: no image there (endings looked for: {', '.join(IMAGE_SUFFIXES)}){but}")
        if others:
            logger.warning("%s: skipped other files: %s", printable(str(path)), counts)
        files.extend(images)
    return list(dict.fromkeys(files))


_warned = False


def _warn_of_orientation(image: Image.Image, path: str) -> None:
    """Logs the first file whose EXIF orientation is not applied."""
    global _warned
    with suppress(Exception):
        if image.getexif().get(ExifTags.Base.Orientation) in range(2, 9):
            _warned = True
            rule = "as in torchvision and timm, nor that of others; set exif_orientation to apply it"
            logger.warning("%s: its EXIF orientation is not applied, %s", printable(path), rule)


def leads_out(name: str) -> bool:
    """Whether a path below some folder is none: absolute, or out of it by `..`, here or on Windows."""
    name = name.replace("\\", "/")
    return os.path.isabs(name) or os.path.normpath(name).split(os.sep)[0] == os.pardir


def check_size(size: tuple[int, int], max_pixels: int = MAX_PIXELS) -> None:
    """Raises ValueError for an image of (width, height) that would not fit into memory, now or when resized."""
    width, height = size
    if width * height > max_pixels:
        raise ValueError(f"{width} x {height} pixels, more than the limit of {max_pixels} (max_pixels)")
    if max(size) > MAX_ASPECT_RATIO * min(size):
        raise ValueError(f"{width} x {height} pixels, sides beyond 1 : {MAX_ASPECT_RATIO}")


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts an image of any mode to 8-bit RGB; ValueError: a mode without a known range or without a conversion."""
    if image.mode == "RGB" and "transparency" not in image.info:
        image.load()
        return image
    if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion would cut it off at 255
        pixels = np.asarray(image)
        if pixels.min() < 0 or pixels.max() > 65535:
            raise ValueError("32-bit integer pixels of unknown range; save it with 8 or 16 bits")
        image = Image.fromarray((pixels >> 8).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("floating-point pixels of unknown range; save it with 8 or 16 bits")
    elif image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")
