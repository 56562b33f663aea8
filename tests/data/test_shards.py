"""The tar walker against tarfile as the writer, and against headers that no honest writer makes."""

import gzip
import io
import tarfile

import pytest

from vmoe.data.images import DataError
from vmoe.data.shards import MAX_MEMBER_BYTES, read_members

NAMES = ["a.jpg", "./b.txt", "folder/c.json", "ü.jpg", f"{'long' * 40}.jpg", f"{'deep/' * 30}d.jpg"]


def write(path, members, format=tarfile.PAX_FORMAT):
    """A tar file of (name, content) or (name, content, {attribute: value})."""
    with tarfile.open(path, "w", format=format) as tar:
        for name, content, *attributes in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            for key, value in (attributes or [{}])[0].items():
                setattr(info, key, value)
            tar.addfile(info, io.BytesIO(content))
    return path


def contents(path):
    whole = path.read_bytes()
    return [(one.name, whole[one.offset : one.offset + one.size]) for one in read_members(path)]


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
@pytest.mark.parametrize("mtime", [0, 1.5])  # a fraction makes WebDataset's writer add a pax header to each member
def test_members_of_all_formats(tmp_path, format, mtime):
    names = NAMES if format != tarfile.USTAR_FORMAT else [name for name in NAMES if len(name) < 100 or "/" in name]
    members = [(name, bytes([number]) * (number * 300), {"mtime": mtime}) for number, name in enumerate(names)]
    members.insert(2, ("folder/", b"", {"type": tarfile.DIRTYPE}))
    path = write(tmp_path / "a.tar", members, format)
    assert contents(path) == [(name.removeprefix("./"), content) for name, content, _ in members if name != "folder/"]
    with open(path, "ab") as file:  # tar -b fills up to larger records
        file.write(bytes(50 * 512))
    assert len(contents(path)) == len(names)


REFUSED = [
    (("/etc/passwd", b"x"), "'/etc/passwd' has a name that is empty, absolute or leads out"),
    (("../a.jpg", b"x"), "leads out of the shard"),
    (("a/../../b.jpg", b"x"), "leads out of the shard"),
    (("a\\..\\b.jpg", b"x"), "leads out of the shard"),
    (("C:/b.jpg", b"x"), "absolute"),
    (("a.jpg", b"", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}), "'a.jpg' is a link"),
    (("a.jpg", b"", {"type": tarfile.LNKTYPE, "linkname": "b.jpg"}), "'a.jpg' is a link"),
    (("a.jpg", b"", {"type": tarfile.CHRTYPE}), "'a.jpg' is a device or another special file"),
    (("a.jpg", b"", {"type": tarfile.FIFOTYPE}), "'a.jpg' is a device or another"),
    (("a.jpg", b"", {"type": tarfile.GNUTYPE_SPARSE}), "'a.jpg' is a device or another special file"),
    (("a.jpg", b"", {"type": b"?"}), "special file .type b'.'"),
    (("a.jpg", b"x", {"pax_headers": {"GNU.sparse.major": "1"}}), "extended header with GNU.sparse.major"),
    (("a.jpg", b"x", {"pax_headers": {"comment": "x" * 20000}}), "extended header of 20[0-9]* bytes; more than"),
]


@pytest.mark.parametrize(("member", "message"), REFUSED)
def test_hostile_members_are_refused_by_name(tmp_path, member, message):
    path = write(tmp_path / "a.tar", [("good.jpg", b"x"), member])
    with pytest.raises(DataError, match=message) as caught:
        list(read_members(path))
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def set_size(path, field, start=0):
    """Gives a header another size field, and the checksum that belongs to it."""
    whole = bytearray(path.read_bytes())
    whole[start + 124 : start + 136] = field
    whole[start + 148 : start + 156] = b" " * 8
    whole[start + 148 : start + 156] = b"%06o\0 " % sum(whole[start : start + 512])
    path.write_bytes(whole)


def test_sizes_that_no_member_has(tmp_path):
    path = write(tmp_path / "a.tar", [("a.jpg", b"x")])
    for field, message in [
        (b"77777777777\0", "cut off, it should have 8589934591 bytes"),
        (b"\x80" + b"\xff" * 11, "cut off"),
        (b"\xff" * 12, "is no tar file"),  # a negative number
        (b"-0000000001\0", "is no tar file"),
    ]:
        set_size(path, field)
        with pytest.raises(DataError, match=message):
            list(read_members(path))
    with open(path, "r+b") as file:  # a hole: no room on the disk
        file.truncate(MAX_MEMBER_BYTES + 10240)
    set_size(path, b"%011o\0" % (MAX_MEMBER_BYTES + 1))
    with pytest.raises(DataError, match=f"'a.jpg' has {MAX_MEMBER_BYTES + 1} bytes; more than {MAX_MEMBER_BYTES}"):
        list(read_members(path))


def test_files_that_are_no_whole_tar(tmp_path):
    path = tmp_path / "a.tar"
    with pytest.raises(DataError, match="cannot be read .No such file"):
        list(read_members(path))
    whole = write(path, [("a.jpg", b"x" * 700), ("b.txt", b"y")]).read_bytes()
    end = 512 + 1024 + 512 + 512
    assert not any(whole[end:])
    for content, message in [
        (b"", "is empty"),
        (b"hello", "is no tar file"),
        (b"\x89PNG" + bytes(2000), "is no tar file"),
        (gzip.compress(whole), r"is no tar file; unpack a compressed one to a plain \.tar"),
        (whole[:1000], "'a.jpg': cut off, it should have 700 bytes"),
        (whole[:1700], "cut off at byte 1700"),
        (whole[:end], "cut off at byte 2560, its end mark is missing"),
        (whole[: end + 512], "within its end mark"),
        (whole + whole, "continues after its end mark"),
        (whole[:600] + b"!" + whole[601:1540] + b"!" + whole[1541:], "is damaged at byte 1536"),
    ]:
        path.write_bytes(content)
        with pytest.raises(DataError, match=message):
            list(read_members(path))


def test_times_in_gnus_headers_are_no_part_of_the_name(tmp_path):
    """GNU tar with -G writes the time of access where the ustar format has the front of a long name."""
    file = write(tmp_path / "a.tar", [("1.jpg", b"image"), ("1.txt", b"text")], tarfile.GNU_FORMAT)
    raw = bytearray(file.read_bytes())
    for start in (0, 1024):
        header = raw[start : start + 512]
        header[345:357] = b"07346545000\0"
        header[148:156] = b" " * 8
        header[148:156] = f"{sum(header):06o}\0 ".encode()
        raw[start : start + 512] = header
    file.write_bytes(raw)
    assert contents(file) == [("1.jpg", b"image"), ("1.txt", b"text")]
