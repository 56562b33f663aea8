"""Files: paths, atomic writing, and reading with a bound on the size. JSON."""

import json
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HUB_SOURCES = ("hf-hub:", "local-dir:")  # as timm and open_clip spell them


def local_path(checkpoint: str) -> Path:
    """A checkpoint's path, beside which its results belong; of a repository its name in the current folder."""
    kind, _, name = checkpoint.partition(":") if checkpoint.startswith(HUB_SOURCES) else ("", "", checkpoint)
    return Path(name.rpartition("/")[2] if kind == "hf-hub" else name)


def is_writable(folder: Path) -> bool:
    """Whether files can be written in a folder, or it can be made; makes nothing."""
    for each in (folder.absolute(), *folder.absolute().parents):
        try:
            return stat.S_ISDIR(each.stat().st_mode) and os.access(each, os.W_OK | os.X_OK)
        except FileNotFoundError:
            if each.is_symlink():  # to nothing
                return False
        except (OSError, ValueError):  # below a file, or a name that no file can have
            return False
    return False


def can_write(file: Path) -> bool:
    """Whether a file can be written, or written over; missing folders above it count as made."""
    try:
        return not stat.S_ISDIR(file.stat().st_mode) and is_writable(file.absolute().parent)
    except FileNotFoundError:
        return is_writable(file.absolute().parent)
    except (OSError, ValueError):
        return False


@contextmanager
def atomic_file(file: Path) -> Iterator[Path]:
    """A temporary file, which replaces `file` when the block ends without an error; its folder is made. Several
    processes may write the same file, the last one stays; the permissions are those of a new file (umask)."""
    temporary = file.with_name(f".{file.stem}.{secrets.token_hex(6)}{file.suffix}")
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        temporary.touch()
        mode = stat.S_IMODE(temporary.stat().st_mode)
        yield temporary
        os.chmod(temporary, mode)  # some libraries make a new file that is the user's alone
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def read_text(file: str | Path, max_bytes: int = 16 * 2**20) -> str:
    """The content of a UTF-8 file. ValueError, without its name: not UTF-8, no regular file, or over `max_bytes`."""
    facts = Path(file).stat()
    if not (stat.S_ISREG(facts.st_mode) or stat.S_ISDIR(facts.st_mode)):  # a folder is an OSError below
        raise ValueError("not a regular file")
    if facts.st_size > max_bytes:
        raise ValueError(f"{facts.st_size} bytes, more than the limit of {max_bytes}")
    try:
        return Path(file).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from None


def parse_json(text: str | bytes) -> Any:
    """What a JSON text holds; ValueError, in a few words: it is no JSON, or nested too deep."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON at line {error.lineno}, column {error.colno} ({error.msg})") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise ValueError("nested too deep") from None
    except ValueError:  # Python converts no integer of more than some thousand digits
        raise ValueError("a whole number of thousands of digits") from None


def read_json(file: str | Path, max_bytes: int = 16 * 2**20, kind: type = object) -> Any:
    """The content of a JSON file; ValueError: not of `kind`, list or dict, or as of `read_text` and `parse_json`."""
    content = parse_json(read_text(file, max_bytes))
    if not isinstance(content, kind):
        raise ValueError(f"must be a JSON {'object' if kind is dict else 'list'}")
    return content
