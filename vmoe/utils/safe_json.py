"""Text and JSON that may come from a stranger: every mistake is a ValueError, and no file is larger than its use is."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any


def parse_json(text: str | bytes) -> Any:
    """What a JSON text holds.

    Raises:
        ValueError: it is no JSON, or nested so deep that it cannot be read; a few words without the file's name.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON at line {error.lineno}, column {error.colno} ({error.msg})") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise ValueError("nested too deep") from None
    except ValueError:  # what Python refuses so as not to compute for long
        raise ValueError("a whole number of thousands of digits") from None


def read_json(file: str | Path, max_bytes: int = 16 * 2**20) -> Any:
    """The content of a JSON file in UTF-8.

    Args:
        file: a regular file.
        max_bytes: a larger file is refused before it is read.

    Raises:
        OSError: it cannot be read.
        ValueError: as :func:`parse_json`, or it is too large or no regular file; without the file's name.
    """
    return parse_json(read_text(file, max_bytes))


def read_text(file: str | Path, max_bytes: int = 16 * 2**20) -> str:
    """A UTF-8 file as it is, without a byte order mark; arguments and errors as of :func:`read_json`."""
    facts = Path(file).stat()
    if not (stat.S_ISREG(facts.st_mode) or stat.S_ISDIR(facts.st_mode)):  # a folder is an OSError below
        raise ValueError("not a regular file")
    if facts.st_size > max_bytes:
        raise ValueError(f"{facts.st_size} bytes, more than the limit of {max_bytes}")
    try:
        return Path(file).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from None
