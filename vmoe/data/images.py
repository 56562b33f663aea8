"""Reads any picture file as 8-bit RGB, or says in one sentence why it cannot."""

from __future__ import annotations

import io
import os
import stat
from pathlib import Path

import numpy as np
from PIL import Image

from vmoe.printable import printable

# A longer strip would make the evaluation transform, which scales the short side up, need gigabytes.
MAX_ASPECT_RATIO = 100
# Pillow's own limit of 89 million pixels, at which it warns of a decompression bomb (an error only at twice that).
MAX_PIXELS = 1024 * 1024 * 1024 // 4 // 3

# What Pillow may take a file for, whatever its name says. It reads many more, some by calling other programs (a file
# that begins like EPS goes to Ghostscript), some by decoders that few people use and test.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "PPM", "TIFF")

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".ppm", ".pgm", ".tif", ".tiff")


class DataError(ValueError):
    """Data that cannot be read on at all; the message is one sentence that names the file and the remedy."""


class BadSample(Exception):
    """A sample that cannot be used.

    Args:
        path: the file, or another name of the sample.
        reason: what is wrong with it, a few words.
    """

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)  # both: so that it can be pickled
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def load_image(path: str | Path, content: bytes | None = None) -> Image.Image:
    """Reads a picture: the first frame, transparency laid on white, 8 bits, RGB. EXIF rotation is not applied.

    Args:
        path: the file.
        content: its bytes, where they come from elsewhere; `path` is then only a name for messages.

    Raises:
        BadSample: the file is missing, truncated, no picture of FORMATS, has more than MAX_PIXELS pixels, or is a
            strip with sides beyond 1 : MAX_ASPECT_RATIO.
    """
    try:
        if content is None and not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would never end
            raise BadSample(str(path), "not a regular file")
        with Image.open(path if content is None else io.BytesIO(content), formats=FORMATS) as image:
            check_size(image.size)  # the header alone is read so far
            return to_rgb(image)
    except FileNotFoundError:
        raise BadSample(str(path), "no such file") from None
    except Image.UnidentifiedImageError:
        raise BadSample(str(path), f"not a picture file ({', '.join(FORMATS)})") from None
    except BadSample:
        raise
    except (
        Exception
    ) as error:  # on broken bytes Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error...
        raise BadSample(str(path), f"unreadable picture ({printable(error)})") from error


def leads_out(name: str) -> bool:
    """Whether a path below some folder is none: absolute, or out of it by `..`, here or on Windows."""
    name = name.replace("\\", "/")
    return os.path.isabs(name) or os.path.normpath(name).split(os.sep)[0] == os.pardir


def check_size(size: tuple[int, int]) -> None:
    """Raises ValueError for a picture of (width, height) that would not fit into memory, now or when resized."""
    width, height = size
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width} x {height} pixels, more than the limit of {MAX_PIXELS}")
    if max(size) > MAX_ASPECT_RATIO * min(size):
        raise ValueError(f"{width} x {height} pixels, sides beyond 1 : {MAX_ASPECT_RATIO}")


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts a picture of any mode to 8-bit RGB.

    Raises:
        ValueError: a mode without a known range (floating point, 32-bit integers) or without a conversion.
    """
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
