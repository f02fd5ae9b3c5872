"""The rows of a table by shape class: one list on disk for a node, of which every bucket of every epoch is a part.

They do not depend on probabilities, batch sizes, seed or epoch, so the list is made once per table and set of shapes.
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
    """Sample ids, class by class, in ascending order within each."""

    ids: np.ndarray  # (n,) uint32
    start: np.ndarray  # (num_shape_classes + 1,) int64: where each shape class begins
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
        return ShapeClassIndex(ids, _sort(table, buckets, ids, np.empty(len(table), dtype=_class_dtype(buckets))))
    folder = build_once(
        table.index / f"kinds-{buckets.shape_class_key}",
        lambda aside: _write(table, buckets, aside),
        lambda target: verified(target, VERIFIED_BYTES),
    )
    sealed = Sealed(folder)
    sealed.check_segment(_START, 0)
    return ShapeClassIndex(sealed.map(_IDS).view(np.uint32), sealed.map(_START).view(np.int64), sealed)


def sorted_by(shape_class: np.ndarray, classes: int) -> ShapeClassIndex:
    """Rows by a class that is given for each, in memory. ``classes``: how many there are."""
    ids = np.argsort(shape_class, kind="stable").astype(np.uint32)
    return ShapeClassIndex(ids, np.concatenate([[0], np.cumsum(np.bincount(shape_class, minlength=classes))]))


def _write(table: ClipTable, buckets: BucketTable, folder: Path) -> None:
    ids = _room(folder / _IDS, len(table), np.uint32)
    shape_classes = _room(folder / "kinds.bin", len(table), _class_dtype(buckets))
    start = _sort(table, buckets, ids, shape_classes)
    ids.flush()
    (folder / "kinds.bin").unlink()
    (folder / _START).write_bytes(start.astype(np.int64).tobytes())
    seal(folder, {}, [_IDS, _START], {_START: [start.size * np.dtype(np.int64).itemsize]})


def _room(path: Path, rows: int, dtype: type) -> np.memmap:
    """(rows,) on disk, taken at once: a disk that is full says so now, and does not kill the process later."""
    with path.open("wb") as file:
        size = rows * np.dtype(dtype).itemsize
        file.truncate(size)
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except (AttributeError, OSError) as error:
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise  # else this system cannot promise room
    return np.memmap(path, dtype=dtype, mode="r+", shape=(rows,))


def _class_dtype(buckets: BucketTable) -> type:
    """16 bits are sorted digit by digit, several times faster than 32."""
    return np.uint16 if buckets.num_shape_classes < 1 << 16 else np.uint32


def _sort(table: ClipTable, buckets: BucketTable, ids: np.ndarray, shape_classes: np.ndarray) -> np.ndarray:
    """Fill ``ids`` and return where each shape class begins; ``shape_classes`` is room to work in.

    A counting sort, in chunks: count the shape classes of each, add up where they go, put them there.
    """
    rows = len(table)
    assert rows < 1 << 32
    chunks = [slice(first, min(first + _CHUNK, rows)) for first in range(0, rows, _CHUNK)]

    def count(chunk: slice) -> np.ndarray:
        table.check(chunk.start, chunk.stop)
        shape_classes[chunk] = buckets.shape_class_of(table, chunk)
        return np.bincount(shape_classes[chunk], minlength=buckets.num_shape_classes)

    def place(job: tuple[slice, np.ndarray]) -> None:
        chunk, first = job
        order = np.argsort(shape_classes[chunk], kind="stable")
        sorted_classes = shape_classes[chunk][order].astype(np.int64)
        here = np.concatenate([[0], np.cumsum(np.bincount(sorted_classes, minlength=buckets.num_shape_classes))])
        ids[first[sorted_classes] + np.arange(len(order)) - here[sorted_classes]] = order + chunk.start

    with ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1)) as pool:
        counts = np.array(list(pool.map(count, chunks)))  # (chunks, shape classes)
        start = np.concatenate([[0], np.cumsum(counts.sum(axis=0))])
        before = np.cumsum(counts, axis=0) - counts
        list(pool.map(place, zip(chunks, start[:-1] + before, strict=True)))
    return start
