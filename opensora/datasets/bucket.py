"""Which shape every clip is trained at.

A bucket is one (resolution, number of frames, height, width) with a batch size. Resolutions are tried by descending
area. One takes a clip of at least 0.8 times its area that passes the draws of a row whose length fits: an image the
row of one frame, a video the longest row its draws accept. Otherwise the next lower resolution is tried. The size is
the one of nearest ratio. All of it runs on columns; draws are keyed by (seed, epoch, sample id, purpose).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from opensora.datasets.aspect import area_of, training_sizes
from opensora.datasets.config import BucketRow, DataConfig, bucket_rows
from opensora.datasets.draws import uniform
from opensora.datasets.manifest import ClipTable
from opensora.utils.errors import UserError

MAX_FPS = 24.0
# 24.01 frames per second is 24 measured with rounded timestamps, not a reason to drop every second frame.
_FPS_SLACK = 1e-3

# Why a row of the table is in no bucket: negative bucket numbers.
TOO_SMALL, TOO_SHORT, NO_IMAGE_ROW, NOT_DRAWN = -1, -2, -3, -4
REASONS = {
    TOO_SMALL: "too small: fewer pixels than 0.8 times the smallest resolution",
    TOO_SHORT: "too short: fewer frames than the shortest row of its resolutions",
    NO_IMAGE_ROW: "image, but its resolutions have no row of 1 frame",
    NOT_DRAWN: "dropped by the probabilities of the bucket table",
}


@dataclass(frozen=True)
class Bucket:
    """The shape of a micro-batch."""

    resolution: str
    frames: int
    height: int
    width: int
    batch_size: int

    def __str__(self) -> str:
        return f"{self.resolution} {self.frames}x{self.height}x{self.width}"


@dataclass(frozen=True, kw_only=True)
class BucketReport:
    """Where the rows of a clip table went in one epoch."""

    rows: int
    per_bucket: tuple[tuple[Bucket, int], ...]  # buckets that hold at least one sample
    left_out: tuple[tuple[str, int], ...]  # (reason, count), only reasons that occur
    empty_rows: tuple[tuple[str, int], ...]  # (resolution, frames) of the bucket table that no sample reached

    def __str__(self) -> str:
        placed = sum(count for _, count in self.per_bucket)
        lines = [f"{placed} of {self.rows} samples in {len(self.per_bucket)} buckets"]
        for bucket, count in self.per_bucket:
            shape = f"{bucket.frames:>4} x {bucket.height:>4} x {bucket.width:<4}"
            lines.append(f"  {bucket.resolution:<12} {shape} batch {bucket.batch_size:<4} {count:>9}")
        lines += [f"  left out {count:>9}: {reason}" for reason, count in self.left_out]
        if self.empty_rows:
            names = ", ".join(f"{resolution} x {frames}" for resolution, frames in self.empty_rows)
            lines.append(f"  rows without a sample: {names}")
        return "\n".join(lines)


class BucketTable:
    """The configured rows with their sizes; assigns every sample of a table."""

    def __init__(self, cfg: DataConfig, spatial_multiple: int) -> None:
        """``spatial_multiple``: pixels one token spans in space (autoencoder stride * patch).

        Raises:
            UserError: no row, or a resolution below one token.
        """
        self.rows: tuple[BucketRow, ...] = bucket_rows(cfg)
        if not self.rows:
            raise UserError("data.buckets is empty: give {resolution: {frames: [keep_prob, batch_size]}}")
        self.buckets: list[Bucket] = []
        self._first: dict[BucketRow, int] = {}  # a row's buckets stand together, in the order of its sizes
        self._sizes: dict[str, tuple[tuple[int, int], ...]] = {}
        for row in self.rows:
            self._sizes[row.resolution] = _sizes(row.resolution, spatial_multiple)
            self._first[row] = len(self.buckets)
            self.buckets += [
                Bucket(row.resolution, row.frames, height, width, row.batch_size)
                for height, width in self._sizes[row.resolution]
            ]

    @property
    def draws(self) -> bool:
        """Whether assignments depend on the epoch."""
        return any(0 < p < 1 for row in self.rows for p in (row.keep, row.accept))

    def assign(self, table: ClipTable, seed: int, epoch: int) -> np.ndarray:
        """(n,) int32: the bucket number of every sample, or a negative key of ``REASONS``."""
        length = usable_frames(table)
        pixels = table.resolution
        result = np.full(len(table), TOO_SMALL, dtype=np.int32)
        for resolution, rows in self._by_resolution():
            open_ids = np.flatnonzero((result < 0) & (5 * pixels >= 4 * area_of(resolution)))
            row_of = self._choose_rows(rows, open_ids, table.is_image[open_ids], length[open_ids], seed, epoch)
            size_of = nearest_size(self._sizes[resolution], table.height[open_ids], table.width[open_ids])
            first = np.array([self._first[row] for row in rows])
            found = np.where(row_of >= 0, first[np.maximum(row_of, 0)] + size_of, row_of)
            # A probability that was missed once is the reason that stays.
            keep_reason = (row_of < 0) & (result[open_ids] == NOT_DRAWN)
            result[open_ids] = np.where(keep_reason, NOT_DRAWN, found)
        return result

    def report(self, assigned: np.ndarray) -> BucketReport:
        """Counts of one assignment."""
        counts = np.bincount(assigned[assigned >= 0], minlength=len(self.buckets))
        filled = [(bucket, int(count)) for bucket, count in zip(self.buckets, counts, strict=True) if count]
        reached = {(bucket.resolution, bucket.frames) for bucket, _ in filled}
        left = [(reason, int((assigned == code).sum())) for code, reason in REASONS.items()]
        return BucketReport(
            rows=len(assigned),
            per_bucket=tuple(filled),
            left_out=tuple((reason, count) for reason, count in left if count),
            empty_rows=tuple(
                (row.resolution, row.frames) for row in self.rows if (row.resolution, row.frames) not in reached
            ),
        )

    def _by_resolution(self) -> list[tuple[str, list[BucketRow]]]:
        names = dict.fromkeys(row.resolution for row in self.rows)
        return [(name, [row for row in self.rows if row.resolution == name]) for name in names]

    @staticmethod
    def _choose_rows(
        rows: Sequence[BucketRow], ids: np.ndarray, image: np.ndarray, length: np.ndarray, seed: int, epoch: int
    ) -> np.ndarray:
        """(k,) position in ``rows`` (longest first) that takes each sample, or why none does."""
        chosen = np.where(image, NO_IMAGE_ROW, TOO_SHORT).astype(np.int64)
        for position, row in enumerate(rows):
            fits = (chosen < 0) & (image if row.frames == 1 else ~image & (length >= row.frames))
            took = fits.copy()
            took[fits] = _passes(row.accept, ids[fits], seed, epoch, f"bucket/{row.resolution}/{row.frames}")
            chosen[fits & ~took] = NOT_DRAWN
            chosen[took] = position
        taken = np.flatnonzero(chosen >= 0)
        keep = np.array([row.keep for row in rows])[chosen[taken]]
        draw = uniform(ids[taken], seed, epoch, f"bucket/{rows[0].resolution}")
        chosen[taken[draw >= keep]] = NOT_DRAWN
        return chosen


def frame_interval(fps: np.ndarray) -> np.ndarray:
    """(n,) int32: every how many frames one is used, so that at most 24 a second remain; 1 where fps is unknown."""
    with np.errstate(invalid="ignore"):
        interval = np.ceil(fps / MAX_FPS - _FPS_SLACK)
    return np.where(fps >= MAX_FPS, interval, 1).astype(np.int32)


def sampled_fps(fps: float) -> float:
    """Frame rate of the sampled clip; 0 where unknown."""
    if math.isnan(fps):
        return 0.0
    return float(math.floor(fps / int(frame_interval(np.array([fps]))[0]))) if fps >= MAX_FPS else fps


def usable_frames(table: ClipTable) -> np.ndarray:
    """(n,) frames left after the frame interval; an image has 1."""
    return table.num_frames // frame_interval(table.fps)


def nearest_size(sizes: Sequence[tuple[int, int]], height: np.ndarray, width: np.ndarray) -> np.ndarray:
    """(n,) index of the size, widest first, whose ratio is nearest in log ratio.

    Between two neighbours the border is the geometric mean of their ratios; compared squared, in integers, it is
    exact. A ratio on the border goes to the wider one.
    """
    index = np.zeros(len(height), dtype=np.int64)
    wide = width.astype(np.int64) ** 2
    tall = height.astype(np.int64) ** 2
    for (h0, w0), (h1, w1) in pairwise(sizes):
        index += wide * (h0 * h1) < tall * (w0 * w1)
    return index


def _passes(probability: float, ids: np.ndarray, seed: int, epoch: int, purpose: str) -> np.ndarray:
    if probability in (0.0, 1.0):
        return np.full(len(ids), probability == 1.0)
    return uniform(ids, seed, epoch, purpose) < probability


def _sizes(resolution: str, multiple: int) -> tuple[tuple[int, int], ...]:
    try:
        return training_sizes(resolution, multiple)
    except ValueError as error:
        raise UserError(f"data.buckets.{error}") from error
