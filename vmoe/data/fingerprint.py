"""A short text that identifies the data that results were made on: equal for equal data, on every machine."""

import hashlib
import json
import os
import stat
from pathlib import Path
from typing import Any

from PIL import Image

BYTES_OF_A_FILE = 4096  # of each end: an image's header, first and last rows; so 50,000 files take seconds


class Fingerprint:
    """A growing SHA-256 of facts, each with its kind and length, so that no two lists of facts give the same bytes."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, kind: str, fact: Any) -> None:
        """Adds what JSON can hold (numbers, texts, lists of them, None), or numbers of numpy or torch."""
        text = json.dumps(fact, ensure_ascii=True, sort_keys=True, default=lambda number: number.item())
        self._add_bytes(kind, text.encode())

    def add_file(self, name: str, path: str | Path) -> None:
        """Adds a file by its name within the data set, its size and its first and last 4 KiB; or that it is missing."""
        self.add("file", name)
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would never end
                raise OSError(f"{path} is no regular file")
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                head = file.read(BYTES_OF_A_FILE)
                file.seek(max(0, size - BYTES_OF_A_FILE))
                tail = file.read(BYTES_OF_A_FILE)
        except (OSError, ValueError):  # ValueError: a name that no file can have
            self.add("missing", None)
            return
        self.add("size", size)
        self._add_bytes("head", head)
        self._add_bytes("tail", tail)

    def add_image(self, image: Image.Image) -> None:
        """Adds an image by its size and pixels."""
        self.add("image", [image.mode, *image.size])
        self._add_bytes("pixels", image.tobytes())

    def hexdigest(self) -> str:
        """64 hexadecimal digits of all facts added so far, in their order."""
        return self._hash.hexdigest()

    def _add_bytes(self, kind: str, content: bytes) -> None:
        self._hash.update(f"{kind} {len(content)}\n".encode())
        self._hash.update(content)
