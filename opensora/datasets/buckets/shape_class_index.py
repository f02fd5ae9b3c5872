"""The rows of a table sorted by kind: one list on disk for a node, of which every bucket of every epoch is a part.

Kinds do not depend on probabilities, batch sizes, seed or epoch, so the list is made once per table and set of shapes.
"""

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from opensora.datasets.buckets.bucket import BucketTable
from opensora.datasets.table.build_once import build_once
from opensora.datasets.table.checksums import Sealed, seal, verified
from opensora.datasets.table.index import VERIFIED_BYTES, IndexedTable
from opensora.datasets.table.manifest import ClipTable

_IDS, _START = "ids.bin", "start.bin"
_CHUNK = 1 << 20
_MOST_THREADS = 16


@dataclass(frozen=True)
class ShapeClassIndex:
    """Sample ids, kind by kind, in ascending order within each."""

    ids: np.ndarray  # (n,) uint32
    start: np.ndarray  # (kinds + 1,) int64: where each kind begins
    sealed: Sealed | None = None  # where they are files

    def take(self, places: np.ndarray) -> np.ndarray:
        """(n,) the ids at these places. Raises: UserError: they are damaged on disk."""
        if self.sealed is not None:
            self.sealed.check_at(_IDS, places * self.ids.itemsize)
        return self.ids[places]


def index_shape_classes(table: ClipTable, buckets: BucketTable) -> ShapeClassIndex:
    """Sort the rows; of an indexed table on disk beside it, once. Any number of processes may call this at once."""
    if not isinstance(table, IndexedTable):
        ids = np.empty(len(table), dtype=np.uint32)
        return ShapeClassIndex(ids, _sort(table, buckets, ids, np.empty(len(table), dtype=_kind_type(buckets))))
    folder = build_once(
        table.index / f"kinds-{buckets.kind_key}",
        lambda aside: _write(table, buckets, aside),
        lambda target: verified(target, VERIFIED_BYTES),
    )
    sealed = Sealed(folder)
    sealed.check_segment(_START, 0)
    return ShapeClassIndex(sealed.map(_IDS).view(np.uint32), sealed.map(_START).view(np.int64), sealed)


def _write(table: ClipTable, buckets: BucketTable, folder: Path) -> None:
    ids = _room(folder / _IDS, len(table), np.uint32)
    kinds = _room(folder / "kinds.bin", len(table), _kind_type(buckets))
    start = _sort(table, buckets, ids, kinds)
    ids.flush()
    (folder / "kinds.bin").unlink()
    (folder / _START).write_bytes(start.astype(np.int64).tobytes())
    seal(folder, {}, [_IDS, _START], {_START: [start.size * np.dtype(np.int64).itemsize]})


def _room(path: Path, rows: int, kind: type) -> np.memmap:
    """(rows,) on disk, taken at once: a disk that is full says so now, and does not kill the process later."""
    with path.open("wb") as file:
        size = rows * np.dtype(kind).itemsize
        file.truncate(size)
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except (AttributeError, OSError) as error:
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise  # else this system cannot promise room
    return np.memmap(path, dtype=kind, mode="r+", shape=(rows,))


def _kind_type(buckets: BucketTable) -> type:
    """16 bits are sorted digit by digit, several times faster than 32."""
    return np.uint16 if buckets.kinds < 1 << 16 else np.uint32


def _sort(table: ClipTable, buckets: BucketTable, ids: np.ndarray, kinds: np.ndarray) -> np.ndarray:
    """Fill ``ids`` and return where each kind begins; ``kinds`` is room to work in.

    A counting sort, in chunks: count the kinds of each, add up where they go, put them there.
    """
    rows = len(table)
    assert rows < 1 << 32
    chunks = [slice(first, min(first + _CHUNK, rows)) for first in range(0, rows, _CHUNK)]

    def count(chunk: slice) -> np.ndarray:
        table.check(chunk.start, chunk.stop)
        kinds[chunk] = buckets.kind_of(table, chunk)
        return np.bincount(kinds[chunk], minlength=buckets.kinds)

    def place(job: tuple[slice, np.ndarray]) -> None:
        chunk, first = job
        order = np.argsort(kinds[chunk], kind="stable")
        sorted_kinds = kinds[chunk][order].astype(np.int64)
        here = np.concatenate([[0], np.cumsum(np.bincount(sorted_kinds, minlength=buckets.kinds))])
        ids[first[sorted_kinds] + np.arange(len(order)) - here[sorted_kinds]] = order + chunk.start

    with ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1)) as pool:
        counts = np.array(list(pool.map(count, chunks)))  # (chunks, kinds)
        start = np.concatenate([[0], np.cumsum(counts.sum(axis=0))])
        before = np.cumsum(counts, axis=0) - counts
        list(pool.map(place, zip(chunks, start[:-1] + before, strict=True)))
    return start
