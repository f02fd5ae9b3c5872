"""How Open-Sora 1.1 to 1.3 assign clips to buckets, draw for draw (``data.bucket_rule: open_sora_1_1`` and later).

Clip i of epoch e has the seed s = seed + e + i n, n the number of buckets, every ratio counted. Rows of the bucket
table are numbered by falling area, then by falling length, and row r draws from numpy's ``default_rng(s + r)``, for
every clip from the start. Resolutions are tried by falling area; one takes a clip of at least 0.8 times its area.

* A clip of one frame is taken by the row of one frame, if a draw is below its probability p.
* A longer one must have more than ``frames * frame_interval`` frames. The longest such row that is not skipped takes it
  if p is 1, or a draw is below p; else the resolution is left. From 1.2 on a row may have two probabilities, (p, q): it
  is skipped if its first draw is above q, and p is compared with its second.

The size is that of the ratio whose name is nearest to height over width.

Data sets of 1.0 have one shape (``open_sora_1_0``): a row takes every clip that has its frames, whatever its size, and
its window of ``frames * frame_interval`` is cut to the clip. There is more than one row only for stills beside clips.
"""

from typing import NamedTuple

import numpy as np

from opensora.datasets.buckets.bucket import NO_IMAGE_ROW, NOT_DRAWN, TOO_SHORT, TOO_SMALL, BucketTable
from opensora.datasets.buckets.published_rule import LEAST_AREA
from opensora.datasets.buckets.resolutions import area_of
from opensora.datasets.buckets.sizes_1x import RULES, nearest_ratio, sizes_1x
from opensora.datasets.config import DataConfig, is_pair
from opensora.datasets.table.manifest import ClipTable


class _Row(NamedTuple):
    """A line of the bucket table."""

    number: int  # over all resolutions
    frames: int
    keep: float  # p
    accept: float | None  # q; None: nothing is drawn


class Rule1x:
    """Which bucket every clip goes to in an epoch. All clips are gone through: time and memory grow with the table."""

    def __init__(self, cfg: DataConfig, buckets: BucketTable, seed: int) -> None:
        self._version, self._interval, self._seed = RULES[cfg.bucket_rule], cfg.interval, seed
        self._rows: dict[str, list[_Row]] = {}  # largest area first, longest first
        for number, row in enumerate(buckets.rows):
            accept = row.accept if is_pair(cfg.buckets[row.resolution][row.frames]) else None
            self._rows.setdefault(row.resolution, []).append(_Row(number, row.frames, row.keep, accept))
        self._area = {name: area_of(name, cfg.bucket_rule) * LEAST_AREA for name in self._rows}
        self._sizes = {name: sizes_1x(self._version, name) for name in self._rows}
        self._count = sum(len(self._sizes[row.resolution]) for row in buckets.rows)
        self._number = {(b.resolution, b.frames, b.height, b.width): n for n, b in enumerate(buckets.buckets)}

    @property
    def buckets(self) -> int:
        """How many there are, every ratio counted, also those of the same size."""
        return self._count

    @property
    def draws(self) -> bool:
        """Whether epochs differ."""
        return any(0 < p < 1 for rows in self._rows.values() for row in rows for p in (row.keep, row.accept or 0.0))

    def assigned(self, table: ClipTable, epoch: int) -> np.ndarray:
        """(rows,) int32: the bucket number of every clip, or a key of ``REASONS``."""
        table.check(0, len(table))
        columns = zip(table.num_frames.tolist(), table.height.tolist(), table.width.tolist(), strict=True)
        found = [self.bucket(frames, h, w, self.seed_of(clip, epoch)) for clip, (frames, h, w) in enumerate(columns)]
        return np.array(found, dtype=np.int32)

    def seed_of(self, clip: int, epoch: int) -> int:
        """What a clip's draws of an epoch start from."""
        return self._seed + epoch + clip * self._count

    def bucket(self, frames: int, height: int, width: int, seed: int) -> int:
        """The number of the bucket of one clip, or a key of ``REASONS``."""
        reason = TOO_SMALL
        for name, rows in self._rows.items():
            if height * width < self._area[name]:
                continue
            fitting = [row for row in rows if self._fits(row, frames)]
            if fitting:
                reason = NOT_DRAWN
            elif reason != NOT_DRAWN:
                reason = NO_IMAGE_ROW if frames == 1 else TOO_SHORT
            taken = _taken(fitting, seed)
            if taken is not None:
                sizes = self._sizes[name]
                tall, wide = sizes[nearest_ratio(sizes, height, width)]
                return self._number[name, taken, tall, wide]
        return reason

    def _fits(self, row: _Row, frames: int) -> bool:
        if self._version == "1.0":
            return frames >= row.frames
        if frames == 1 or row.frames == 1:
            return frames == row.frames
        return frames > row.frames * self._interval


def _taken(fitting: list[_Row], seed: int) -> int | None:
    """The length of the row of a resolution that takes a clip, of those that fit it; None: none does."""
    for row in fitting:
        generator = np.random.default_rng(seed + row.number) if row.accept is not None or row.keep < 1 else None
        if row.accept is not None and generator is not None and generator.random() > row.accept:
            continue
        taken = row.keep >= 1 or (generator is not None and generator.random() < row.keep)
        return row.frames if taken else None
    return None
