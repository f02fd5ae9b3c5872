"""Which shape every clip is trained at.

A bucket is one (resolution, number of frames, height, width) with a batch size. Of a clip of 24 frames a second or more
every k-th frame is used, k = ceil(fps / 24). Resolutions are tried by descending area. One takes a clip of at least 0.8
times its area that passes the draws of a row whose length fits: an image, or a clip of which one frame is used, the row
of one frame; a video the longest row its draws accept. Otherwise the next lower resolution is tried. The size is the
one of nearest ratio. docs/training.md names where this differs from Open-Sora 2.

Clips that fit the same rows and take the same sizes are of one shape class; a table of a hundred million clips has a
few thousand. All that follows is decided by shape class: the buckets it can go to, and the probability of each.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

from opensora.datasets.buckets.cost import FullAttention, Measure, features
from opensora.datasets.buckets.resolutions import area_of, training_sizes
from opensora.datasets.buckets.sizes_1x import RULES as RULES_1X
from opensora.datasets.config import BucketRow, DataConfig, bucket_rows
from opensora.datasets.plan.dynamic_sp import SequenceSharing, choose, times
from opensora.datasets.table.manifest import ClipTable
from opensora.utils.errors import UserError

MAX_FPS = 24.0
_RULES = 2  # raised when clips are sorted into shape classes by other rules, so that lists on disk are made anew
_NEAR = 1e-9  # relative distance from a border between two ratios within which integers decide
_BAR = 40  # characters of the longest bar of a histogram

# Why a row of the table is in no bucket.
TOO_SMALL, TOO_SHORT, NO_IMAGE_ROW, NOT_DRAWN = -1, -2, -3, -4
REASONS = {
    TOO_SMALL: "too small: fewer pixels than 0.8 times the smallest resolution",
    TOO_SHORT: "too short: fewer frames than the shortest row of its resolutions",
    NO_IMAGE_ROW: "image, or clip of which 1 frame is used, but its resolutions have no row of 1 frame",
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
    unused_rows: tuple[tuple[str, int], ...]  # (resolution, frames) of the bucket table that no sample reached

    def __str__(self) -> str:
        """One line per row of the bucket table."""
        rows: dict[tuple[str, int], list[tuple[Bucket, int]]] = {}
        for bucket, count in self.per_bucket:
            rows.setdefault((bucket.resolution, bucket.frames), []).append((bucket, count))
        lines = []
        for (resolution, frames), entries in rows.items():
            batches = sorted({bucket.batch_size for bucket, _ in entries})
            batch = f"{batches[0]}-{batches[-1]}" if len(batches) > 1 else f"{batches[0]}"
            label = f"{resolution:<12} {frames:>4} frames {len(entries):>3} sizes batch {batch:<7}"
            lines.append((label, sum(count for _, count in entries)))
        return self._text(lines)

    def histogram(self) -> str:
        """One line per bucket."""
        return self._text(
            [
                (f"{b.resolution:<12} {b.frames:>4} x {b.height:>4} x {b.width:<4} batch {b.batch_size:<4}", count)
                for b, count in self.per_bucket
            ]
        )

    def _text(self, lines: Sequence[tuple[str, int]]) -> str:
        placed = sum(count for _, count in self.per_bucket)
        longest = max((count for _, count in lines), default=1)
        text = [f"{placed} of {self.rows} samples in {len(self.per_bucket)} buckets"]
        text += [f"  {label} {count:>10} {'#' * math.ceil(_BAR * count / longest)}" for label, count in lines]
        text += [f"  left out {count:>9}: {reason}" for reason, count in self.left_out]
        if self.unused_rows:
            names = ", ".join(f"{resolution} x {frames}" for resolution, frames in self.unused_rows)
            text.append(f"  rows without a sample: {names}")
        return "\n".join(text)


@dataclass(frozen=True, kw_only=True)
class Shares:
    """How the clips of every shape class are divided among buckets: the share [low, high) of class k goes to b."""

    shape_class: np.ndarray  # (s,) int64, in ascending order of bucket
    bucket: np.ndarray  # (s,) int64
    low: np.ndarray  # (s,) float64, 0 <= low < high <= 1
    high: np.ndarray  # (s,) float64; shares of one shape class do not overlap
    reason: np.ndarray  # (shape classes,) int8: why the rest of a shape class is left out, a key of ``REASONS``
    draws: bool  # whether any shape class is divided, so that epochs differ


class BucketTable:
    """The configured rows with their sizes; sorts clips into shape classes, and divides these among buckets."""

    def __init__(self, cfg: DataConfig, spatial_multiple: int, measure: Measure | None = None) -> None:
        """
        Args:
            spatial_multiple: pixels one token spans in space (autoencoder stride * patch).
            measure: what a clip amounts to for the model; None: full attention over its tokens.

        Raises:
            UserError: no row, or a resolution below one token.
        """
        self.rows: tuple[BucketRow, ...] = bucket_rows(cfg)
        if not self.rows:
            raise UserError("data.buckets is empty: give {resolution: {frames: [keep_prob, batch_size]}}")
        self.buckets: list[Bucket] = []
        self._cfg = cfg
        self._measure = measure or FullAttention(spatial_multiple)
        self._first: dict[BucketRow, int] = {}  # a row's buckets stand together, in the order of its sizes
        self._sizes: dict[str, tuple[tuple[int, int], ...]] = {}
        for row in self.rows:
            self._sizes[row.resolution] = _sizes(row.resolution, cfg.bucket_rule, spatial_multiple)
            self._first[row] = len(self.buckets)
            self.buckets += [
                Bucket(row.resolution, row.frames, height, width, self._batch_size(row, height, width))
                for height, width in self._sizes[row.resolution]
            ]
        self._lengths = np.array(sorted({row.frames for row in self.rows if row.frames > 1}), dtype=np.int64)
        self._area = {name: area_of(name, cfg.bucket_rule) for name in self._sizes}
        self._areas = sorted(self._area.values())
        borders = {border for sizes in self._sizes.values() for border in _borders(sizes)}
        self._borders = sorted(borders, key=lambda border: border[0] / border[1])
        self.num_shape_classes = (len(self._lengths) + 2) * (len(self._areas) + 1) * (len(self._borders) + 1)

    @cached_property
    def shape_class_key(self) -> str:
        """16 hex digits: equal for tables that sort clips into the same shape classes, whatever the probabilities."""
        rule = repr((self._lengths.tolist(), self._areas, self._borders, MAX_FPS, _RULES))
        return hashlib.blake2b(rule.encode(), digest_size=8).hexdigest()

    def shape_class_of(self, table: ClipTable, rows: slice = slice(None)) -> np.ndarray:
        """(n,) int32: the shape class of every clip, in [0, num_shape_classes); ``rows``: a part of the table."""
        frames, height, width = table.num_frames[rows], table.height[rows], table.width[rows]
        length = frames // frame_interval(table.fps[rows])
        # 0: an image; else 1 + how many lengths fit.
        fitting = np.searchsorted(self._lengths, length, side="right") + 1
        fitting[(frames == 1) | (length == 1)] = 0
        # The resolutions that take a clip are those of the smallest areas.
        pixels = height.astype(np.int64) * width
        taking = np.searchsorted(4 * np.array(self._areas, dtype=np.int64), 5 * pixels, side="right")
        shape_class = fitting * (len(self._areas) + 1) + taking
        return (shape_class * (len(self._borders) + 1) + self._ratio_bin(height, width)).astype(np.int32)

    def shares(self) -> Shares:
        """The buckets of every shape class."""
        parts: list[tuple[np.ndarray, np.ndarray, float, float]] = []  # shape classes, their buckets, low, high
        reason = np.full(self.num_shape_classes, TOO_SMALL, dtype=np.int8)
        ratios = np.arange(len(self._borders) + 1)
        size_at = {name: self._size_at(sizes) for name, sizes in self._sizes.items()}  # ratio bin -> size number
        for fitting in range(len(self._lengths) + 2):
            for taking in range(1, len(self._areas) + 1):
                shape_classes = (fitting * (len(self._areas) + 1) + taking) * len(ratios) + ratios
                leaves, reason[shape_classes] = self._leaves(fitting, taking)
                low = 0.0
                for row, probability in leaves:
                    parts.append((shape_classes, self._first[row] + size_at[row.resolution], low, low + probability))
                    low += probability
        if not parts:
            nothing = np.zeros(0)
            whole = nothing.astype(np.int64)
            return Shares(shape_class=whole, bucket=whole, low=nothing, high=nothing, reason=reason, draws=False)
        shape_class = np.concatenate([shape_classes for shape_classes, *_ in parts])
        bucket = np.concatenate([buckets for _, buckets, *_ in parts])
        low_high = np.repeat([(low, high) for *_, low, high in parts], len(ratios), axis=0)
        low_high[low_high > 1 - 1e-12] = 1.0  # sums of products fall short of one by rounding
        order = np.argsort(bucket, kind="stable")
        return Shares(
            shape_class=shape_class[order],
            bucket=bucket[order],
            low=low_high[order, 0],
            high=low_high[order, 1],
            reason=reason,
            draws=bool(((low_high > 0) & (low_high < 1)).any()),
        )

    def report(self, per_bucket: np.ndarray, left_out: dict[int, int]) -> BucketReport:
        """Counts by bucket number, and by key of ``REASONS``."""
        filled = [(bucket, int(count)) for bucket, count in zip(self.buckets, per_bucket, strict=True) if count]
        reached = {(bucket.resolution, bucket.frames) for bucket, _ in filled}
        return BucketReport(
            rows=int(per_bucket.sum()) + sum(left_out.values()),
            per_bucket=tuple(filled),
            left_out=tuple((REASONS[code], left_out[code]) for code in REASONS if left_out.get(code)),
            unused_rows=tuple(
                (row.resolution, row.frames)
                for row in self.rows
                if (row.resolution, row.frames) not in reached and not self._is_reserved(row)
            ),
        )

    def _is_reserved(self, row: BucketRow) -> bool:
        """Whether a row is there for its number alone, as in tables of Open-Sora 1.x."""
        return row.keep == 0 and self._cfg.bucket_rule in RULES_1X

    def cost(self, bucket: Bucket, samples: int) -> float:
        """Time of a micro-batch in the unit of ``data.cost``."""
        return self._cfg.cost.batch(samples, *self._measure(bucket.frames, bucket.height, bucket.width))

    def costs(self, numbers: np.ndarray, samples: np.ndarray) -> np.ndarray:
        """(n,) ``cost`` of micro-batches of the buckets with these numbers."""
        return self.features(numbers, samples) @ self._cfg.cost.terms

    def features(self, numbers: np.ndarray, samples: np.ndarray) -> np.ndarray:
        """(n, 4) what the costs of such micro-batches are linear in."""
        return features(samples.astype(np.float64), self._all_tokens[numbers], self._all_keys[numbers])

    def tokens(self, numbers: np.ndarray) -> np.ndarray:
        """(n,) int64 image tokens of one sample of the buckets with these numbers."""
        return self._all_tokens[numbers].astype(np.int64)

    def sample_costs(self, numbers: np.ndarray) -> np.ndarray:
        """(n,) what one sample of the buckets with these numbers adds to the cost of a micro-batch."""
        ones = np.ones(len(numbers))
        return self.features(numbers, ones)[:, 1:] @ self._cfg.cost.terms[1:]

    @property
    def cost_of_any(self) -> float:
        """What every micro-batch costs, however small."""
        return self._cfg.cost.per_batch

    @cached_property
    def _all_tokens(self) -> np.ndarray:
        return np.array([self._measure(b.frames, b.height, b.width)[0] for b in self.buckets], dtype=np.float64)

    @cached_property
    def _all_keys(self) -> np.ndarray:
        """Image tokens that one of each bucket attends to, in the mean."""
        pairs = [self._measure(b.frames, b.height, b.width)[1] for b in self.buckets]
        return np.array(pairs, dtype=np.float64) / self._all_tokens

    def shared(
        self, numbers: np.ndarray, samples: np.ndarray, sharing: SequenceSharing
    ) -> tuple[np.ndarray, np.ndarray]:
        """((n,) degree, (n,) time) of micro-batches, where the degree may be chosen; see ``dynamic_sp.times``."""
        sizes = np.array([bucket.batch_size for bucket in self.buckets])
        most = (sizes * (self._all_tokens + sharing.text_tokens)).max()
        return choose(times(self.features(numbers, samples), self._cfg.cost, sharing, most), sharing.degrees)

    def _batch_size(self, row: BucketRow, height: int, width: int) -> int:
        if row.batch_size is not None:
            return row.batch_size
        (tokens, pairs), cost = self._measure(row.frames, height, width), self._cfg.cost
        limits = []
        if self._cfg.tokens_per_batch:
            limits.append(self._cfg.tokens_per_batch / tokens)
        if self._cfg.cost_per_batch:
            limits.append((self._cfg.cost_per_batch - cost.per_batch) / cost.sample(tokens, pairs))
        return max(1, int(min(limits)))

    def _leaves(self, fitting: int, taking: int) -> tuple[list[tuple[BucketRow, float]], int]:
        """(row, probability to end there) for a clip, and why it may end nowhere."""
        names = [name for name in self._sizes if self._area[name] <= self._areas[taking - 1]]
        leaves: list[tuple[BucketRow, float]] = []
        arriving, had_a_row = 1.0, False  # probability that no larger resolution took it
        for name in names:
            rows = [row for row in self.rows if row.resolution == name]
            if fitting == 0:
                rows = [row for row in rows if row.frames == 1]
            else:
                rows = [row for row in rows if row.frames in self._lengths[: fitting - 1]]
            had_a_row |= bool(rows)
            asked, taken = arriving, 0.0
            for row in rows:
                leaves.append((row, asked * row.accept * row.keep))
                taken += leaves[-1][1]
                asked *= 1 - row.accept
            arriving -= taken
        reason = NOT_DRAWN if had_a_row else NO_IMAGE_ROW if fitting == 0 else TOO_SHORT
        return [leaf for leaf in leaves if leaf[1] > 0], reason

    def _ratio_bin(self, height: np.ndarray, width: np.ndarray) -> np.ndarray:
        """(n,) how many borders are steeper than a clip: (width / height)^2 below border.

        In floating point first; near a border in integers, where it is exact.
        """
        if not self._borders:
            return np.zeros(len(height), dtype=np.int64)
        wide, tall = width.astype(np.int64) ** 2, height.astype(np.int64) ** 2
        ratio = wide / tall
        values = np.array([over / under for over, under in self._borders])
        index = np.searchsorted(values, ratio * (1 - _NEAR), side="left")  # borders surely passed
        close = np.flatnonzero(index != np.searchsorted(values, ratio * (1 + _NEAR), side="right"))
        for number, (over, under) in enumerate(self._borders):
            passed = close[wide[close] * under >= tall[close] * over]
            index[passed] = number + 1
        return len(self._borders) - index

    def _size_at(self, sizes: Sequence[tuple[int, int]]) -> np.ndarray:
        """(ratio bins,) number of the size, widest first, that a clip of each bin takes."""
        mine = [self._borders.index(border) for border in _borders(sizes)]
        # Bin k lies below the k highest borders: number len - 1, len - 2, ..., len - k.
        return np.array(
            [sum(k >= len(self._borders) - border for border in mine) for k in range(len(self._borders) + 1)]
        )


def frame_interval(fps: np.ndarray) -> np.ndarray:
    """(n,) int32: every how many frames one is used, so that at most 24 a second remain; 1 where fps is unknown."""
    with np.errstate(invalid="ignore"):
        interval = np.ceil(fps / MAX_FPS)
    return np.where(fps >= MAX_FPS, interval, 1).astype(np.int32)


def sampled_fps(fps: float) -> float:
    """Frame rate of the sampled clip; 0 where unknown."""
    if math.isnan(fps):
        return 0.0
    return float(math.floor(fps / int(frame_interval(np.array([fps]))[0]))) if fps >= MAX_FPS else fps


def _borders(sizes: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """(numerator, denominator) of (w/h)^2 between neighbouring sizes, widest first: the geometric mean of their
    ratios, which is halfway in log ratio. A clip on the border takes the wider one."""
    borders = []
    for (h0, w0), (h1, w1) in pairwise(sizes):
        common = math.gcd(w0 * w1, h0 * h1)
        borders.append((w0 * w1 // common, h0 * h1 // common))
    return borders


def _sizes(resolution: str, rule: str, multiple: int) -> tuple[tuple[int, int], ...]:
    try:
        return training_sizes(resolution, rule, multiple)
    except ValueError as error:
        raise UserError(f"data.buckets.{error}") from error
