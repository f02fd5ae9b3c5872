"""Where a clip's bytes are: a file of its own, or a range of an archive, which is read in place.

A path of the clip table is one of

* ``clips/a.mp4``: a file;
* ``shard-000.tar#a.mp4``: a member of a tar or of a zip that stores without compression. The archive's directory is
  read once per process;
* ``shard-000.tar#a.mp4@1536+20480``: 20480 bytes from byte 1536 on, of any file. Nothing is looked up.

The name behind ``#`` says what kind of file it is.
"""

import io
import os
import re
import stat
import struct
import tarfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import BinaryIO, cast

from opensora.datasets.decode.common import DecodeError, decoding
from opensora.utils.files.untrusted import short_reason

# Digits as a program writes them: \d would match those of other scripts too.
_RANGE = re.compile(r"(?P<file>.+)#(?P<name>[^#]+)@(?P<offset>[0-9]+)\+(?P<size>[0-9]+)", re.DOTALL)
_MEMBER = re.compile(r"(?P<file>.+?\.(?:tar|zip))#(?P<name>.+)", re.IGNORECASE | re.DOTALL)
_MOST_DIGITS = 18  # of a place in a file: more is beyond 2^63
_ZIP_HEADER = struct.Struct("<4s22xHH")  # of a member: signature, lengths of its name and of its extra field
_ZIP_SIGNATURE = b"PK\3\4"
_DIRECTORIES = 64  # archives whose directory a process remembers

Members = dict[str, tuple[int, int] | None]


@dataclass(frozen=True)
class Source:
    """A checked place: ``size`` bytes of ``file`` from ``offset`` on; None: the whole file."""

    path: str  # as the clip table has it
    file: str
    offset: int = 0
    size: int | None = None

    @property
    def kind(self) -> str:
        """The suffix in lower case, with its dot."""
        return os.path.splitext(re.sub(r"@[0-9]+\+[0-9]+$", "", self.path))[1].lower()

    def open(self) -> BinaryIO:
        """The bytes as a file; seekable.

        Raises:
            DecodeError: they cannot be read.
        """
        try:
            if self.size is None:
                return open(self.file, "rb")
            return cast(BinaryIO, io.BufferedReader(_RangeFile(self.file, self.offset, self.size)))
        except OSError as error:
            raise DecodeError(self.path, short_reason(error)) from error


def locate(path: str) -> Source:
    """Find the bytes of a path.

    Raises:
        DecodeError: nothing there, no regular file (opening a pipe or a device would block for ever), nothing in it,
            no such member, or one that does not lie there as it is (compressed, encrypted, sparse, a link).
    """
    parts = None if os.path.exists(path) else _RANGE.fullmatch(path) or _MEMBER.fullmatch(path)
    if parts is None:
        _regular(path, path)
        return Source(path, path)
    file = parts["file"]
    status = _regular(path, file)
    if "offset" in parts.groupdict():
        place = _range_of(path, parts)
    else:
        try:
            members = _directory(file, status.st_mtime_ns, status.st_size)
        except DecodeError as error:
            raise DecodeError(path, f"{file}: {error.cause}") from error
        place = _place_of(path, parts["name"], members)
    offset, size = place
    if offset + size > status.st_size:
        raise DecodeError(path, f"{file} has {status.st_size} bytes, the range ends at {offset + size}")
    if size <= 0 or offset < 0:
        raise DecodeError(path, f"a range of {size} bytes from {offset} on holds nothing")
    return Source(path, file, offset, size)


def _range_of(path: str, parts: re.Match[str]) -> tuple[int, int]:
    for name in ("offset", "size"):
        if len(parts[name]) > _MOST_DIGITS:
            raise DecodeError(path, f"the {name} of its range has {len(parts[name])} digits, no file is that large")
    return int(parts["offset"]), int(parts["size"])


def _place_of(path: str, name: str, members: Members) -> tuple[int, int]:
    if name not in members:
        raise DecodeError(path, f"the archive has no member {name}")
    place = members[name]
    if place is None:
        how = "compressed, encrypted, sparse or a link"
        raise DecodeError(path, f"the member is {how}; store it as it is (tar, or zip -0)")
    return place


def archive_members(file: str) -> Mapping[str, tuple[int, int] | None]:
    """(offset, size) of every member of a tar or zip by name, None for one that does not lie there as it is.

    ``f"{file}#{name}@{offset}+{size}"`` is the path of a member that needs no look-up.

    Raises:
        DecodeError: it cannot be read as an archive.
    """
    status = _regular(file, file)
    return _directory(file, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=_DIRECTORIES)
def _directory(file: str, changed_ns: int, size: int) -> Members:
    """The last two arguments make an archive that was written anew another one."""
    return _tar_members(file) if file.lower().endswith(".tar") else _zip_members(file)


def _tar_members(file: str) -> Members:
    found: Members = {}
    at = -1
    with decoding(file), tarfile.open(file, "r:") as tar:
        while (member := tar.next()) is not None:
            if member.offset <= at:  # a negative size: reading it would never end
                raise DecodeError(file, f"a member at byte {at} has a size below zero")
            at = member.offset
            if not member.isdir():
                as_it_is = member.isreg() and not member.issparse()
                found[member.name] = (member.offset_data, member.size) if as_it_is else None
    return found


def _zip_members(file: str) -> Members:
    found: Members = {}
    with decoding(file), zipfile.ZipFile(file) as archive, open(file, "rb") as raw:
        for info in archive.infolist():
            raw.seek(info.header_offset)
            signature, name_length, extra_length = _ZIP_HEADER.unpack(raw.read(_ZIP_HEADER.size))
            if signature != _ZIP_SIGNATURE:
                raise DecodeError(file, f"no member begins at byte {info.header_offset}, where its directory says so")
            start = info.header_offset + _ZIP_HEADER.size + name_length + extra_length
            encrypted = info.flag_bits & 1
            as_it_is = info.compress_type == zipfile.ZIP_STORED and not encrypted
            found[info.filename] = (start, info.file_size) if as_it_is else None
    return found


def _regular(path: str, file: str) -> os.stat_result:
    try:
        status = os.stat(file)
    except (OSError, ValueError) as error:  # ValueError: a NUL, or half of a surrogate pair
        raise DecodeError(path, short_reason(error)) from error
    if not stat.S_ISREG(status.st_mode):
        raise DecodeError(path, "a folder, not a file" if stat.S_ISDIR(status.st_mode) else "not a regular file")
    if status.st_size == 0:  # so are the files that a kernel makes up, which need not end
        raise DecodeError(path, "an empty file")
    return status


class _RangeFile(io.RawIOBase):
    """A range of a file that looks like a file."""

    def __init__(self, file: str, offset: int, size: int) -> None:
        self._file = open(file, "rb", buffering=0)  # noqa: SIM115  (closed with this one)
        self._offset, self._size, self._at = offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        wanted = max(0, min(len(buffer), self._size - self._at))
        data = os.pread(self._file.fileno(), wanted, self._offset + self._at)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()
