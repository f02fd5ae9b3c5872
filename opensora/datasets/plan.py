"""Which samples form which step, for the whole world, as a pure function of (seed, step).

An epoch uses every assigned sample once: each bucket is shuffled and cut into micro-batches (the tail makes a smaller
one), the micro-batches of all buckets are shuffled together, and a step takes ``data.micro_batches`` consecutive ones;
the last step of an epoch takes what is left. How many processes there are enters only in ``assign``.
"""

import heapq
from bisect import bisect_right
from dataclasses import dataclass, replace

import numpy as np

from opensora.datasets.bucket import Bucket, BucketReport, BucketTable
from opensora.datasets.config import DataConfig
from opensora.datasets.manifest import ClipTable
from opensora.utils.errors import UserError
from opensora.utils.rng import numpy_generator

# A sample of L tokens costs 24 L d^2 + 4 L^2 d multiplications, so L * (1 + L / 6d) up to scale; d of the 11B model.
_QUADRATIC_TOKENS = 6 * 3072
_TEMPORAL_STRIDE = 4
_EMPTY_EPOCHS = 1000  # so many in a row with nothing drawn: the probabilities are as good as zero


@dataclass(frozen=True)
class MicroBatch:
    """Samples of one bucket that go through the model together."""

    bucket: Bucket
    sample_ids: tuple[int, ...]
    epoch: int
    weight: float = 1.0  # 0: computed to keep processes in step, not counted


@dataclass(frozen=True)
class _Epoch:
    """The order of one epoch as arrays; micro-batch i is ids[start[i]:stop[i]]."""

    ids: np.ndarray  # int64, bucket by bucket, shuffled inside each
    bucket_range: dict[int, tuple[int, int]]  # bucket number -> where its samples stand in ``ids``
    bucket: np.ndarray  # (m,) bucket number of every micro-batch, in the order they are used
    start: np.ndarray  # (m,)
    stop: np.ndarray  # (m,)


