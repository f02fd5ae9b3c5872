"""Open-Sora 2's own assignment of clips to buckets, draw for draw (``data.bucket_rule: open_sora_2``).

Clip i of epoch e draws from numpy's ``default_rng(seed + e + i n)``, n the number of buckets. Resolutions are tried by
descending area; one takes a clip of at least 0.8 times its area. Of a clip of which one frame is used the row of one
frame takes it if a draw is below its probability. A longer one goes through the rows whose length fits, longest first,
and skips one with a pair of probabilities if a draw is below the second; the first that is left takes it if its
probability is 1, or a draw is below it, and else the resolution is left. The size is that of the listed ratio whose
height over width is nearest: of the ratio's name, not of the size.

``bucket.py`` divides clips by the same probabilities without a draw of each, and compares ratios by their logarithm.
"""

from collections.abc import Mapping
from functools import lru_cache

import numpy as np

from opensora.datasets.buckets.aspect import area_of, named_sizes
from opensora.datasets.buckets.bucket import (
    NO_IMAGE_ROW,
    NOT_DRAWN,
    TOO_SHORT,
    TOO_SMALL,
    BucketTable,
    Shares,
    frame_interval,
)
from opensora.datasets.config import DataConfig
from opensora.datasets.table.manifest import ClipTable

LEAST_AREA = 0.8  # of a resolution's, that a clip must have
_REASONS = (TOO_SMALL, TOO_SHORT, NO_IMAGE_ROW, NOT_DRAWN)


class PublishedRule:
    """Which bucket every clip goes to in an epoch. All clips are gone through: time and memory grow with the table."""

    def __init__(self, cfg: DataConfig, buckets: BucketTable, spatial_multiple: int, seed: int) -> None:
        self._seed, self._count = seed, len(buckets.buckets)
        self._rows: dict[str, dict[int, tuple[float, float | None]]] = {}  # largest area first, longest first
        for name in sorted(cfg.buckets, key=lambda name: -area_of(name)):
            self._rows[name] = {frames: _probabilities(cfg.buckets[name][frames]) for frames in _longest(cfg, name)}
        self._ratios = {name: _nominal(named_sizes(name, spatial_multiple)) for name in self._rows}
        self._number = {(b.resolution, b.frames, b.height, b.width): n for n, b in enumerate(buckets.buckets)}

    @property
    def draws(self) -> bool:
        """Whether epochs differ."""
        every = [p for rows in self._rows.values() for pair in rows.values() for p in pair if p is not None]
        return any(0 < p < 1 for p in every)

    def assigned(self, table: ClipTable, epoch: int) -> np.ndarray:
        """(rows,) int32: the bucket number of every clip, or a key of ``REASONS``."""
        table.check(0, len(table))
        lengths = table.num_frames // frame_interval(table.fps)
        columns = zip(lengths.tolist(), table.height.tolist(), table.width.tolist(), strict=True)
        found = [self._bucket(clip, frames, h, w, epoch) for clip, (frames, h, w) in enumerate(columns)]
        return np.array(found, dtype=np.int32)

    def _bucket(self, clip: int, frames: int, height: int, width: int, epoch: int) -> int:
        reason = TOO_SMALL
        draw = _Draws(self._seed + epoch + clip * self._count)
        for name, rows in self._rows.items():
            if height * width < area_of(name) * LEAST_AREA:
                continue
            fitting = [n for n in rows if (n == 1 if frames == 1 else 1 < n <= frames)]
            if fitting:
                reason = NOT_DRAWN
            elif reason != NOT_DRAWN:
                reason = NO_IMAGE_ROW if frames == 1 else TOO_SHORT
            taken = _taken(rows, fitting, draw)
            if taken is not None:
                height, width = self._size(name, height / width)
                return self._number[name, taken, height, width]
        return reason

    def _size(self, name: str, slope: float) -> tuple[int, int]:
        """(height, width) of the ratio whose height over width is nearest, the first of equally near ones."""
        return min(self._ratios[name], key=lambda ratio: abs(ratio[0] - slope))[1]


class _Draws:
    """A clip's draws; the generator is made at the first, since most clips have none."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._generator: np.random.Generator | None = None

    def __call__(self) -> float:
        if self._generator is None:
            self._generator = np.random.default_rng(self._seed)
        return float(self._generator.random())


def _taken(rows: Mapping[int, tuple[float, float | None]], fitting: list[int], draw: _Draws) -> int | None:
    """The length of a resolution's row that takes a clip, of those that fit it; None: none does."""
    for frames in fitting:
        keep, skip = rows[frames]
        if skip is not None and draw() < skip:
            continue
        # An image draws whatever its probability is; that only matters to what would be drawn after it.
        return frames if (keep >= 1 and frames > 1) or draw() < keep else None
    return None


def _longest(cfg: DataConfig, name: str) -> list[int]:
    return sorted(cfg.buckets[name], reverse=True)


def _probabilities(value: object) -> tuple[float, float | None]:
    """(probability to take a clip, to skip the length or None where it is not drawn) of a row as configured."""
    first = value[0]  # type: ignore[index]
    return (float(first[0]), float(first[1])) if isinstance(first, (list, tuple)) else (float(first), None)


def _nominal(sizes: Mapping[str, tuple[int, int]]) -> list[tuple[float, tuple[int, int]]]:
    """(height over width by its name, size) of every ratio."""
    found = []
    for name, size in sizes.items():
        width, height = map(float, name.split(":"))
        found.append((height / width, size))
    return found


def class_of(assigned: np.ndarray, buckets: int) -> np.ndarray:
    """(rows,) every bucket as a shape class of its own, and behind them one for each reason to leave clips out."""
    return np.where(assigned >= 0, assigned, buckets - 1 - assigned)


@lru_cache(maxsize=4)
def whole_shares(buckets: int) -> Shares:
    """Every class that ``class_of`` gives goes to its bucket as a whole."""
    every = np.arange(buckets)
    reason = np.full(buckets + len(_REASONS), TOO_SMALL, dtype=np.int8)
    reason[[buckets - 1 - code for code in _REASONS]] = _REASONS
    ones = np.ones(buckets)
    return Shares(shape_class=every, bucket=every, low=ones * 0, high=ones, reason=reason, draws=False)
