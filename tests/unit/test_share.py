"""Micro-batches over as many processes as pay: every sample once, processes in step, never slower than all on each."""

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from opensora.datasets import DataConfig
from opensora.datasets.cost import CostConfig, features
from opensora.datasets.plan import BatchPlan
from opensora.datasets.share import Sharing, rounds, times
from tests.unit.test_bucket import random_table
from tests.unit.test_plan import FIXED, make_plan

DEGREES = {1: (1,), 2: (1, 2), 4: (1, 2, 4), 6: (1, 2, 3, 6), 8: (1, 2, 4, 8)}


def dear_exchanges(pack: int) -> BatchPlan:
    cfg = DataConfig(buckets=FIXED, micro_batches=7, pack=pack, cost=CostConfig(exchange_tokens=2000.0))
    return BatchPlan(random_table(600), cfg, 16, 3)


def place(degree: int, rank: int = 0, text_tokens: int = 20) -> Sharing:
    return Sharing(degree=degree, rank=rank, text_tokens=text_tokens)


@pytest.mark.parametrize(("ranks", "degree"), [(1, 2), (2, 2), (1, 4), (3, 4), (2, 6), (1, 8), (5, 1)])
@pytest.mark.parametrize("pack", [1, 7])
def test_every_sample_of_a_step_once(ranks: int, degree: int, pack: int) -> None:
    plan, chosen = dear_exchanges(pack), Counter[int]()
    for step in range(0, 2 * plan.steps_in_epoch(0), 5):
        assert place(degree).degrees == DEGREES[degree]
        everyone = [[plan.assign(step, r, ranks, place(degree, k)) for k in range(degree)] for r in range(ranks)]
        by_round = list(zip(*(mine for rank in everyone for mine in rank), strict=True))  # as many for every process
        found: Counter[Any] = Counter()
        for of_round in by_round:
            (size,) = {m.degree for m in of_round}
            assert size in DEGREES[degree]
            chosen[size] += 1
            for first in range(0, ranks * degree, size):  # those that share one, within a data-parallel rank
                (one,) = set(of_round[first : first + size])
                found[replace(one, weight=1.0, degree=None)] += one.weight == 1.0
                assert one.weight in (0.0, 1.0)
        assert {m: count for m, count in found.items() if count} == Counter(plan.step(step))
        assert len(by_round) <= -(-len(plan.step(step)) // ranks)
    assert set(chosen) > {degree} or degree == 1  # the choice was made
    assert plan.step(3) == dear_exchanges(pack).step(3)


def everything(times: np.ndarray, degrees: tuple[int, ...], processes: int, items: list[int]) -> float:
    """The least time, by trying every sequence of degrees."""
    if not items:
        return 0.0
    return min(
        times[number, items[: processes // d]].max() + everything(times, degrees, processes, items[processes // d :])
        for number, d in enumerate(degrees)
    )


@pytest.mark.parametrize("seed", range(12))
def test_no_sequence_of_degrees_is_faster(seed: int) -> None:
    generator = np.random.default_rng(seed)
    degree, ranks = int(generator.choice([2, 4, 6])), int(generator.integers(1, 4))
    rows = features(generator.integers(1, 5, 9).astype(float), generator.integers(1, 4000, 9).astype(float))
    cost = CostConfig(per_batch=300.0 * (seed % 3), exchange_tokens=50.0 * (seed % 4))
    most = float((rows[:, 2] + 20 * rows[:, 1]).max())
    table = times(rows, cost, place(degree), most)
    degrees = DEGREES[degree]
    found = rounds(table, degrees, ranks * degree)
    order = np.argsort(-table[-1], kind="stable").tolist()
    assert sum(one.time for one in found) == pytest.approx(everything(table, degrees, ranks * degree, order))
    wide = rounds(table[-1:], degrees[-1:], ranks * degree)
    assert sum(one.time for one in found) <= sum(one.time for one in wide)
    for one in found:
        row = table[degrees.index(one.degree)]
        assert np.isfinite(row[one.items]).all() and one.time == row[one.items[one.counts]].max()


def test_no_process_holds_more_than_of_the_largest_when_all_share() -> None:
    plan = make_plan()
    largest = max(
        b.batch_size * (plan._buckets._tokens(b.frames, b.height, b.width) + 20) for b in plan._buckets.buckets
    )
    narrow = 0
    for step in range(0, plan.steps_in_epoch(0), 3):
        for m in plan.assign(step, 0, 1, place(4)):
            tokens = len(m.sample_ids) * (plan._buckets._tokens(m.bucket.frames, m.bucket.height, m.bucket.width) + 20)
            assert m.degree is not None and tokens * 4 <= largest * m.degree
            narrow += m.degree < 4
    assert narrow


def test_what_exchanges_cost_decides() -> None:
    """Free exchanges and rounds leave nothing to gain; dear rounds, or dear exchanges, make many items of a round."""

    def mean_degree(**cost: float) -> float:
        cfg = DataConfig(buckets=FIXED, micro_batches=8, cost=CostConfig(**cost))
        plan = BatchPlan(random_table(600), cfg, 16, 3)
        return float(np.mean([m.degree for step in range(30) for m in plan.assign(step, 0, 1, place(4))]))

    dear = mean_degree(exchange_tokens=1e5)
    assert dear < mean_degree(exchange_tokens=1.0) <= 4.0
    assert mean_degree(per_batch=1e6, exchange=0.0, exchange_tokens=0.0) == pytest.approx(dear, rel=0.2)


def test_a_short_step_leaves_processes_without_and_in_step() -> None:
    found = rounds(np.array([[2.0, 2.0, 2.0], [9.0, 9.0, 9.0]]), (1, 4), 4)
    assert [(one.degree, sorted(one.items[one.counts]), int(one.counts.sum())) for one in found] == [(1, [0, 1, 2], 3)]
    assert found[0].items[~found[0].counts] == [2]  # the cheapest is repeated


def test_times_of_degrees() -> None:
    rows = features(np.array([2.0]), np.array([1000.0]))
    cost = CostConfig(per_batch=50.0, per_token2=0.0, exchange=0.1, exchange_tokens=30.0)
    assert cost.shared(rows, 1, 4) == pytest.approx([50 + 4 * 2000])
    assert cost.shared(rows, 2, 4) == pytest.approx([50 + 2 * 2000 + 4 * (30 + 0.1 * 2000 / 4)])
    assert cost.shared(rows, 4, 4) == pytest.approx([50 + 2000 + 4 * (30 + 0.1 * 2000 * 3 / 16)])
