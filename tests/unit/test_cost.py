"""The cost of micro-batches: the formula, batch sizes from budgets, and the fit to measured times."""

from collections import Counter
from typing import Any

import numpy as np
import pytest

from opensora.datasets import DataConfig
from opensora.datasets.buckets.bucket import BucketTable
from opensora.datasets.buckets.cost import CostConfig, FullAttention, features, fit
from opensora.datasets.plan.balance import compose, deal
from opensora.datasets.plan.batch_plan import BatchPlan
from opensora.planner.cost_fit import calibrate, measured
from opensora.utils.errors import UserError
from tests.unit.test_bucket import random_table
from tests.unit.test_plan import FIXED, make_plan


def test_the_default_is_the_transformers_formula() -> None:
    for tokens in (1, 512, 8448, 76032):
        flops = 24 * tokens * 3072**2 + 4 * tokens**2 * 3072
        assert CostConfig().batch(3, tokens, tokens**2) == pytest.approx(3 * flops / (24 * 3072**2))
    assert FullAttention(16)(1, 256, 256)[0] == 256 and FullAttention(16)(129, 768, 768)[0] == 33 * 48 * 48


def test_columns_and_numbers_agree() -> None:
    plan = make_plan()
    cfg = DataConfig(buckets=FIXED, cost=CostConfig(per_batch=3, per_sample=0.5, per_token=0.2, per_token2=1e-4))
    table = BucketTable(cfg, 16)
    numbers = np.arange(len(table.buckets))
    samples = 1 + numbers % 7
    expected = [table.cost(bucket, int(n)) for bucket, n in zip(table.buckets, samples, strict=True)]
    assert table.costs(numbers, samples) == pytest.approx(expected)
    whole = plan.step(3)
    assert plan.costs(3) == pytest.approx([plan.cost(m.bucket, len(m.sample_ids)) for m in whole])
    assert plan.cost_features(3) @ CostConfig().terms == pytest.approx(plan.costs(3).sum())
    assert plan.shapes(3) == sum((Counter({m.bucket: len(m.sample_ids)}) for m in whole), Counter())


@pytest.mark.parametrize(
    "budget",
    [{"tokens_per_batch": 9000}, {"cost_per_batch": 12_000.0}, {"tokens_per_batch": 20_000, "cost_per_batch": 9e3}],
)
def test_auto_takes_as_many_samples_as_the_budgets_allow(budget: dict[str, Any]) -> None:
    rows = {"256px": {1: [1.0, "auto"], 33: [1.0, 2], 65: [1.0, "auto"]}, "768px": {129: [1.0, "auto"]}}
    cfg = DataConfig(buckets=rows, unused_rows="report", micro_batches=2, **budget)
    for bucket in BucketTable(cfg, 16).buckets:
        tokens = FullAttention(16)(bucket.frames, bucket.height, bucket.width)[0]

        def fits(samples: int, tokens: int = tokens) -> bool:
            within = samples * tokens <= cfg.tokens_per_batch or not cfg.tokens_per_batch
            return within and (
                cfg.cost.batch(samples, tokens, tokens**2) <= cfg.cost_per_batch or not cfg.cost_per_batch
            )

        if bucket.frames == 33:
            assert bucket.batch_size == 2
        else:
            assert bucket.batch_size == 1 or fits(bucket.batch_size)
            assert not fits(bucket.batch_size + 1)
    plan = BatchPlan(random_table(2000), cfg, 16, 0)
    assert max(len(m.sample_ids) for step in range(plan.steps_in_epoch(0)) for m in plan.step(step)) > 2


