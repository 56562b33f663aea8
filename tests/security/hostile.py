"""What the lists of inputs made to do harm share. Nothing in them may run or be unpickled: see conftest.py."""

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save_file

from vmoe.data.images import BadSample
from vmoe.models.serialization import METADATA_KEY, read_pretrained_metadata

from .bounds import outcome

REFUSALS = (ValueError, BadSample)


class Harm:
    """Makes the file `canary` when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return Path.touch, (self.canary,)


def refused(call: Callable, *words: str) -> None:
    """The call ends with one sentence, in which the words stand."""
    sentence = outcome(call, REFUSALS, megabytes=None)
    assert isinstance(sentence, str), f"was taken: {sentence!r:.200}"
    for word in words:
        assert word in sentence


def with_settings(good_file: Path, file: Path, change: Callable[[dict], object]) -> Path:
    """The same weights with other settings."""
    settings = read_pretrained_metadata(good_file)
    change(settings)
    save_file(load_file(good_file), file, metadata={METADATA_KEY: json.dumps(settings)})
    return file


def zip_of(content: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("archive/data.pkl", content)
    return stream.getvalue()
