"""Files that are there whole or as they were before, and reading that never waits. Standard library only."""

import contextlib
import errno
import os
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

MAX_SMALL = 1 << 28  # bytes of a file that is read in one go; one beyond this is not what it is taken for


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes the place of ``path`` when the block ends: written aside, flushed to the disk, renamed, the
    folder flushed. After an error in the block ``path`` is as it was, and nothing else is left.

    Raises:
        OSError: it cannot be written, or a folder is in its place.
    """
    # A part of the name, to be recognized by; 48 characters are at most 192 bytes, and a name has at most 255.
    aside = path.with_name(f".{path.name[:48]}.{uuid.uuid4().hex[:8]}")
    try:
        with open(aside, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(aside)
        raise
    flush(path.parent)


def flush(path: Path) -> None:
    """fsync a file or a directory."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_small(path: Path, most: int = MAX_SMALL) -> bytes:
    """The content of a regular file. A pipe or a device is not waited for.

    Raises:
        OSError: it cannot be read, is no regular file, or holds more than ``most`` bytes.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        about = os.fstat(handle)
        if not stat.S_ISREG(about.st_mode):
            raise OSError(errno.EINVAL, f"{kind_of(about.st_mode)}, and should be a file")
        if about.st_size > most:
            raise OSError(errno.EFBIG, f"{about.st_size} bytes, more than the {most} that such a file can have")
        with open(handle, "rb", closefd=False) as file:
            return file.read()
    finally:
        os.close(handle)


def require_file(path: Path) -> Path:
    """``path``, before a library opens it that would wait for a pipe.

    Raises:
        OSError: nothing is there, or no regular file.
    """
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, f"{kind_of(mode)}, and should be a file")
    return path


def kind_of(mode: int) -> str:
    """What ``stat`` says is there, in words."""
    kinds = {stat.S_ISREG: "a file", stat.S_ISDIR: "a folder", stat.S_ISFIFO: "a pipe", stat.S_ISSOCK: "a socket"}
    return next((words for test, words in kinds.items() if test(mode)), "a device")
