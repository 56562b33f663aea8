"""The samples of a shard: a walk through the headers of an untrusted tar file, and the index that is kept of it.

Only headers are read, and memory does not depend on what they claim. Of Python's tarfile only the parser of one header
is used: the rest reads extended headers of any size into memory and loops forever on some negative sizes
(CVE-2025-8194). Formats: ustar, pax and GNU, with long names.

A sample is all members of one key, the part of a member's name before the first dot of its last component, as in
WebDataset. Members with other endings are skipped; those that look like a sample's (img_1.5.jpg) are counted.
"""

import hashlib
import json
import os
import re
import tarfile
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from vmoe.data.images import DataError, file_errors
from vmoe.data.sources.emoji import cache_folder, writing_to_cache
from vmoe.utils.printable import printable

BLOCK = 512
MAX_NAME_BYTES = 16 * 1024  # of a header's long name; file systems allow 4096 bytes
MAX_MEMBER_BYTES = 64 * 2**20  # of an image, so that a header cannot ask for the memory of a shard
MAX_PADDING = 2**20  # zeros behind the end: tar fills up to its blocking factor, 10 KiB and rarely more
MAX_SAMPLES = 1_000_000  # so that millions of empty members cannot fill the memory; usual are 1,000 to 10,000

REMEDY = "repair, download or write the shard again, or leave it out"

FORMAT = 4
IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp")
KINDS = {**dict.fromkeys(IMAGE_ENDINGS, "image"), "txt": "txt", "json": "json", "cls": "cls"}
# Each part's position (in blocks of 512 bytes; 0: there is none) and size in bytes: 32 bytes a sample.
ENTRY = np.dtype([(f"{part}_{what}", "<u4") for part in ("image", "txt", "json", "cls") for what in ("block", "size")])


class Member(NamedTuple):
    """A file in a tar file: its path without "./", the offset of its first byte (a multiple of 512), its size."""

    name: str
    offset: int
    size: int


class Index(NamedTuple):
    """What a shard holds."""

    entries: np.ndarray  # (N,) of dtype ENTRY, its samples in order, read-only
    names: list[str]  # of the first member of each sample
    num_dotted: int = 0  # skipped members such as img_1.5.jpg, whose last ending alone is one of KINDS
    first_dotted: str = ""  # the first of them


def read_index(path: str) -> Index:
    """The index of a shard, from the cache folder or from its headers; DataError: as `scan`, or it cannot be kept."""
    file = cache_file(path)
    # Not as .npy: on Python 3.11 numpy's reader of its header now and then fails in several threads at once.
    content = file.read_bytes() if file.is_file() else b""
    checksum, content = content[:32], content[32:]
    if content and checksum == hashlib.sha256(content).digest():
        facts, _, entries = content.partition(b"\n")
        return Index(np.frombuffer(entries, ENTRY), *json.loads(facts))
    index = scan(path)
    content = json.dumps(index[1:]).encode() + b"\n" + index.entries.tobytes()
    with writing_to_cache(file) as draft:
        draft.write_bytes(hashlib.sha256(content).digest() + content)
    return index


def cache_file(path: str) -> Path:
    """Where the index of a shard is kept; another file when its path, size or time of change is another."""
    with file_errors(path, "; check the data source's path"):
        status = os.stat(path)
    facts = f"{os.path.abspath(path)}\0{status.st_size}\0{status.st_mtime_ns}\0{FORMAT}"
    name = hashlib.blake2b(facts.encode(errors="replace"), digest_size=16).hexdigest()
    return cache_folder() / "shards" / f"{name}.index"


def scan(path: str) -> Index:
    """The index of a shard from its headers; DataError: as `read_members`, or its samples are refused."""
    numbers, names, rows = {}, [], array("L")  # a row is an ENTRY; a list of them would need many times the memory
    num_dotted, first_dotted = 0, ""
    for member in read_members(path):
        folder, slash, base = member.name.rpartition("/")
        stem, _, ending = base.partition(".")
        kind = KINDS.get(ending.lower())
        if kind is None and stem and ending.lower().rpartition(".")[2] in KINDS:
            num_dotted, first_dotted = num_dotted + 1, first_dotted or member.name
        if kind is None or not stem:
            continue
        key = folder + slash + stem
        number = numbers.setdefault(key, len(names))
        if number == MAX_SAMPLES:
            raise DataError(f"{path}: holds more than {MAX_SAMPLES} samples; split it")
        if number == len(names):
            names.append(member.name)
            rows.extend([0] * len(ENTRY.names))
        position = number * len(ENTRY.names) + ENTRY.names.index(f"{kind}_block")
        if rows[position]:
            raise DataError(f"{path}: member {member.name!r}: sample {key!r} has two such members; {REMEDY}")
        rows[position], rows[position + 1] = member.offset // BLOCK, member.size
    if not names:
        skipped = dotted_members(num_dotted, first_dotted) if num_dotted else "leave it out"
        raise DataError(f"{path}: holds no sample ({', '.join(KINDS)}); {skipped}")
    return Index(np.array(rows, "<u4").view(ENTRY), names, num_dotted, first_dotted)


