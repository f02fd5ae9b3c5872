"""Writes one file of a checkpoint and proves that it is on the disk. Standard library only.

As a program it is the process that saves while training goes on: requests come as JSON lines on stdin, answers go to
stdout in the same order. The bytes to write are in memory that the training process shares by a path.
"""

import ctypes
import hashlib
import json
import os
import signal
import sys
from collections.abc import Iterable, Iterator
from typing import Any

CHUNK = 1 << 24
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def write(path: str, parts: Iterable[Any]) -> dict[str, Any]:
    """Write the parts one after the other, flush them to the disk, read the file back: its size and SHA-256.

    Raises:
        OSError: the disk is full, gone, or did not keep what it was given.
    """
    digest, size = hashlib.sha256(), 0
    with open(path, "xb", buffering=0) as file:
        for part in parts:
            view = memoryview(part).cast("B")
            while len(view):
                written = file.write(view[:CHUNK])
                digest.update(view[:written])
                view, size = view[written:], size + written
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):  # what is read back should come from the disk, not from memory
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    found = digest_of(path)
    if found != digest.hexdigest() or os.path.getsize(path) != size:
        raise OSError(f"{path}: what was read back is not what was written")
    return {"size": size, "sha256": found}


def digest_of(path: str) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file: Any) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(CHUNK):
        digest.update(chunk)
    return digest.hexdigest()


def _memory(path: str, size: int) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while size:
            chunk = file.read(min(CHUNK, size))
            if not chunk:
                raise OSError(f"{path}: {size} bytes less than there should be")
            size -= len(chunk)
            yield chunk


def main() -> None:
    """Serve requests until stdin ends, which it does when the training process does.

    Nobody would commit what is written then, and a process that is stopped would never see it: SIGKILL comes instead.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = write(request["path"], _memory(request["memory"], request["size"]))
        except OSError as error:
            answer = {"errno": error.errno, "error": f"{error.strerror or error}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