class BatchPlan:
    """The order of a run. Holds no position: ask for any step, in any order, in any process."""

    def __init__(self, table: ClipTable, cfg: DataConfig, spatial_multiple: int, seed: int) -> None:
        """
        Args:
            spatial_multiple: pixels one token spans in space (autoencoder stride * patch).

        Raises:
            UserError: no sample fits any bucket, or with ``empty_rows: error`` a row of the bucket table has none.
        """
        self._table = table
        self._seed = seed
        self._micro_batches = cfg.micro_batches
        self._multiple = spatial_multiple
        self._buckets = BucketTable(cfg, spatial_multiple)
        self._first_step = [0]  # first step of each epoch known so far, where epochs differ in length
        self._constant_steps: int | None = None  # steps of every epoch, where they do not
        self._epochs: dict[int, _Epoch] = {}  # the last few used
        self._report = self._buckets.report(self._buckets.assign(table, seed, 0))
        _check_report(self._report, cfg)

    def report(self) -> BucketReport:
        """Samples per bucket in epoch 0, and the others by reason."""
        return self._report

    def step(self, step: int) -> tuple[MicroBatch, ...]:
        """All micro-batches of an optimizer step, each with weight 1."""
        number = self.epoch_of(step)
        epoch = self._epoch(number)
        first = (step - self._start_of(number)) * self._micro_batches
        return tuple(
            MicroBatch(
                bucket=self._buckets.buckets[epoch.bucket[i]],
                sample_ids=tuple(epoch.ids[epoch.start[i] : epoch.stop[i]].tolist()),
                epoch=number,
            )
            for i in range(first, min(first + self._micro_batches, len(epoch.bucket)))
        )

    def assign(self, step: int, dp_rank: int, dp_degree: int) -> tuple[MicroBatch, ...]:
        """This rank's micro-batches of a step, most expensive first; equally many on every rank.

        A rank that would have fewer repeats the cheapest micro-batch of the step with weight 0.
        """
        if not 0 <= dp_rank < dp_degree:
            raise ValueError(f"dp_rank={dp_rank}: allowed are 0 to {dp_degree - 1}")
        whole = self.step(step)
        costs = [self.cost(micro_batch.bucket, len(micro_batch.sample_ids)) for micro_batch in whole]
        mine, per_rank = _longest_first(costs, dp_rank, dp_degree)
        filler = replace(whole[min(range(len(whole)), key=lambda i: (costs[i], i))], weight=0.0)
        return tuple(whole[i] for i in mine) + (filler,) * (per_rank - len(mine))

    def epoch_of(self, step: int) -> int:
        """The epoch a step belongs to."""
        if step < 0:
            raise ValueError(f"step={step}: allowed are integers >= 0")
        if not self._buckets.draws:
            return step // self.steps_in_epoch(0)
        while self._first_step[-1] <= step:
            self._extend()
        return bisect_right(self._first_step, step) - 1

    def steps_in_epoch(self, epoch: int) -> int:
        """Optimizer steps of an epoch; 0 is possible where the probabilities draw nothing."""
        if self._buckets.draws:
            return self._steps_for(len(self._epoch(epoch).bucket))
        if self._constant_steps is None:
            self._constant_steps = self._steps_for(len(self._epoch(0).bucket))
        return self._constant_steps

    def cost(self, bucket: Bucket, samples: int) -> float:
        """Relative time of a micro-batch, from its tokens."""
        grid = (bucket.height // self._multiple) * (bucket.width // self._multiple)
        tokens = ((bucket.frames - 1) // _TEMPORAL_STRIDE + 1) * grid
        return samples * tokens * (1 + tokens / _QUADRATIC_TOKENS)

    def members(self, micro_batch: MicroBatch) -> np.ndarray:
        """(k,) ids of all samples in this micro-batch's bucket in its epoch."""
        epoch = self._epoch(micro_batch.epoch)
        start, stop = epoch.bucket_range[self._buckets.buckets.index(micro_batch.bucket)]
        return epoch.ids[start:stop]

    def _steps_for(self, micro_batches: int) -> int:
        return -(-micro_batches // self._micro_batches)

    def _start_of(self, epoch: int) -> int:
        return self._first_step[epoch] if self._buckets.draws else epoch * self.steps_in_epoch(0)

    def _extend(self) -> None:
        count = self.steps_in_epoch(len(self._first_step) - 1)
        self._first_step.append(self._first_step[-1] + count)
        if len(self._first_step) > _EMPTY_EPOCHS and self._first_step[-1] == self._first_step[-_EMPTY_EPOCHS]:
            raise UserError(f"data.buckets: {_EMPTY_EPOCHS} epochs in a row drew no sample, raise the probabilities")

    def _epoch(self, number: int) -> _Epoch:
        if number not in self._epochs:
            while len(self._epochs) >= 2:
                self._epochs.pop(next(iter(self._epochs)))
            self._epochs[number] = self._order(number)
        return self._epochs[number]

    def _order(self, number: int) -> _Epoch:
        assigned = self._buckets.assign(self._table, self._seed, number)
        ids = np.argsort(assigned, kind="stable")
        ids = ids[np.count_nonzero(assigned < 0) :]
        counts = np.bincount(assigned[ids], minlength=len(self._buckets.buckets))
        ranges, bucket_of, starts, stops = {}, [], [], []
        position = 0
        for bucket in np.flatnonzero(counts).tolist():
            end = position + int(counts[bucket])
            ranges[bucket] = (position, end)
            numpy_generator(self._seed, number, bucket, "order of samples").shuffle(ids[position:end])
            cuts = np.arange(position, end, self._buckets.buckets[bucket].batch_size)
            starts.append(cuts)
            stops.append(np.append(cuts[1:], end))
            bucket_of.append(np.full(len(cuts), bucket))
            position = end
        if not ranges:
            nothing = np.zeros(0, dtype=np.int64)
            return _Epoch(ids, ranges, nothing, nothing, nothing)
        start, stop, bucket_array = np.concatenate(starts), np.concatenate(stops), np.concatenate(bucket_of)
        shuffled = numpy_generator(self._seed, number, "order of micro-batches").permutation(len(start))
        return _Epoch(ids, ranges, bucket_array[shuffled], start[shuffled], stop[shuffled])


def _longest_first(costs: list[float], rank: int, degree: int) -> tuple[list[int], int]:
    """(this rank's items by falling cost, items per rank): each item, longest first, to the least loaded rank that
    still has room."""
    per_rank = -(-len(costs) // degree)
    mine: list[int] = []
    load = [(0.0, 0, r) for r in range(degree)]
    for item in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        cost, held, owner = heapq.heappop(load)
        if owner == rank:
            mine.append(item)
        if held + 1 < per_rank:
            heapq.heappush(load, (cost + costs[item], held + 1, owner))
    return mine, per_rank


def _check_report(report: BucketReport, cfg: DataConfig) -> None:
    if not report.per_bucket:
        reasons = "; ".join(f"{count} {reason}" for reason, count in report.left_out)
        raise UserError(
            f"data.buckets: none of the {report.rows} samples fits a bucket ({reasons}): add a smaller resolution, "
            "a shorter row or a row of 1 frame, or raise the probabilities"
        )
    if cfg.empty_rows == "error" and report.empty_rows:
        resolution, frames = report.empty_rows[0]
        raise UserError(
            f"data.buckets.{resolution}.{frames} and {len(report.empty_rows) - 1} more rows get no sample: "
            "take them out, add clips that fit, or set data.empty_rows=report"
        )
