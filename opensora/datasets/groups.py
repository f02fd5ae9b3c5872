"""The rows of a table sorted by kind: one list on disk for a node, of which every bucket of every epoch is a part.

Kinds do not depend on probabilities, batch sizes, seed or epoch, so the list is made once per table and set of shapes.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from os import cpu_count
from pathlib import Path

import numpy as np

from opensora.datasets.bucket import BucketTable
from opensora.datasets.index import IndexedTable
from opensora.datasets.manifest import ClipTable
from opensora.datasets.once import build_once

_CHUNK = 1 << 20
_MOST_THREADS = 16


@dataclass(frozen=True)
class Groups:
    """Sample ids, kind by kind, in ascending order within each."""

    ids: np.ndarray  # (n,) uint32
    start: np.ndarray  # (kinds + 1,) int64: where each kind begins


def group_rows(table: ClipTable, buckets: BucketTable) -> Groups:
    """Sort the rows; of an indexed table on disk beside it, once. Any number of processes may call this at once."""
    if not isinstance(table, IndexedTable):
        ids = np.empty(len(table), dtype=np.uint32)
        return Groups(ids, _sort(table, buckets, ids, np.empty(len(table), dtype=_kind_type(buckets))))
    folder = build_once(table.index / f"kinds-{buckets.kind_key}", lambda aside: _write(table, buckets, aside))
    return Groups(np.memmap(folder / "ids.bin", dtype=np.uint32, mode="r"), np.load(folder / "start.npy"))


def _write(table: ClipTable, buckets: BucketTable, folder: Path) -> None:
    shape = (len(table),)
    ids = np.memmap(folder / "ids.bin", dtype=np.uint32, mode="w+", shape=shape)
    kinds = np.memmap(folder / "kinds.bin", dtype=_kind_type(buckets), mode="w+", shape=shape)
    np.save(folder / "start.npy", _sort(table, buckets, ids, kinds))
    (folder / "kinds.bin").unlink()


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
        kinds[chunk] = buckets.kind_of(table, chunk)
        return np.bincount(kinds[chunk], minlength=buckets.kinds)

    def place(job: tuple[slice, np.ndarray]) -> None:
        chunk, first = job
        order = np.argsort(kinds[chunk], kind="stable")
        sorted_kinds = kinds[chunk][order].astype(np.int64)
        here = np.concatenate([[0], np.cumsum(np.bincount(sorted_kinds, minlength=buckets.kinds))])
        ids[first[sorted_kinds] + np.arange(len(order)) - here[sorted_kinds]] = order + chunk.start

    with ThreadPoolExecutor(min(_MOST_THREADS, cpu_count() or 1)) as pool:
        counts = np.array(list(pool.map(count, chunks)))  # (chunks, kinds)
        start = np.concatenate([[0], np.cumsum(counts.sum(axis=0))])
        before = np.cumsum(counts, axis=0) - counts
        list(pool.map(place, zip(chunks, start[:-1] + before, strict=True)))
    return start
