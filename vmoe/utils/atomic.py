"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(file: Path) -> Iterator[Path]:
    """A name beside `file` to write to; what was written there takes its place when the block ends.

    The name is nobody else's, so several processes may write the same file; the last one stays. It has the same suffix.
    If the block raises, `file` stays as it was. Whoever writes it, the file's permissions are those of a new one
    (umask).

    Args:
        file: its folder exists.
    """
    temporary = file.with_name(f".{file.stem}.{secrets.token_hex(6)}{file.suffix}")
    try:
        temporary.touch()
        mode = stat.S_IMODE(temporary.stat().st_mode)
        yield temporary
        os.chmod(temporary, mode)  # some libraries make a new file that is the user's alone
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
