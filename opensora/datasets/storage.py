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

from opensora.datasets.frames import DecodeError, short_reason

_RANGE = re.compile(r"(?P<file>.+)#(?P<name>[^#]+)@(?P<offset>\d+)\+(?P<size>\d+)")
_MEMBER = re.compile(r"(?P<file>.+?\.(?:tar|zip))#(?P<name>.+)", re.IGNORECASE)
_ZIP_HEADER = struct.Struct("<26xHH")  # of a member: lengths of its name and of its extra field
_DIRECTORIES = 64  # archives whose directory a process remembers


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
        return os.path.splitext(re.sub(r"@\d+\+\d+$", "", self.path))[1].lower()

    def open(self) -> BinaryIO:
        """The bytes as a file; seekable."""
        if self.size is None:
            return open(self.file, "rb")
        return cast(BinaryIO, io.BufferedReader(_RangeFile(self.file, self.offset, self.size)))


def locate(path: str) -> Source:
    """Find the bytes of a path.

    Raises:
        DecodeError: nothing there, no regular file (opening a pipe or a device would block for ever), no such member,
            or a compressed one.
    """
    parts = None if os.path.exists(path) else _RANGE.fullmatch(path) or _MEMBER.fullmatch(path)
    if parts is None:
        _regular(path, path)
        return Source(path, path)
    file = parts["file"]
    status = _regular(path, file)
    if "offset" in parts.groupdict():
        offset, size = int(parts["offset"]), int(parts["size"])
        if offset + size > status.st_size:
            raise DecodeError(path, f"{file} has {status.st_size} bytes, the range ends at {offset + size}")
        return Source(path, file, offset, size)
    try:
        directory = _directory(file, status.st_mtime_ns, status.st_size)
    except (tarfile.TarError, zipfile.BadZipFile, OSError, EOFError) as error:
        raise DecodeError(path, f"{file}: {short_reason(error)}") from error
    if parts["name"] not in directory:
        raise DecodeError(path, f"{file} has no member {parts['name']}")
    place = directory[parts["name"]]
    if place is None:
        raise DecodeError(path, "the member is compressed; store it (zip -0), so that it can be read in place")
    return Source(path, file, *place)


def archive_members(file: str) -> Mapping[str, tuple[int, int] | None]:
    """(offset, size) of every member of a tar or zip by name, None for a compressed one.

    ``f"{file}#{name}@{offset}+{size}"`` is the path of a member that needs no look-up.
    """
    status = os.stat(file)
    return _directory(file, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=_DIRECTORIES)
def _directory(file: str, changed_ns: int, size: int) -> dict[str, tuple[int, int] | None]:
    """The last two arguments make an archive that was written anew another one."""
    if file.lower().endswith(".tar"):
        with tarfile.open(file, "r:") as tar:
            return {member.name: (member.offset_data, member.size) for member in tar if member.isreg()}
    found: dict[str, tuple[int, int] | None] = {}
    with zipfile.ZipFile(file) as archive, open(file, "rb") as raw:
        for info in archive.infolist():
            raw.seek(info.header_offset)
            name_length, extra_length = _ZIP_HEADER.unpack(raw.read(_ZIP_HEADER.size))
            start = info.header_offset + _ZIP_HEADER.size + name_length + extra_length
            stored = info.compress_type == zipfile.ZIP_STORED and not info.flag_bits & 1  # bit 0: encrypted
            found[info.filename] = (start, info.file_size) if stored else None
    return found


def _regular(path: str, file: str) -> os.stat_result:
    try:
        status = os.stat(file)
    except OSError as error:
        raise DecodeError(path, short_reason(error)) from error
    if not stat.S_ISREG(status.st_mode):
        raise DecodeError(path, "not a regular file")
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
