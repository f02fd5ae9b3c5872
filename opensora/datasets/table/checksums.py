"""Folders that are built once and mapped, in which no damaged byte is used: every one is under a checksum.

    index.json      what the builder says about the folder, the size of every file, and its own digest
    checksums.bin   of all files, segment by segment: where it ends (int64), then its CRC-32 (uint32)

Opening a folder verifies these two whole and compares sizes, which takes milliseconds whatever the folder holds. A
segment of another file is verified when a process first uses it (``Sealed.check``), or all of them at once
(``Sealed.verify``). CRC-32 notices every flipped bit and every run of up to 32, and 2.7 GB/s of it fit through a core.
"""

import contextlib
import hashlib
import json
import os
import stat
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from opensora.utils.errors import UserError
from opensora.utils.files.untrusted import parse_json, parsing

ABOUT, CHECKSUMS = "index.json", "checksums.bin"
SEGMENT_BYTES = 1 << 14  # where a file has no segments of its own; one sample reads one of each column
_END, _CRC = np.dtype("<i8"), np.dtype("<u4")
_MOST_THREADS = 16
_MOST_ABOUT = 1 << 28  # bytes of index.json: a hundred for each table file and part of the texts


class Damaged(UserError):
    """A file of a sealed folder is not as it was written."""

    def __init__(self, file: Path, problem: str) -> None:
        super().__init__(f"{file}: {problem}; start again, and it is built anew")
        self.problem = f"{file.name}: {problem}"


def seal(folder: Path, about: Mapping[str, Any], files: Sequence[str], ends: Mapping[str, Sequence[int]]) -> None:
    """Put all ``files`` of a folder under checksums; afterwards it is complete.

    Args:
        about: what the builder has to say; JSON.
        ends: where the segments of a file end, of those files that have segments of their own.
    """
    with ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1)) as pool:
        segments = list(pool.map(lambda name: _segments(folder / name, ends.get(name)), files))
    sizes = {name: int(end[-1]) if len(end) else 0 for name, (end, _) in zip(files, segments, strict=True)}
    checksums = b"".join(np.concatenate(column).tobytes() for column in zip(*segments, strict=True))
    (folder / CHECKSUMS).write_bytes(checksums)
    listed = [[name, sizes[name], len(end)] for name, (end, _) in zip(files, segments, strict=True)]
    whole = dict(about) | {"files": listed, "checksums": _digest(checksums)}
    (folder / ABOUT).write_bytes(_render(whole | {"digest": _digest(_render(whole))}))


class Sealed:
    """An open folder. ``check`` what is used before it is used; segments are verified once per process."""

    def __init__(self, folder: Path) -> None:
        """
        Raises:
            Damaged: index.json or checksums.bin are not as they were written, or a file is missing, no file, or of
                another size.
        """
        self.folder = folder
        self.about, self._identity = _read_about(folder / ABOUT)
        with _facts_about(folder / ABOUT):
            listed = [(str(name), int(size), int(count)) for name, size, count in self.about["files"]]
            digest = self.about["checksums"]
        count = sum(segments for *_, segments in listed)
        checksums = _mapped(folder / CHECKSUMS, count * (_END.itemsize + _CRC.itemsize))
        if _digest(checksums.data) != digest:
            raise Damaged(folder / CHECKSUMS, "not the bytes that were written")
        ends, crcs = checksums[: count * _END.itemsize].view(_END), checksums[count * _END.itemsize :].view(_CRC)
        self.bytes = sum(size for _, size, _ in listed)  # of all files together
        self._files: dict[str, _File] = {}
        first = 0
        for name, size, segments in listed:
            part = slice(first, first + segments)
            self._files[name] = _File(_mapped(folder / name, size), ends[part], crcs[part], np.zeros(segments, bool))
            first += segments

    def map(self, name: str) -> np.ndarray:
        """(size,) uint8: the bytes of a file, where they lie."""
        return self._files[name].bytes

    def check(self, name: str, first: int, last: int) -> None:
        """Verify what of the bytes [first, last) of a file this process has not verified yet.

        Raises:
            Damaged: they are not as they were written. Who opens the folder next finds it damaged, too.
        """
        ends = self._files[name].ends
        begin, end = np.searchsorted(ends, [first, last - 1], side="right")
        self._check(name, np.arange(begin, end + 1))

    def check_at(self, name: str, places: np.ndarray) -> None:
        """The same for the bytes at ``places``."""
        self._check(name, np.unique(np.searchsorted(self._files[name].ends, places, side="right")))

    def check_segment(self, name: str, number: int) -> None:
        """The same for one segment; -1: the last."""
        self._check(name, np.array([number % len(self._files[name].ends)]))

    def verify(self) -> None:
        """Verify every file whole; for who builds the folder anew at once.

        Raises:
            Damaged: one is not as it was written.
        """
        for name, file in self._files.items():
            self._check(name, np.arange(len(file.ends)), condemn=False)

    def _check(self, name: str, segments: np.ndarray, *, condemn: bool = True) -> None:
        file = self._files[name]
        for segment in segments[~file.verified[segments]].tolist():
            begin, end = int(file.ends[segment - 1]) if segment else 0, int(file.ends[segment])
            if zlib.crc32(file.bytes[begin:end].data) != file.crcs[segment]:
                if condemn:
                    self._condemn()
                raise Damaged(self.folder / name, f"bytes {begin} to {end - 1} are not those that were written")
            file.verified[segment] = True

    def _condemn(self) -> None:
        """Without its index.json a folder is damaged to everybody; not if another one has taken its place."""
        with contextlib.suppress(OSError):
            if os.stat(self.folder / ABOUT).st_ino == self._identity:
                os.rename(self.folder / ABOUT, self.folder / f"{ABOUT}.damaged")


