"""An mp4 that says of itself that it is whole: its last box holds the SHA-256 of all before it.

Players pass over boxes that they do not know. A clip that is there already is looked at, and not made again; one that
was damaged is.
"""

import hashlib
from pathlib import Path
from typing import IO, NamedTuple
from uuid import UUID

_KIND = UUID("6b1ce0c2-4c53-4f0e-9a55-0d1c6a5bd7f2").bytes  # of this box, as the format has it for others' boxes
_HEAD = (8 + len(_KIND) + 32).to_bytes(4, "big") + b"uuid" + _KIND
_BOX_BYTES = len(_HEAD) + 32
_BLOCK = 1 << 20


class FileFacts(NamedTuple):
    """Of a whole file, box and all."""

    bytes: int
    sha256: str


def close_with_digest(path: Path) -> FileFacts:
    """Add the box to an mp4 that has none yet.

    Raises:
        OSError: it cannot be written.
    """
    with path.open("r+b") as file:
        digest = hashlib.sha256()
        size = _feed(digest, file, None)
        box = _HEAD + digest.digest()
        digest.update(box)
        file.write(box)
    return FileFacts(size + len(box), digest.hexdigest())


def whole_file(file: IO[bytes], size: int) -> FileFacts | None:
    """Of a file of so many bytes; None: it is not as it was written."""
    if size <= _BOX_BYTES:
        return None
    digest = hashlib.sha256()
    if _feed(digest, file, size - _BOX_BYTES) != size - _BOX_BYTES:
        return None
    box = file.read(_BOX_BYTES + 1)
    if box != _HEAD + digest.digest():
        return None
    digest.update(box)
    return FileFacts(size, digest.hexdigest())


def _feed(digest: "hashlib._Hash", file: IO[bytes], most: int | None) -> int:
    """As many bytes as there are, or ``most``."""
    count = 0
    while block := file.read(_BLOCK if most is None else min(_BLOCK, most - count)):
        digest.update(block)
        count += len(block)
    return count
