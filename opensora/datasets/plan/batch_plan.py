"""Which samples form which step, for the whole world, as a pure function of (table, configuration, seed, step).

An epoch uses every assigned sample once (``epoch``). Its micro-batches are put in random order, a window of some
hundred steps at a time is composed to steps that can be shared out evenly (``balance``), and those steps are put in
random order. An epoch's last step takes what does not fill one. How many processes there are enters only in
``assign``: any number of them continues the same sequence, and a step number is all there is to save.

With ``tokens_per_sequence`` the samples of a step are laid into packs (``packing``) before they are shared out. Which
samples a step has does not change, so neither does what it computes.
"""

from bisect import bisect_right
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from opensora.datasets.buckets.bucket import Bucket, BucketReport, BucketTable
from opensora.datasets.buckets.cost import Measure
from opensora.datasets.buckets.published_rule import PublishedRule, class_of, whole_shares
from opensora.datasets.buckets.rule_1x import Rule1x
from opensora.datasets.buckets.shape_class_index import index_shape_classes, sorted_by
from opensora.datasets.buckets.sizes_1x import RULES as RULES_1X
from opensora.datasets.config import DataConfig
from opensora.datasets.plan.balance import compose, deal
from opensora.datasets.plan.counter_rng import permuted
from opensora.datasets.plan.dynamic_sp import SequenceSharing
from opensora.datasets.plan.epoch import Epoch, Source
from opensora.datasets.plan.sequence_packing import fill
from opensora.datasets.table.manifest import ClipTable
from opensora.utils.errors import UserError
from opensora.utils.rng import derive_key, numpy_generator

_WINDOW_STEPS = 256  # steps composed together: more are more even, and take longer to compute
_LEAST_STEPS = 64
_WINDOW_ITEMS = (1 << 14, 1 << 18)  # least and most micro-batches in a window
_EMPTY_EPOCHS = 1000  # so many in a row with nothing drawn: the probabilities are as good as zero

T = TypeVar("T")


@dataclass(frozen=True)
class MicroBatch:
    """Samples of one bucket that go through the model together."""

    bucket: Bucket
    sample_ids: tuple[int, ...]
    epoch: int
    weight: float = 1.0  # 0: computed to keep processes in step, not counted
    degree: int | None = None  # processes that cut its samples, of those that can; None: all

    @property
    def parts(self) -> tuple["MicroBatch", ...]:
        return (self,)

    def uncounted(self) -> "MicroBatch":
        """The same with weight 0."""
        return replace(self, weight=0.0)


@dataclass(frozen=True)
class PackedSequence:
    """Samples of several buckets that go through the model together, in one sequence."""

    parts: tuple[MicroBatch, ...]  # one for each bucket, all of one epoch and weight

    @property
    def sample_ids(self) -> tuple[int, ...]:
        return tuple(sample for part in self.parts for sample in part.sample_ids)

    @property
    def weight(self) -> float:
        return self.parts[0].weight

    @property
    def degree(self) -> None:
        """All that can cut its samples."""

    def uncounted(self) -> "PackedSequence":
        """The same with weight 0."""
        return PackedSequence(tuple(part.uncounted() for part in self.parts))


@dataclass(frozen=True)
class _Step:
    """The micro-batches of a step, without their samples."""

    epoch: Epoch
    numbers: np.ndarray  # (m,) in the epoch
    bucket: np.ndarray  # (m,)
    sizes: np.ndarray  # (m,)
    costs: np.ndarray  # (m,), or with packs one for each of these
    packs: np.ndarray | None = None  # (n,) the pack of every sample; None: nothing is packed


