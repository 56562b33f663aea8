"""Walks the members of a tar file that may come from a stranger: their names and where their bytes lie.

Only headers are read, nothing is extracted, and memory does not depend on what the headers claim. Python's tarfile is
not used here: it reads extended headers of any size into memory and loops for ever on some negative sizes
(CVE-2025-8194). Formats: ustar, pax and GNU, with long names; https://www.gnu.org/software/tar/manual/html_node/Standard.html
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from vmoe.data.images import DataError

BLOCK = 512
# Of a header's long name; file systems allow 4096 bytes.
MAX_NAME_BYTES = 16 * 1024
# A picture with its caption; so that a header cannot ask for the memory of a whole shard.
MAX_MEMBER_BYTES = 64 * 2**20
# Zeros behind the end: tar fills up to a multiple of its blocking factor, 10 KiB and rarely more.
MAX_PADDING = 2**20

COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstandard", b"PK": "zip"}
REFUSED = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a character device",
    b"4": "a block device",
    b"6": "a pipe",
    b"K": "a link with a long name",
    b"S": "a sparse file",
    b"M": "the continuation of another volume",
}
REMEDY = "repair, download or write the shard again, or leave it out"


class Member(NamedTuple):
    """A file in a tar file.

    Attributes:
        name: its path within the tar file, without "./" in front.
        offset: of its first byte; a multiple of 512.
        size: bytes.
    """

    name: str
    offset: int
    size: int


def read_members(path: str | Path) -> Iterator[Member]:
    """The regular files of an uncompressed tar file, in order.

    Raises:
        DataError: the file cannot be read, is compressed, cut off, damaged or no tar file, or has a member that is a
            link, a device or sparse, has a name that is absolute or holds "..", or is longer than MAX_MEMBER_BYTES.
    """
    try:
        with open(path, "rb", buffering=8192) as file:
            yield from _walk(file, path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the data source's path") from None


def read_name(read: Callable[[int, int], bytes], offset: int) -> str:
    """A member's name, for messages.

    Args:
        read: (offset, size) -> bytes of the tar file.
        offset: of the member's header.
    """
    header = read(offset, BLOCK)
    name = header[:100].partition(b"\0")[0]
    if b"?" in name or len(name) == 100:  # tarfile writes so what is in an extended header before this one
        for blocks in range(1, min(MAX_NAME_BYTES, offset - BLOCK) // BLOCK + 1):
            start = offset - (blocks + 1) * BLOCK
            extended = read(start, BLOCK)
            length = _number(extended[124:136])
            if extended[156:157] in (b"x", b"L") and length and -(-length // BLOCK) == blocks and _is_header(extended):
                try:
                    found = _long_name(read(start + BLOCK, length), extended[156:157], "")
                except DataError:
                    found = None
                return found or name.decode("utf-8", "backslashreplace")
    return name.decode("utf-8", "backslashreplace")


def _walk(file: BinaryIO, path: str | Path) -> Iterator[Member]:
    size = os.fstat(file.fileno()).st_size
    place, long_name = 0, None
    while True:
        file.seek(place)
        header = file.read(BLOCK)
        if not size:
            raise DataError(f"{path}: is empty; {REMEDY}")
        if len(header) < BLOCK and place:
            raise DataError(f"{path}: cut off at byte {size}, its end mark is missing; {REMEDY}")
        if not any(header):
            _check_end(file, size, path)
            return
        name, kind, length = _parse(header, place, path)
        offset = place + BLOCK
        shown = f"{path}: member {(long_name or name)[:200]!r}"
        if offset + length > size:
            raise DataError(f"{shown}: cut off, it should have {length} bytes and the file ends before; {REMEDY}")
        place = offset + -(-length // BLOCK) * BLOCK
        if kind in (b"x", b"g", b"L"):
            if length > MAX_NAME_BYTES:
                raise DataError(
                    f"{shown}: has an extended header of {length} bytes; more than {MAX_NAME_BYTES} are refused"
                )
            found = _long_name(file.read(length), kind, shown)
            if found is not None:
                long_name = found
            continue
        name, long_name = _safe_name(long_name or name, path), None
        if kind == b"5" and not length:  # a folder
            continue
        if kind not in (b"0", b"\0", b"7"):
            what = REFUSED.get(kind, f"of the unknown type {kind!r}")
            raise DataError(
                f"{path}: member {name!r} is {what}; only plain files are read, so leave it out of the shard"
            )
        if length > MAX_MEMBER_BYTES:
            raise DataError(f"{path}: member {name!r} has {length} bytes; more than {MAX_MEMBER_BYTES} are refused")
        yield Member(name, offset, length)


def _check_end(file: BinaryIO, size: int, path: str | Path) -> None:
    """Behind an empty block there must be another one, and nothing else but zeros."""
    rest = size - file.tell()
    if rest < BLOCK:
        raise DataError(f"{path}: cut off at byte {size}, within its end mark; {REMEDY}")
    if rest > MAX_PADDING or any(file.read(rest)):
        raise DataError(f"{path}: goes on behind its end mark (two tar files in one?); {REMEDY}")


def _parse(header: bytes, place: int, path: str | Path) -> tuple[str, bytes, int]:
    """(name, type, size) of a member from its header."""
    length = _number(header[124:136])
    if length is None or not _is_header(header):
        if place:
            raise DataError(f"{path}: is damaged at byte {place}; {REMEDY}")
        for magic, name in COMPRESSED.items():
            if header.startswith(magic):
                raise DataError(
                    f"{path}: is compressed ({name}), and its samples could not be read one by one; unpack it to a "
                    "plain .tar (pictures are compressed already)"
                )
        raise DataError(f"{path}: is no tar file; {REMEDY}")
    name = header[:100].partition(b"\0")[0]
    if header[257:263] == b"ustar\0":  # GNU's own format ("ustar ") has other fields where the prefix would be
        prefix = header[345:500].partition(b"\0")[0]
        name = prefix + b"/" + name if prefix else name
    return name.decode("utf-8", "backslashreplace"), header[156:157], length


def _is_header(block: bytes) -> bool:
    """Whether the checksum of a header is right."""
    return _number(block[148:156]) == sum(block) - sum(block[148:156]) + 8 * ord(" ")


def _number(field: bytes) -> int | None:
    """Octal digits, or a big number in base 256 where the first bit is set; None: neither, or negative."""
    if field[:1] == b"\x80":
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b" \0")
    return int(digits or b"0", 8) if re.fullmatch(rb"[0-7]*", digits) else None


def _long_name(content: bytes, kind: bytes, shown: str) -> str | None:
    """The name in an extended header, or None if it is about other things."""
    if kind == b"L":
        return content.rstrip(b"\0").decode("utf-8", "backslashreplace")
    name = None
    while content.strip(b"\0"):
        digits, space, _ = content.partition(b" ")
        length = int(digits) if space and re.fullmatch(rb"[0-9]{1,6}", digits) else 0
        key, equals, value = content[len(digits) + 1 : length].removesuffix(b"\n").partition(b"=")
        if not equals or length > len(content):
            raise DataError(f"{shown}: has a damaged extended header; {REMEDY}")
        if key == b"size" or key.startswith(b"GNU.sparse") or (key == b"path" and kind == b"g"):
            what = key.decode("utf-8", "backslashreplace")
            raise DataError(
                f"{shown}: has an extended header with {what}; sparse files, files of 8 GiB and more, and one name for "
                "all members are refused"
            )
        if key == b"path":
            name = value.decode("utf-8", "backslashreplace")
        content = content[length:]
    return name


def _safe_name(name: str, path: str | Path) -> str:
    parts = re.split(r"[/\\]", name)
    if not name or "\0" in name or ".." in parts or parts[0] == "" or re.match(r"[A-Za-z]:", name):
        raise DataError(
            f"{path}: member {name[:200]!r} has a name that is empty, absolute or leads out of the shard; refused"
        )
    return name.removeprefix("./")
