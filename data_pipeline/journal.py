"""What is done of a shard that is not whole yet: one record per source, so that a killed process costs one source.

A record is its length and checksum, a line of JSON and the rows as Arrow writes them. Whatever a crash left behind the
last whole record is cut off. The journal goes when the shard's output is there. It is locked while a process works on
the shard, so that two that were given the same one do not write into each other.
"""

import contextlib
import json
import os
import struct
import sys
import zlib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa

from data_pipeline.outputs import Done
from data_pipeline.rows import from_bytes, to_bytes
from opensora.utils.command_line.command import naming

_HEAD = struct.Struct("<II")  # length of what follows, its CRC-32
_LOST = "lost"


class ShardTaken(Exception):
    """Another process works on this shard."""


class Journal:
    """Records of one stage, shard and key."""

    def __init__(self, path: Path) -> None:
        """
        Raises:
            ShardTaken: another process has it open.
            OSError: it cannot be written.
        """
        self._path = path
        self.done: dict[str, tuple[Done, pa.Table]] = {}  # by the key of the unit
        self.lost: dict[str, list[str]] = {}  # by the key of the unit: how its worker processes died, in a row
        with naming(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._open()
            self._file.seek(0)
            end = sum(self._replay())
            self._file.truncate(end)
            self._file.seek(end)

    def add(self, done: Done, rows: pa.Table) -> None:
        """Raises: OSError: it cannot be written, as on a full disk."""
        self.done[done.key] = (done, rows)
        self.lost.pop(done.key, None)
        self._append({"done": asdict(done)}, to_bytes(rows))

    def add_lost(self, key: str, reason: str) -> list[str]:
        """A worker process died while it worked on this unit. Returns how those before did, this one the last."""
        reasons = self.lost.setdefault(key, [])
        reasons.append(reason)
        self._append({_LOST: key, "reason": reason}, b"")
        return reasons

    def close(self, *, remove: bool = False) -> None:
        """``remove``: what is in it is elsewhere now."""
        if remove:
            with contextlib.suppress(OSError):
                os.unlink(self._path)
        with contextlib.suppress(OSError):  # on a full disk: the last record is not whole, and is made again
            self._file.close()

    def _open(self) -> None:
        """Again, if whoever had it has removed it just before it could be locked."""
        while True:
            self._file = open(self._path, "a+b")  # noqa: SIM115  (closed by close)
            self._lock()
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(self._file.fileno()), os.stat(self._path)):
                    return
            self._file.close()

    def _lock(self) -> None:
        if sys.platform == "win32":  # where nobody else has the shard
            return
        import fcntl

        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.close()
            raise ShardTaken(str(self._path)) from error
        except OSError:  # a file system without locks: two write the same records, and the output is one of the two
            pass

    def _append(self, head: dict, rows: bytes) -> None:
        content = json.dumps(head).encode() + b"\n" + rows
        with naming(self._path):
            self._file.write(_HEAD.pack(len(content), zlib.crc32(content)) + content)
            self._file.flush()

    def _replay(self) -> Iterator[int]:
        """Reads record after record; the size of each that is whole."""
        while len(head := self._file.read(_HEAD.size)) == _HEAD.size:
            size, crc = _HEAD.unpack(head)
            content = self._file.read(size)
            if not size or len(content) != size or zlib.crc32(content) != crc:
                return  # nothing but zeros is what a power cut can leave
            line, _, rows = content.partition(b"\n")
            about = json.loads(line)
            if _LOST in about:
                self.lost.setdefault(about[_LOST], []).append(about["reason"])
            else:
                done = Done.of(about["done"])
                self.done[done.key] = (done, from_bytes(rows))
                self.lost.pop(done.key, None)
            yield _HEAD.size + size