@dataclass(frozen=True)
class _File:
    bytes: np.ndarray  # (size,) uint8, mapped
    ends: np.ndarray  # (segments,) int64
    crcs: np.ndarray  # (segments,) uint32
    verified: np.ndarray  # (segments,) bool: by this process


def verified(folder: Path, most_bytes: int) -> Sealed:
    """Open a folder, and verify it whole if it has at most so many bytes; what is larger is verified as it is used.

    Raises:
        Damaged: see ``Sealed``.
    """
    sealed = Sealed(folder)
    if sealed.bytes <= most_bytes:
        sealed.verify()
    return sealed


def _segments(file: Path, ends: Sequence[int] | None) -> tuple[np.ndarray, np.ndarray]:
    """((n,) where the segments of a file end, (n,) their CRC-32)."""
    size = file.stat().st_size
    if ends is None:
        ends = [*range(SEGMENT_BYTES, size, SEGMENT_BYTES), *([size] if size else [])]
    assert not len(ends) or ends[-1] == size, (file, size)
    crcs, begin = np.empty(len(ends), dtype=_CRC), 0
    with file.open("rb") as opened:
        for number, end in enumerate(ends):
            crcs[number] = zlib.crc32(opened.read(end - begin))
            begin = end
    return np.array(ends, dtype=_END), crcs


def _read_about(file: Path) -> tuple[dict[str, Any], int]:
    """What index.json says, and the number of the file it was read from."""
    _check_regular(file)
    with _facts_about(file), file.open("rb") as opened:
        identity, raw = os.fstat(opened.fileno()).st_ino, opened.read(_MOST_ABOUT + 1)
    if len(raw) > _MOST_ABOUT:
        raise Damaged(file, f"more than {_MOST_ABOUT} bytes")
    about = parse_json(raw, lambda reason: Damaged(file, reason))
    if not isinstance(about, dict):
        raise Damaged(file, "not the bytes that were written")
    with _facts_about(file):
        as_read = _render(about)
        digest = about.pop("digest", None)
        wanted = _digest(_render(about))
    if as_read != raw or digest != wanted:
        raise Damaged(file, "not the bytes that were written")
    return about, identity


def _render(about: Mapping[str, Any]) -> bytes:
    return json.dumps(about, indent=1).encode()


def _digest(data: Any) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _mapped(file: Path, size: int) -> np.ndarray:
    """(size,) uint8 of a file that has this size; memory that nobody fills in until it is touched."""
    found = _check_regular(file)
    if found != size:
        raise Damaged(file, f"{found} bytes, {size} were written")
    if size == 0:
        return np.empty(0, dtype=np.uint8)
    with _facts_about(file):
        return np.memmap(file, dtype=np.uint8, mode="r", shape=(size,))


def _check_regular(file: Path) -> int:
    """The size of a file; to open a pipe would take for ever."""
    with _facts_about(file):
        found = file.stat()
    if not stat.S_ISREG(found.st_mode):
        raise Damaged(file, "not a regular file")
    return found.st_size


def _facts_about(file: Path) -> parsing:
    def refuse(reason: str) -> Exception:
        return Damaged(file, reason)

    return parsing(refuse)
