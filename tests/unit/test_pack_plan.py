"""Packs of a step: every sample once, within the budget, the same for any number of processes, shared out evenly."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from opensora.datasets import DataConfig
from opensora.datasets.buckets.cost import CostConfig, FullAttention
from opensora.datasets.loading.loader import build_loader
from opensora.datasets.loading.reader import Batch, PackedBatch
from opensora.datasets.plan.batch_plan import BatchPlan, PackedSequence
from opensora.datasets.plan.sequence_packing import fill
from opensora.datasets.table.manifest import read_table
from opensora.utils.errors import UserError
from tests.unit.test_bucket import random_table
from tests.unit.test_loader import clips as clips
from tests.unit.test_plan import FIXED, ids_of

LONGEST = 27_200  # image tokens of a 480p clip of 17 frames at its largest size, and more than any other


def make_plan(budget: int, *, micro_batches: int = 16, pack: int = 4, rows: int = 3_000, seed: int = 3) -> BatchPlan:
    cfg = DataConfig(
        buckets=FIXED,
        micro_batches=micro_batches,
        balance_group=pack,
        tokens_per_sequence=budget,
        cost=CostConfig(per_batch=50.0, per_sample=20.0),
    )
    return BatchPlan(random_table(rows), cfg, 16, seed)


def tokens_of(pack: PackedSequence) -> int:
    return sum(
        len(part.sample_ids) * FullAttention(16)(part.bucket.frames, part.bucket.height, part.bucket.width)[0]
        for part in pack.parts
    )


@pytest.mark.parametrize("budget", [LONGEST, 3 * LONGEST])
def test_a_step_has_the_samples_it_has_without_packs(budget: int) -> None:
    plan, plain = make_plan(budget), make_plan(0)
    assert plan.steps_in_epoch(0) == plain.steps_in_epoch(0) and str(plan.report()) == str(plain.report())
    mixed = False
    for step in range(plan.steps_in_epoch(0) + 2):
        packs, micro_batches = plan.step(step), plain.step(step)
        assert sorted(ids_of(packs)) == sorted(ids_of(micro_batches))  # type: ignore[arg-type]
        assert plan.shapes(step) == plain.shapes(step)
        where = {sample: (m.bucket, m.epoch) for m in micro_batches for sample in m.sample_ids}  # type: ignore[union-attr]
        for pack in packs:
            assert isinstance(pack, PackedSequence) and 0 < tokens_of(pack) <= budget
            assert all(where[sample] == (part.bucket, part.epoch) for part in pack.parts for sample in part.sample_ids)
            assert len({part.bucket for part in pack.parts}) == len(pack.parts)
            mixed |= len({part.bucket.frames for part in pack.parts}) > 1
    assert mixed


@pytest.mark.parametrize("degree", [1, 2, 3, 4, 8])
def test_ranks_share_the_packs_exactly(degree: int) -> None:
    plan = make_plan(LONGEST)
    for step in range(0, plan.steps_in_epoch(0) + 1, 3):
        ranks = [plan.assign(step, rank, degree) for rank in range(degree)]
        assert len({len(mine) for mine in ranks}) == 1
        counted = [pack for mine in ranks for pack in mine if pack.weight]
        assert Counter(counted) == Counter(plan.step(step)) == Counter(make_plan(LONGEST).step(step))
        fillers = [pack for mine in ranks for pack in mine if not pack.weight]
        assert len(fillers) < degree
        assert all(part.weight == 0 for pack in fillers for part in pack.parts)  # type: ignore[union-attr]


@pytest.mark.parametrize(("budget", "count"), [(LONGEST, 12), (2 * LONGEST, 8), (3 * LONGEST, 4)])
def test_few_packs_of_like_cost(budget: int, count: int) -> None:
    """As many as processes that steps are to be even on, or a multiple; and no less even than micro-batches are."""
    plan, plain = make_plan(budget), make_plan(0)
    steps = range(plan.steps_in_epoch(0) - 1)  # the last one is smaller
    assert {len(plan.step(step)) for step in steps} == {count}
    assert np.mean([plan.idle(step, 4) for step in steps]) <= np.mean([plain.idle(step, 4) for step in steps])
    spread = [plan.costs(step).min() / plan.costs(step).max() for step in steps]
    assert np.mean(spread) > 0.9
    without = [plain.costs(step).min() / plain.costs(step).max() for step in steps]
    assert np.mean(without) < 0.5


def test_costs_are_those_of_samples_and_of_every_pack() -> None:
    plan, plain = make_plan(LONGEST), make_plan(0)
    for step in (0, 5):
        packs = plan.step(step)
        assert len(plan.costs(step)) == len(packs)
        for pack, cost in zip(packs, plan.costs(step), strict=True):
            alone = sum(plan.cost(part.bucket, len(part.sample_ids)) - 50.0 for part in pack.parts)
            assert cost == pytest.approx(50.0 + alone)
        found, without = plan.cost_features(step), plain.cost_features(step)
        assert found[0] == len(packs) and found[1:] == pytest.approx(without[1:])
        assert found @ [50.0, 20.0, 1.0, 1 / (6 * 3072)] == pytest.approx(plan.costs(step).sum())


def test_fill() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        tokens = rng.choice([1, 2, 5, 10], size=rng.integers(1, 60))
        budget, multiple = int(rng.integers(10, 40)), int(rng.integers(1, 5))
        owners = fill(tokens + 0.01 * tokens**2, tokens, budget, multiple)
        sums = np.bincount(owners, tokens)
        assert len(owners) == len(tokens) and (sums <= budget).all() and (sums > 0).all()
        assert len(sums) % multiple == 0 or len(sums) == len(tokens)
    assert fill(np.ones(3), np.array([4, 4, 4]), 12, 1).tolist() == [0, 0, 0]
    assert sorted(fill(np.ones(3), np.array([5, 5, 5]), 9, 1).tolist()) == [0, 1, 2]  # two would do by their sum


def test_a_sample_that_fits_no_sequence() -> None:
    with pytest.raises(
        UserError, match=r"data\.tokens_per_sequence=4096: a sample of bucket 480p .* are integers >= \d+"
    ):
        make_plan(4096)


def batches_of(clips: Path, workers: int, budget: int) -> list[Batch | PackedBatch]:
    table = read_table(str(clips / "t.csv"))
    buckets = {"32px": {1: [1.0, 1], 5: [1.0, 1], 9: [1.0, 1]}}
    cfg = DataConfig(
        buckets=buckets,
        micro_batches=6,
        balance_group=3,
        workers=workers,
        tokens_per_sequence=budget,
        unused_rows="report",
    )
    plan = BatchPlan(table, cfg, 8, seed=1)
    assert not budget or len(plan.step(0)) < 6
    found = list(build_loader(table, plan, cfg, start_step=0, stop_step=3, dp_rank=0, dp_degree=1, seed=1))
    planned = [m for step in range(3) for m in plan.assign(step, 0, 1)]
    for batch, wanted in zip(found, planned, strict=True):
        assert isinstance(batch, PackedBatch) == isinstance(wanted, PackedSequence)
        parts = batch.parts if isinstance(batch, PackedBatch) else (batch,)
        assert [(p.bucket, p.sample_ids) for p in parts] == [(p.bucket, p.sample_ids) for p in wanted.parts]
    return found


def test_the_loader_reads_packs(clips: Path) -> None:
    """Pixels and captions are those that the samples have one bucket at a time, whoever reads them."""
    alone = {(b.epoch, b.sample_ids): b for b in batches_of(clips, 0, 0) if isinstance(b, Batch)}
    by_sample = {
        (epoch, sample): (batch.pixels[i], batch.prompts[i])
        for (epoch, ids), batch in alone.items()
        for i, sample in enumerate(ids)
        if batch.pixels is not None
    }
    for workers in (0, 2):
        packs = batches_of(clips, workers, 128)
        assert any(len(pack.parts) > 1 for pack in packs)  # type: ignore[union-attr]
        seen = []
        for pack in packs:
            assert isinstance(pack, PackedBatch) and pack.weight == 1 and pack.replaced == ()
            assert pack.sample_ids == tuple(sample for part in pack.parts for sample in part.sample_ids)
            for part in pack.parts:
                for i, sample in enumerate(part.sample_ids):
                    pixels, prompt = by_sample[part.epoch, sample]
                    assert part.pixels is not None and torch.equal(part.pixels[i], pixels)
                    assert part.prompts[i] == prompt
                    seen.append((part.epoch, sample))
        assert sorted(seen) == sorted(by_sample)
