"""Text from strangers' files, such as names and paths, made fit for a terminal."""

from __future__ import annotations

import unicodedata

# Control characters, halves of surrogate pairs (undecodable bytes of file names), and those that reorder the text.
_UNPRINTABLE = {"Cc", "Cs"}
_REORDERING = set("\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
MAX_SHOWN = 2000


def is_unprintable(character: str) -> bool:
    """Whether a character acts on a terminal instead of being shown there (`\\x1b`, `\\r`, a line's end)."""
    return unicodedata.category(character) in _UNPRINTABLE or character in _REORDERING or character in "\u2028\u2029"


def printable(text: object) -> str:
    """The text on one line: control characters as `\\x1b`, all white space as single spaces, cut if it is very long."""
    words = " ".join(str(text).split())
    words = words if len(words) <= MAX_SHOWN else f"{words[:MAX_SHOWN]}... ({len(words)} characters)"
    return "".join(repr(character)[1:-1] if is_unprintable(character) else character for character in words)