class BatchPlan:
    """The order of a run. Holds no position: ask for any step, in any order, in any process."""

    def __init__(
        self, table: ClipTable, cfg: DataConfig, spatial_multiple: int, seed: int, measure: Measure | None = None
    ) -> None:
        """
        Args:
            spatial_multiple: pixels one token spans in space (autoencoder stride * patch).
            measure: what a clip amounts to for the model, see ``BucketTable``.

        Raises:
            UserError: no sample fits any bucket, with ``unused_rows: error`` a row of the bucket table has none, or a
                sample of some bucket is longer than ``tokens_per_sequence``.
        """
        self._made_of = (table, cfg, spatial_multiple, seed, measure)
        self._seed = seed
        self._per_step, self._pack = cfg.micro_batches, cfg.balance_group
        self._budget = cfg.tokens_per_sequence
        self._buckets = BucketTable(cfg, spatial_multiple, measure)
        self._number = {bucket: number for number, bucket in enumerate(self._buckets.buckets)}
        self._source: Source | None = None  # of all epochs, unless every clip draws by itself
        self._rule: PublishedRule | Rule1x | None = None
        if cfg.bucket_rule in RULES_1X:
            self._rule = Rule1x(cfg, self._buckets, seed)
        elif cfg.bucket_rule == "open_sora_2":
            self._rule = PublishedRule(cfg, self._buckets, spatial_multiple, seed)
        if self._rule is not None:
            self._draws = self._rule.draws
        else:
            index = index_shape_classes(table, self._buckets)
            self._source = Source(self._buckets, self._buckets.shares(), index, seed)
            self._draws = self._source.shares.draws
        self._first_step = [0]  # first step of each epoch known so far, where epochs differ in length
        self._epochs = _Recent[Epoch](3)
        self._windows = _Recent[np.ndarray](2)
        self._steps = _Recent[_Step](64)
        epoch = self._epoch(0)
        self._report = self._buckets.report(epoch.samples, epoch.left_out())
        _check_some(self._report)
        if cfg.unused_rows == "error":
            check_rows(self._report)
        if self._budget:
            _check_budget(self._budget, self._buckets)

    def __reduce__(self) -> tuple[Any, ...]:
        return BatchPlan, self._made_of

    def report(self) -> BucketReport:
        """Samples per bucket in epoch 0, and the others by reason."""
        return self._report

    def step(self, step: int) -> tuple[MicroBatch | PackedSequence, ...]:
        """All micro-batches of an optimizer step, or all packs of their samples, each with weight 1."""
        whole = self._step(step)
        return self._filled(whole, np.arange(len(whole.costs)))

    def assign(
        self, step: int, dp_rank: int, dp_degree: int, sharing: SequenceSharing | None = None
    ) -> tuple[MicroBatch | PackedSequence, ...]:
        """This rank's micro-batches, or packs, of a step, most expensive first; equally many on every rank.

        A rank that would have fewer repeats the cheapest of the step with weight 0.

        Args:
            sharing: choose for each micro-batch whether all processes of the rank cut its samples, or groups of them
                have samples of their own; what is returned is this process's part. None: all cut all. Not for packs.
        """
        if not 0 <= dp_rank < dp_degree:
            raise ValueError(f"dp_rank={dp_rank}: must be 0 to {dp_degree - 1}")
        whole = self._step(step)
        costs = whole.costs
        if sharing:
            degrees, costs = self._buckets.shared(whole.bucket, whole.sizes, sharing)
        owners, per_rank = deal(costs, dp_degree)
        local = np.flatnonzero(owners == dp_rank)
        chosen = local[np.argsort(-costs[local], kind="stable")]
        fillers = per_rank - len(local)
        if fillers:
            chosen = np.append(chosen, np.argmin(costs))
        found = self._filled(whole, chosen)
        if sharing:
            choices = zip(found, degrees[chosen].tolist(), strict=True)
            found = tuple(_part(m, degree, sharing) for m, degree in choices if isinstance(m, MicroBatch))
        return found[: len(local)] + tuple(filler.uncounted() for filler in found[len(local) :]) * fillers

    def shapes(self, step: int) -> Counter[Bucket]:
        """Samples of a step by bucket; cheaper than the samples themselves."""
        whole = self._step(step)
        count: Counter[Bucket] = Counter()
        for bucket, samples in zip(whole.bucket.tolist(), whole.sizes.tolist(), strict=True):
            count[self._buckets.buckets[bucket]] += samples
        return count

    def costs(self, step: int) -> np.ndarray:
        """(m,) cost of every micro-batch, or pack, of a step, in the order of ``step``."""
        return self._step(step).costs

    def cost_features(self, step: int) -> np.ndarray:
        """(4,) what the cost of all micro-batches, or packs, of a step together is linear in (``cost.features``)."""
        whole = self._step(step)
        total = self._buckets.features(whole.bucket, whole.sizes).sum(axis=0)
        total[0] = len(whole.costs)  # of the cost of a micro-batch, however many samples it has
        return total

    def idle(self, step: int, dp_degree: int) -> float:
        """The share of a step that processes wait for the slowest, by the cost model."""
        costs = self.costs(step)
        owners, _ = deal(costs, dp_degree)
        loads = np.bincount(owners, costs, minlength=dp_degree)
        return float(1 - loads.mean() / loads.max())

    def epoch_of(self, step: int) -> int:
        """The epoch a step belongs to."""
        if step < 0:
            raise ValueError(f"step={step}: must be an integer >= 0")
        if not self._draws:
            return step // self.steps_in_epoch(0)
        while self._first_step[-1] <= step:
            self._extend()
        return bisect_right(self._first_step, step) - 1

    def steps_in_epoch(self, epoch: int) -> int:
        """Optimizer steps of an epoch; 0 is possible where the probabilities draw nothing."""
        known = self._epoch(epoch if self._draws else 0)
        return -(-known.micro_batches // self._per_step)

    def cost(self, bucket: Bucket, samples: int) -> float:
        """Time of a micro-batch in the unit of ``data.cost``."""
        return self._buckets.cost(bucket, samples)

    def members(self, micro_batch: MicroBatch) -> Sequence[int]:
        """The ids of all samples in this micro-batch's bucket in its epoch."""
        return self._epoch(micro_batch.epoch).members(self._number[micro_batch.bucket])

    def _filled(self, whole: _Step, chosen: np.ndarray) -> tuple[MicroBatch | PackedSequence, ...]:
        if whole.packs is not None:
            return self._filled_packs(whole, whole.packs, chosen)
        ids = whole.epoch.sample_ids(whole.numbers[chosen])
        return tuple(
            MicroBatch(self._buckets.buckets[bucket], samples, whole.epoch.number)
            for bucket, samples in zip(whole.bucket[chosen].tolist(), ids, strict=True)
        )

    def _filled_packs(self, whole: _Step, packs: np.ndarray, chosen: np.ndarray) -> tuple[PackedSequence, ...]:
        ids = np.array([sample for ids in whole.epoch.sample_ids(whole.numbers) for sample in ids])
        bucket = np.repeat(whole.bucket, whole.sizes)
        order = np.argsort(packs, kind="stable")
        bounds = np.searchsorted(packs[order], np.arange(len(whole.costs) + 1))
        found = []
        for pack in chosen.tolist():
            inside = order[bounds[pack] : bounds[pack + 1]]
            by_bucket = {b: ids[inside[bucket[inside] == b]].tolist() for b in np.unique(bucket[inside]).tolist()}
            parts = (MicroBatch(self._buckets.buckets[b], tuple(i), whole.epoch.number) for b, i in by_bucket.items())
            found.append(PackedSequence(tuple(parts)))
        return tuple(found)

    def _step(self, step: int) -> _Step:
        return self._steps.get(step, lambda: self._find_step(step))

    def _find_step(self, step: int) -> _Step:
        number = self.epoch_of(step)
        epoch = self._epoch(number)
        first = self._first_step[number] if self._draws else number * self.steps_in_epoch(0)
        within = step - first
        full = epoch.micro_batches // self._per_step
        if within == full:  # what does not fill a step
            numbers = self._ordered(epoch, full * self._per_step, epoch.micro_batches)
        else:
            least, most = _WINDOW_ITEMS
            steps = max(_LEAST_STEPS, min(max(_WINDOW_STEPS, least // self._per_step), most // self._per_step))
            window = within // steps
            composed = self._windows.get((number, window), lambda: self._compose(epoch, window, steps, full))
            numbers = composed[within - window * steps]
        return self._packed(epoch, numbers, epoch.bucket_of(numbers), epoch.sizes(numbers))

    def _packed(self, epoch: Epoch, numbers: np.ndarray, bucket: np.ndarray, sizes: np.ndarray) -> _Step:
        """The step of these micro-batches, their samples laid into packs if they are to be.

        There are as many packs as micro-batches / ``balance_group``, or a multiple: on so many steps are even.
        """
        if not self._budget:
            return _Step(epoch, numbers, bucket, sizes, self._buckets.costs(bucket, sizes))
        of_sample = np.repeat(bucket, sizes)
        costs, tokens = self._buckets.sample_costs(of_sample), self._buckets.tokens(of_sample)
        packs = fill(costs, tokens, self._budget, -(-len(numbers) // self._pack))
        per_pack = np.bincount(packs, costs) + self._buckets.cost_of_any
        return _Step(epoch, numbers, bucket, sizes, per_pack, packs)

    def _compose(self, epoch: Epoch, window: int, steps: int, full: int) -> np.ndarray:
        """(steps, micro_batches) numbers of the window's micro-batches, step by step."""
        first, last = window * steps, min((window + 1) * steps, full)
        numbers = self._ordered(epoch, first * self._per_step, last * self._per_step)
        costs = self._buckets.costs(epoch.bucket_of(numbers), epoch.sizes(numbers))
        generator = numpy_generator(self._seed, epoch.number, window, "order of steps")
        return numbers[compose(costs, self._per_step, self._pack, generator)]

    def _ordered(self, epoch: Epoch, first: int, last: int) -> np.ndarray:
        """Micro-batches ``first`` to ``last`` - 1 of the epoch's random order."""
        key = derive_key(self._seed, epoch.number, "order of micro-batches")
        return permuted(np.arange(first, last), epoch.micro_batches, key)

    def _extend(self) -> None:
        count = self.steps_in_epoch(len(self._first_step) - 1)
        self._first_step.append(self._first_step[-1] + count)
        if len(self._first_step) > _EMPTY_EPOCHS and self._first_step[-1] == self._first_step[-_EMPTY_EPOCHS]:
            raise UserError(f"data.buckets: {_EMPTY_EPOCHS} epochs in a row drew no sample, raise the probabilities")

    def _epoch(self, number: int) -> Epoch:
        return self._epochs.get(number, lambda: Epoch(self._source_of(number), number))

    def _source_of(self, epoch: int) -> Source:
        """What an epoch is made of."""
        if self._rule is None:
            assert self._source is not None
            return self._source
        assigned = self._rule.assigned(self._made_of[0], epoch if self._draws else 0)
        count = len(self._buckets.buckets)
        shares = whole_shares(count)
        index = sorted_by(class_of(assigned, count), len(shares.reason))
        return Source(self._buckets, shares, index, self._seed)


def _part(micro_batch: MicroBatch, degree: int, sharing: SequenceSharing) -> MicroBatch:
    """The samples that this process has; where there are none, the first one uncounted, to keep in step."""
    ids = micro_batch.sample_ids
    local = sharing.local_rows(len(ids), degree)
    if not local:
        return replace(micro_batch, sample_ids=ids[:1], degree=degree, weight=0.0)
    return replace(micro_batch, sample_ids=ids[local.start : local.stop], degree=degree)


class _Recent(OrderedDict[Hashable, T]):
    """The values used last, up to a number of them."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self._limit = limit

    def get(self, key: Hashable, make: Callable[[], T]) -> T:  # type: ignore[override]
        if key not in self:
            self[key] = make()
            if len(self) > self._limit:
                self.popitem(last=False)
        self.move_to_end(key)
        return self[key]


def _check_some(report: BucketReport) -> None:
    if not report.per_bucket:
        reasons = "; ".join(f"{count} {reason}" for reason, count in report.left_out)
        raise UserError(
            f"data.buckets: none of the {report.rows} samples fits a bucket ({reasons}): add a smaller resolution, "
            "a shorter row or a row of 1 frame, or raise the probabilities"
        )


def check_rows(report: BucketReport) -> None:
    """That every row of the bucket table has a sample.

    Raises:
        UserError: the first that has none, and how many more.
    """
    if report.unused_rows:
        resolution, frames = report.unused_rows[0]
        more = len(report.unused_rows) - 1
        others = f" and {more} more row{'s' if more > 1 else ''} get" if more else " gets"
        raise UserError(
            f"data.buckets.{resolution}.{frames}{others} no sample: take {'them' if more else 'it'} out, add clips "
            "that fit, or set data.unused_rows=report; python -m opensora.cli.buckets shows all rows"
        )


def _check_budget(budget: int, buckets: BucketTable) -> None:
    tokens = buckets.tokens(np.arange(len(buckets.buckets)))
    if tokens.max() > budget:
        longest = buckets.buckets[int(tokens.argmax())]
        raise UserError(
            f"data.tokens_per_sequence={budget}: a sample of bucket {longest} has {tokens.max()} image tokens; allowed "
            f"are integers >= {tokens.max()}, or 0 to pack nothing"
        )
