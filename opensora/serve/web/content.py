"""Bytes of a whole file: all, or the range that a player asks for. The file is opened before anything is answered, so
that a video which is deleted meanwhile is still sent to its end.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from opensora.serve.refusal import Refused

CHUNK = 1 << 18
_RANGE = re.compile(r"bytes=([0-9]{0,18})-([0-9]{0,18})")


@dataclass
class Sent:
    """What is answered; whoever sends it closes the file."""

    status: int  # 200, 206 or 304
    headers: Mapping[str, str]
    file: BinaryIO
    start: int
    count: int  # bytes from start on

    def next(self) -> bytes:
        """The next piece; b"": there is none."""
        self.file.seek(self.start)
        piece = self.file.read(min(CHUNK, self.count))
        self.start, self.count = self.start + len(piece), self.count - len(piece)
        return piece


def open_content(path: Path, media_type: str, asked: Mapping[str, str]) -> Sent:
    """
    Args:
        asked: headers of the request, by small letters: Range, If-Range, If-None-Match.

    Raises:
        Refused: 416, a range that is not there; 404, the file is gone.
    """
    try:
        file = open(path, "rb")  # noqa: SIM115  (closed by whoever sends it)
    except FileNotFoundError:
        raise Refused(404, "this file is gone", code="not_found") from None
    facts = os.fstat(file.fileno())
    size, tag = facts.st_size, f'"{facts.st_mtime_ns:x}-{facts.st_size:x}"'
    headers = {
        "Content-Type": media_type,
        "ETag": tag,
        "Accept-Ranges": "bytes",
        "Cache-Control": "private, no-cache",
        "Content-Disposition": f'inline; filename="{path.name}"',
    }
    if tag in asked.get("if-none-match", "") or asked.get("if-none-match") == "*":
        file.close()
        return Sent(304, headers, file, 0, 0)
    wanted = asked.get("range", "") if asked.get("if-range", tag) == tag else ""
    try:
        start, stop = _range(wanted, size)
    except Refused:
        file.close()
        raise
    headers["Content-Length"] = str(stop - start)
    if stop - start < size:
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
    return Sent(206 if stop - start < size else 200, headers, file, start, stop - start)


def _range(wanted: str, size: int) -> tuple[int, int]:
    """(first byte, byte behind the last). All of it where no range is asked for, or several are, as a server may."""
    found = _RANGE.fullmatch(wanted.strip())
    if not found or found[1] == found[2] == "":
        return 0, size
    if found[1] == "":  # the last ones
        start, stop = max(0, size - int(found[2])), size
    else:
        start = int(found[1])
        stop = min(size, int(found[2]) + 1) if found[2] else size
        if found[2] and int(found[2]) < start:
            return 0, size  # none that can be read
    if start >= stop:
        raise Refused(416, "Range: behind the end", code="invalid_range", headers={"Content-Range": f"bytes */{size}"})
    return start, stop