@pytest.mark.parametrize("zero", [(), (0,), (1,), (2,), (3,), (0, 1), (0, 1, 2), (0, 1, 3)])
def test_a_fit_finds_the_cost_that_made_the_times(zero: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    terms = np.array([0.05, 0.01, 2e-5, 1e-9])
    terms[list(zero)] = 0.0
    samples, tokens = rng.integers(1, 40, 60).astype(float), rng.integers(100, 80_000, 60).astype(float)
    rows = features(samples, tokens)
    seconds = rows @ terms
    assert fit(rows, seconds).terms == pytest.approx(terms, rel=1e-4, abs=1e-12)
    noisy = fit(rows, seconds * rng.normal(1, 0.05, 60))
    assert (noisy.terms >= 0).all()
    assert np.abs(rows @ noisy.terms / seconds - 1).mean() < 0.05


def test_a_fit_needs_lengths() -> None:
    with pytest.raises(ValueError, match="one length"):
        fit(features(np.arange(1.0, 10.0), np.full(9, 100.0)), np.arange(1.0, 10.0))


def test_calibration_reads_a_runs_records() -> None:
    plan = make_plan(micro_batches=4)
    cost = CostConfig(per_batch=0.1, per_sample=0.0, per_token=1e-5, per_token2=2e-9)
    seconds = [float(plan.cost_features(step) @ cost.terms) / 2 for step in range(40)]
    records = [
        {"step": end, "time/step_s": sum(seconds[end - 2 : end]) / 2 + 0.5, "data/wait_s": 0.5}
        for end in range(2, 41, 2)
    ]
    records[5]["time/step_s"] = 99.0  # the first of a resumed run
    rows, times = measured(plan, records, {10})
    assert len(rows) == 18 and times.max() < 99
    assert fit(rows / 2, times).terms == pytest.approx(cost.terms, rel=1e-3, abs=1e-9)


def test_calibration_refuses_a_short_run(tmp_path: Any) -> None:
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 2, "time/step_s": 1.0, "data/wait_s": 0.0}\n')
    with pytest.raises(UserError, match="0 usable records, wanted 8"):
        calibrate(make_plan(), metrics, 1)


@pytest.mark.parametrize(("per_step", "pack"), [(8, 1), (8, 2), (8, 8), (12, 3), (5, 1)])
def test_steps_hold_every_item_once(per_step: int, pack: int) -> None:
    costs = np.random.default_rng(0).lognormal(0, 1, per_step * 30)
    steps = compose(costs, per_step, pack, np.random.default_rng(1))
    assert steps.shape == (30, per_step)
    assert sorted(steps.ravel().tolist()) == list(range(len(costs)))
    again = compose(costs, per_step, pack, np.random.default_rng(1))
    assert (again == steps).all()
    sums = costs[steps].sum(axis=1)
    assert abs(np.corrcoef(sums[1:], sums[:-1])[0, 1]) < 0.5 or sums.std() < 0.05 * sums.mean()


@pytest.mark.parametrize("degree", [1, 2, 3, 7, 16, 40])
def test_dealing_gives_each_item_one_owner_and_no_one_too_many(degree: int) -> None:
    costs = np.random.default_rng(0).lognormal(0, 1, 32)
    owners, most = deal(costs, degree)
    assert most == -(-32 // degree) and owners.min() >= 0 and owners.max() < degree
    held = np.bincount(owners, minlength=degree)
    assert held.max() <= most and held.sum() == 32
    loads = np.bincount(owners, costs, minlength=degree)
    assert loads.max() <= max(costs.max(), 4 / 3 * costs.sum() / degree) + costs.max() / 3


def test_steps_come_in_the_order_that_is_drawn() -> None:
    """Of 60 steps of 4 micro-batches; sorted by cost, expensive steps would come last in every epoch."""
    costs = np.random.default_rng(0).permutation(240).astype(float)
    steps = compose(costs, 4, 1, np.random.default_rng(1))
    by_cost = np.argsort(costs, kind="stable").reshape(60, 4)
    assert np.array_equal(steps, by_cost[np.random.default_rng(1).permutation(60)])
    assert not np.array_equal(steps, by_cost)


@pytest.mark.parametrize("pack", [2, 3, 4])
def test_packs_cost_about_the_same(pack: int) -> None:
    """A fraction of how far apart they are when micro-batches are joined as they come."""
    costs = np.random.default_rng(0).uniform(1, 5, 240)
    packs = compose(costs, 12, pack, np.random.default_rng(1)).reshape(-1, pack)
    as_they_come = costs.reshape(-1, pack).sum(axis=1).std()
    assert costs[packs].sum(axis=1).std() < 0.25 * as_they_come
