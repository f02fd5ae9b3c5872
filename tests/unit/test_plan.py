"""The plan as a pure function: every sample once, the same for any world, shared out evenly."""

from collections import Counter

import numpy as np
import pytest

from opensora.datasets import DataConfig
from opensora.datasets.buckets.bucket import Bucket
from opensora.datasets.plan.batch_plan import BatchPlan, MicroBatch
from opensora.utils.errors import UserError
from tests.unit.test_bucket import BUCKETS, clip_table, random_table

FIXED = {"256px": {1: [1.0, 9], 5: [1.0, 8], 33: [1.0, 4], 65: [1.0, 2]}, "480p": {17: [1.0, 3]}}


def make_plan(
    buckets: dict | None = None, *, micro_batches: int = 7, pack: int = 1, rows: int = 600, seed: int = 3
) -> BatchPlan:
    cfg = DataConfig(buckets=buckets or FIXED, micro_batches=micro_batches, balance_group=pack)
    return BatchPlan(random_table(rows), cfg, 16, seed)


def ids_of(micro_batches: tuple[MicroBatch, ...]) -> list[int]:
    return [sample for m in micro_batches for sample in m.sample_ids]


@pytest.mark.parametrize("buckets", [FIXED, BUCKETS])
def test_every_assigned_sample_once_per_epoch(buckets: dict) -> None:
    plan = make_plan(buckets)
    step, sizes = 0, []
    for epoch in range(3):
        seen: list[int] = []
        steps = 0
        while plan.epoch_of(step) == epoch:
            seen += ids_of(plan.step(step))
            assert all(m.epoch == epoch and m.weight == 1.0 for m in plan.step(step))
            steps, step = steps + 1, step + 1
        assert steps == plan.steps_in_epoch(epoch)
        assert len(seen) == len(set(seen)) > 100
        if epoch == 0:
            assert len(seen) == sum(count for _, count in plan.report().per_bucket)
        sizes.append(tuple(sorted(seen)))
    assert (len(set(sizes)) == 1) == (buckets is FIXED)


def test_micro_batches_hold_one_bucket_cut_evenly() -> None:
    plan = make_plan()
    table = random_table(600)
    sizes: dict[Bucket, list[int]] = {}
    for step in range(plan.steps_in_epoch(0)):
        last = step == plan.steps_in_epoch(0) - 1
        assert len(plan.step(step)) == 7 or last
        for m in plan.step(step):
            sizes.setdefault(m.bucket, []).append(len(m.sample_ids))
            assert all((table.num_frames[i] == 1) == (m.bucket.frames == 1) for i in m.sample_ids)
    for bucket, found in sizes.items():
        assert max(found) <= bucket.batch_size and max(found) - min(found) <= 1
        assert len(found) == -(-sum(found) // bucket.batch_size)  # no more micro-batches than it takes


@pytest.mark.parametrize("buckets", [FIXED, BUCKETS])
def test_a_step_does_not_depend_on_what_was_asked_before(buckets: dict) -> None:
    forward = make_plan(buckets)
    expected = [forward.step(s) for s in range(150)]
    for step in np.random.default_rng(0).permutation(150)[:40].tolist():
        assert make_plan(buckets).step(step) == expected[step]
    backward = make_plan(buckets)
    assert [backward.step(s) for s in reversed(range(150))] == expected[::-1]


def test_order_changes_with_seed_and_epoch_and_mixes_buckets() -> None:
    plan = make_plan()
    epoch = plan.steps_in_epoch(0)
    assert ids_of(plan.step(0)) != ids_of(plan.step(epoch))
    assert ids_of(plan.step(0)) != ids_of(make_plan(seed=4).step(0))
    assert len({m.bucket for s in range(5) for m in plan.step(s)}) > 10


@pytest.mark.parametrize("degree", [1, 2, 3, 5, 8, 16])
def test_ranks_share_a_step_exactly(degree: int) -> None:
    plan = make_plan()
    for step in range(0, 2 * plan.steps_in_epoch(0), 3):
        ranks = [plan.assign(step, rank, degree) for rank in range(degree)]
        assert len({len(mine) for mine in ranks}) == 1
        counted = [m for mine in ranks for m in mine if m.weight == 1.0]
        assert Counter(counted) == Counter(plan.step(step))
        fillers = [m for mine in ranks for m in mine if m.weight != 1.0]
        cheapest = min(plan.cost(m.bucket, len(m.sample_ids)) for m in plan.step(step))
        assert all(m.weight == 0.0 and plan.cost(m.bucket, len(m.sample_ids)) == cheapest for m in fillers)
        assert len(fillers) < degree
        for mine in ranks:
            costs = [plan.cost(m.bucket, len(m.sample_ids)) for m in mine]
            assert costs == sorted(costs, reverse=True)


def idle(loads: np.ndarray) -> float:
    """(steps, processes) loads -> share of the time that processes wait for the slowest of the step."""
    return float(np.mean(1 - loads.mean(axis=1) / loads.max(axis=1)))


@pytest.mark.parametrize(
    ("pack", "degree", "bound"), [(1, 32, 0.02), (1, 8, 0.01), (4, 8, 0.002), (4, 2, 0.002), (32, 1, 0)]
)
def test_steps_can_be_shared_out_evenly(pack: int, degree: int, bound: float) -> None:
    plan = make_plan(micro_batches=32, rows=8_000, pack=pack)
    steps = range(plan.steps_in_epoch(0) - 1)
    costs = np.array([plan.costs(step) for step in steps])
    ranks = [[plan.assign(step, rank, degree) for rank in range(degree)] for step in steps]
    loads = np.array([[sum(plan.cost(m.bucket, len(m.sample_ids)) for m in mine) for mine in step] for step in ranks])
    assert idle(loads) <= bound
    in_any_order = np.random.default_rng(0).permutation(costs.ravel()).reshape(len(steps), degree, -1)
    assert degree == 1 or idle(loads) < 0.1 * idle(in_any_order.sum(axis=2))
    # A pack of one makes steps of one cost; with larger packs a step has as many kinds as the data.
    within = np.mean(costs.std(axis=1)) / costs.std()
    assert within < 0.02 if pack == 1 else within > 0.95


def test_nothing_fits() -> None:
    table = clip_table([1, 9], [64, 64], [64, 64], [float("nan"), 24.0])
    with pytest.raises(UserError, match=r"none of the 2 samples fits a bucket \(2 too small.*add a smaller resolution"):
        BatchPlan(table, DataConfig(buckets={"256px": {1: [1.0, 1]}}), 16, 0)
    with pytest.raises(UserError, match=r"data\.buckets\.64px\.33 .* no sample"):
        BatchPlan(table, DataConfig(buckets={"64px": {1: [1.0, 1], 33: [1.0, 1]}}), 16, 0)


def test_an_epoch_may_draw_nothing() -> None:
    table = clip_table([1] * 3, [64] * 3, [64] * 3, [float("nan")] * 3)
    cfg = DataConfig(buckets={"64px": {1: [0.1, 1]}})
    plan = next(p for p in _plans(table, cfg))
    empty = [e for e in range(40) if plan.steps_in_epoch(e) == 0]
    assert empty
    epochs = [plan.epoch_of(s) for s in range(30)]
    assert epochs == sorted(epochs) and not set(epochs) & set(empty)
    assert all(plan.step(s) for s in range(30))


def _plans(table, cfg):  # type: ignore[no-untyped-def]
    """A seed whose first epoch draws something."""
    for seed in range(20):
        try:
            yield BatchPlan(table, cfg, 16, seed)
        except UserError:
            continue
