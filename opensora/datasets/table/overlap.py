"""Clips that two tables have in common."""

import os
from collections.abc import Sequence

import numpy as np

from opensora.datasets.table.manifest import ClipTable

_MOST_LOOKED_AT = 1 << 18  # rows whose paths are compared: a second


def common_clips(rows: Sequence[int], table: ClipTable, other: ClipTable) -> list[int]:
    """Which of ``rows`` of ``table`` are the same files as rows of ``other``.

    Only rows of ``other`` with the length and size of one of them are looked at, and of very many the first ones.
    """
    ids = np.asarray(rows)
    shapes = {(int(table.num_frames[i]), int(table.height[i]), int(table.width[i])) for i in ids}
    alike = np.zeros(len(other), dtype=bool)
    for frames, height, width in shapes:
        alike |= (other.num_frames == frames) & (other.height == height) & (other.width == width)
    wanted = {os.path.abspath(table.path(int(i))): int(i) for i in ids}
    found = {os.path.abspath(other.path(int(i))) for i in np.flatnonzero(alike)[:_MOST_LOOKED_AT]}
    return sorted(row for path, row in wanted.items() if path in found)
