"""One epoch: which samples each bucket has, and in which micro-batches, without a list of them.

Everything is a rule on numbers. The clips of a shape class are permuted (a Feistel network keyed by seed, epoch and
class) and divided among buckets in proportion to their probabilities; a bucket's samples are the parts that fell to it,
permuted again; its micro-batches are equal cuts of that. What a process holds is a few thousand numbers per epoch, and
any sample of any micro-batch is found by itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from opensora.datasets.buckets.bucket import REASONS, BucketTable, Shares
from opensora.datasets.buckets.shape_class_index import ShapeClassIndex
from opensora.datasets.plan.counter_rng import bits, permuted, uniform


@dataclass(frozen=True)
class Source:
    """What all epochs are made of."""

    buckets: BucketTable
    shares: Shares
    shape_class_index: ShapeClassIndex
    seed: int


class Epoch:
    """The content of one epoch. Micro-batches are numbered bucket by bucket; ``plan`` puts them in order."""

    def __init__(self, source: Source, number: int) -> None:
        self.number = number
        self._source = source
        shares, in_class = source.shares, np.diff(source.shape_class_index.start)
        # Clip j of n (after the permutation) stands at (j + u) / n on the unit interval, u drawn for the class: every
        # clip is taken with just the probability asked for, and never fewer or more clips than that, rounded.
        offset = uniform(np.arange(len(in_class)), source.seed, number, "share of a kind")[shares.shape_class]
        clips = in_class[shares.shape_class]
        first, last = (
            np.where(end == 1.0, clips, np.ceil(clips * end - offset)).astype(np.int64)
            for end in (shares.low, shares.high)
        )
        first, last = np.maximum(first, 0), np.maximum(last, 0)
        filled = np.flatnonzero(last > first)
        self._part_class = shares.shape_class[filled]
        self._part_first = first[filled]  # the first of a part's clips, as positions among their shape class
        part_bucket, part_size = shares.bucket[filled], (last - first)[filled]
        self._part_end = np.cumsum(part_size)  # parts laid end to end, bucket by bucket
        self._part_begin = self._part_end - part_size
        self.samples = np.bincount(part_bucket, part_size, minlength=len(source.buckets.buckets)).astype(np.int64)
        self._begin = np.cumsum(self.samples) - self.samples  # (buckets,) where each begins among the parts
        batch_size = np.array([bucket.batch_size for bucket in source.buckets.buckets], dtype=np.int64)
        self._cuts = -(-self.samples // batch_size)  # (buckets,) micro-batches of each
        self._last_cut = np.cumsum(self._cuts)
        self.micro_batches = int(self._last_cut[-1])

    def bucket_of(self, numbers: np.ndarray) -> np.ndarray:
        """(n,) bucket number of micro-batches."""
        return np.searchsorted(self._last_cut, numbers, side="right")

    def sizes(self, numbers: np.ndarray) -> np.ndarray:
        """(n,) samples of micro-batches: those of a bucket differ by at most one, none exceeds the batch size."""
        first, last = self._range(numbers, self.bucket_of(numbers))
        return last - first

    def sample_ids(self, numbers: np.ndarray) -> list[tuple[int, ...]]:
        """The samples of each micro-batch."""
        bucket = self.bucket_of(numbers)
        first, last = self._range(numbers, bucket)
        sizes = last - first
        ends = np.cumsum(sizes)
        positions = np.arange(ends[-1] if len(ends) else 0) + np.repeat(first - (ends - sizes), sizes)
        of = np.repeat(bucket, sizes)
        keys = self._keys("order of samples", len(self.samples))
        ids = self._member(of, permuted(positions, self.samples[of], keys[of])).tolist()
        return [tuple(ids[end - size : end]) for size, end in zip(sizes.tolist(), ends.tolist(), strict=True)]

    def members(self, bucket: int) -> "Members":
        """All samples of a bucket, in no particular order."""
        return Members(self, bucket)

    def left_out(self) -> dict[int, int]:
        """Clips in no bucket, by key of ``REASONS``."""
        in_class = np.diff(self._source.shape_class_index.start)
        placed = np.bincount(self._part_class, self._part_end - self._part_begin, minlength=len(in_class)).astype(int)
        reason = self._source.shares.reason
        return {code: int((in_class - placed)[reason == code].sum()) for code in REASONS}

    def assigned(self) -> np.ndarray:
        """(rows,) int32: the bucket number of every clip, or a key of ``REASONS``. For tables that fit in memory."""
        in_class = np.diff(self._source.shape_class_index.start)
        result = np.empty(len(self._source.shape_class_index.ids), dtype=np.int32)
        every = self._source.shape_class_index.take(np.arange(len(result)))
        result[every] = np.repeat(self._source.shares.reason, in_class)
        for bucket in np.flatnonzero(self.samples):
            result[self._member(np.full(self.samples[bucket], bucket), np.arange(self.samples[bucket]))] = bucket
        return result

    def draws(self) -> np.ndarray:
        """(rows,) float64 in [0, 1): where every clip stands among its shape class, which decides its bucket."""
        start = self._source.shape_class_index.start
        in_class = np.diff(start)
        shape_class = np.repeat(np.arange(len(in_class)), in_class)
        positions = np.arange(len(shape_class)) - start[shape_class]
        offset = uniform(np.arange(len(in_class)), self._source.seed, self.number, "share of a kind")
        result = np.empty(len(shape_class))
        result[self._clip(shape_class, positions)] = (positions + offset[shape_class]) / in_class[shape_class]
        return result

    def _range(self, numbers: np.ndarray, bucket: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """First and last + 1 of the (permuted) positions in the bucket that make up each micro-batch."""
        cuts, samples = self._cuts[bucket], self.samples[bucket]
        cut = numbers - (self._last_cut[bucket] - cuts)
        return cut * samples // cuts, (cut + 1) * samples // cuts

    def _member(self, bucket: np.ndarray, position: np.ndarray) -> np.ndarray:
        """(n,) sample ids: number ``position`` of each bucket's parts laid end to end."""
        place = self._begin[bucket] + position
        part = np.searchsorted(self._part_end, place, side="right")
        return self._clip(self._part_class[part], self._part_first[part] + place - self._part_begin[part])

    def _clip(self, shape_class: np.ndarray, position: np.ndarray) -> np.ndarray:
        """(n,) sample ids: number ``position`` of each shape class, in the order of this epoch."""
        start = self._source.shape_class_index.start
        keys = self._keys("order of a kind", len(start) - 1)
        among = permuted(position, np.diff(start)[shape_class], keys[shape_class])
        return self._source.shape_class_index.take(start[shape_class] + among)

    def _keys(self, purpose: str, count: int) -> np.ndarray:
        return bits(np.arange(count), self._source.seed, self.number, purpose)


class Members(Sequence[int]):
    """The ids of a bucket's samples, each found when asked for."""

    def __init__(self, epoch: Epoch, bucket: int) -> None:
        self._epoch, self._bucket = epoch, bucket

    def __len__(self) -> int:
        return int(self._epoch.samples[self._bucket])

    def __getitem__(self, position: int) -> int:  # type: ignore[override]
        if not -len(self) <= position < len(self):
            raise IndexError(position)
        return int(self._epoch._member(np.array([self._bucket]), np.array([position % len(self)]))[0])