def dotted_members(count: int, first: str) -> str:
    """What to say of skipped members."""
    rule = "a sample's name ends at its first dot (as in WebDataset): write the shards again without dots in the names"
    return f"{count} members such as {printable(first)!r} are skipped, because {rule}"


def read_members(path: str | Path) -> Iterator[Member]:
    """The regular files of an uncompressed tar file, in order.

    Raises:
        DataError: the file cannot be read, is compressed, cut off, damaged or no tar file, or has a member that is a
            link, a device or sparse, has a name that is absolute or holds "..", or is longer than MAX_MEMBER_BYTES.
    """
    with file_errors(path, "; check the data source's path"), open(path, "rb", buffering=8192) as file:
        size = os.fstat(file.fileno()).st_size
        if not size:
            raise DataError(f"{path}: is empty; {REMEDY}")
        position, long_name = 0, None
        while True:
            file.seek(position)
            header = file.read(BLOCK)
            if len(header) < BLOCK and position:
                raise DataError(f"{path}: cut off at byte {size}, its end mark is missing; {REMEDY}")
            if not any(header):
                _check_end(file, size, path)
                return
            info = _parse(header, position, path)
            offset = position + BLOCK
            shown = f"{path}: member {(long_name or info.name)[:200]!r}"
            if offset + info.size > size:
                what = f"cut off, it should have {info.size} bytes and the file ends before"
                raise DataError(f"{shown}: {what}; {REMEDY}")
            position = offset + -(-info.size // BLOCK) * BLOCK
            if info.type in (b"x", b"g", b"L"):
                if info.size > MAX_NAME_BYTES:
                    what = f"has an extended header of {info.size} bytes; more than {MAX_NAME_BYTES} are refused"
                    raise DataError(f"{shown}: {what}")
                long_name = _long_name(file.read(info.size), info.type, shown) or long_name
                continue
            name, long_name = long_name or info.name, None
            if _check_member(name, info, path):
                yield Member(name.removeprefix("./"), offset, info.size)


def _check_member(name: str, info: tarfile.TarInfo, path: str | Path) -> bool:
    """Whether a member is a file, else it is a folder; raises DataError if it is refused."""
    parts = re.split(r"[/\\]", name)
    shown = f"{path}: member {name[:200]!r}"
    if not name or "\0" in name or ".." in parts or parts[0] == "" or re.match(r"[A-Za-z]:", name):
        raise DataError(f"{shown} has a name that is empty, absolute or leads out of the shard; refused")
    if info.type == tarfile.DIRTYPE and not info.size:
        return False
    if info.type not in tarfile.REGULAR_TYPES or info.type == tarfile.GNUTYPE_SPARSE:
        what = "a link" if info.islnk() or info.issym() else f"a device or another special file (type {info.type!r})"
        raise DataError(f"{shown} is {what}; only plain files are read, so leave it out of the shard")
    if info.size > MAX_MEMBER_BYTES:
        raise DataError(f"{shown} has {info.size} bytes; more than {MAX_MEMBER_BYTES} are refused")
    return True


def _check_end(file: BinaryIO, size: int, path: str | Path) -> None:
    """Behind an empty block there must be another one, and nothing else but zeros."""
    rest = size - file.tell()
    if rest < BLOCK:
        raise DataError(f"{path}: cut off at byte {size}, within its end mark; {REMEDY}")
    if rest > MAX_PADDING or any(file.read(rest)):
        raise DataError(f"{path}: continues after its end mark (two tar files in one?); {REMEDY}")


def _parse(header: bytes, position: int, path: str | Path) -> tarfile.TarInfo:
    """Name, type and size of a member from its header."""
    try:
        info = tarfile.TarInfo.frombuf(header, "utf-8", "backslashreplace")
        if header[257:263] != b"ustar\0":  # GNU's headers hold times where others have a prefix of the name
            info.name = header[:100].rstrip(b"\0").decode(errors="backslashreplace")
        if info.size >= 0:
            return info
    except tarfile.HeaderError:
        pass
    if position:
        raise DataError(f"{path}: is damaged at byte {position}; {REMEDY}")
    raise DataError(f"{path}: is no tar file; unpack a compressed one to a plain .tar")


def _long_name(content: bytes, kind: bytes, shown: str) -> str | None:
    """The name in an extended header, or None if it is about other things."""
    if kind == b"L":
        return content.rstrip(b"\0").decode(errors="backslashreplace")
    name = None
    while content.strip(b"\0"):
        digits, space, _ = content.partition(b" ")
        length = int(digits) if space and re.fullmatch(rb"[0-9]{1,6}", digits) else 0
        key, equals, value = content[len(digits) + 1 : length].removesuffix(b"\n").partition(b"=")
        if not equals or length > len(content):
            raise DataError(f"{shown}: has a damaged extended header; {REMEDY}")
        if key == b"size" or key.startswith(b"GNU.sparse") or (key == b"path" and kind == b"g"):
            refused = "sparse files, files of 8 GiB and more, and one name for all members are refused"
            raise DataError(f"{shown}: has an extended header with {key.decode(errors='backslashreplace')}; {refused}")
        if key == b"path":
            name = value.decode(errors="backslashreplace")
        content = content[length:]
    return name
