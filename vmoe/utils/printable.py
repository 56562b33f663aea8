"""Text that any terminal can show, and output that never ends a command."""

import codecs
import json
import os
import sys
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any, TextIO

MAX_SHOWN = 2000
# They reorder the text around them, or end a line where none seems to end.
_MOVING = frozenset("\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u2028\u2029")


def is_unprintable(character: str) -> bool:
    """Whether a character acts on a terminal, or cannot be written (half a surrogate)."""
    return unicodedata.category(character) in ("Cc", "Cs") or character in _MOVING


def escaped(text: object) -> str:
    """The text with its control characters as `\\x1b`; its lines stay."""
    return "".join(repr(each)[1:-1] if is_unprintable(each) and each != "\n" else each for each in str(text))


def printable(text: object) -> str:
    """The text on one line: as `escaped`, white space as single spaces, cut if it is very long."""
    line = " ".join(str(text).split())
    return escaped(line if len(line) <= MAX_SHOWN else f"{line[:MAX_SHOWN]}... ({len(line)} characters)")


def first_line(error: BaseException) -> str:
    """An error without what follows its first line, such as a stack of C++."""
    return printable((str(error).strip() or type(error).__name__).splitlines()[0])[:300]


# As JSON escapes them, so that JSON stays JSON in any encoding.
codecs.register_error("vmoe.json", lambda error: (json.dumps(error.object[error.start : error.end])[1:-1], error.end))


@contextmanager
def safe_output() -> Iterator[None]:
    """Around each command (`vmoe_command.py`): standard output and error raise nothing.

    A character that the encoding lacks becomes JSON's escape; if the reader is gone or the disk is full, the text is
    lost.
    """
    streams = [None if stream is None else _SafeStream(stream) for stream in (sys.stdout, sys.stderr)]
    with redirect_stdout(streams[0]), redirect_stderr(streams[1]):
        try:
            yield
        finally:
            for stream in filter(None, streams):
                stream.flush()


class _SafeStream:
    """A text stream whose `write` and `flush` raise nothing."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):  # ValueError: it is closed
            try:
                self._stream.write(text)
            except UnicodeEncodeError:
                encoding = self._stream.encoding
                self._stream.write(text.encode(encoding, "vmoe.json").decode(encoding))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """What cannot be written goes nowhere; else Python fails with it when it exits."""
        try:
            self._stream.flush()
        except (OSError, ValueError):
            with suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), self._stream.fileno())
