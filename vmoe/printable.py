"""Text from strangers' files, such as names and paths, made fit for a terminal."""

from __future__ import annotations

import unicodedata

MAX_SHOWN = 2000
# They reorder the text around them, or end a line where none seems to end.
_MOVING = frozenset("\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u2028\u2029")


def is_unprintable(character: str) -> bool:
    """Whether a character acts on a terminal instead of being shown there, or cannot be written (half a surrogate)."""
    return unicodedata.category(character) in ("Cc", "Cs") or character in _MOVING


def escaped(text: object) -> str:
    """The text with its control characters as `\\x1b`; its lines stay."""
    return "".join(
        repr(character)[1:-1] if is_unprintable(character) and character != "\n" else character
        for character in str(text)
    )


def printable(text: object) -> str:
    """The text on one line: as `escaped`, white space as single spaces, cut if it is very long."""
    line = " ".join(str(text).split())
    return escaped(line if len(line) <= MAX_SHOWN else f"{line[:MAX_SHOWN]}... ({len(line)} characters)")
