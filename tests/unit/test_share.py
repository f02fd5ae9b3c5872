"""Samples cut over as many processes as pay: every one once, processes in step, never slower than all cut by all."""

from collections import Counter

import numpy as np
import pytest

from opensora.datasets import DataConfig
from opensora.datasets.buckets.cost import CostConfig, features
from opensora.datasets.plan.batch_plan import BatchPlan
from opensora.datasets.plan.dynamic_sp import SequenceSharing, choose, times
from tests.unit.test_bucket import random_table
from tests.unit.test_plan import FIXED

TEXT = 20
DEGREES = {1: (1,), 2: (1, 2), 4: (1, 2, 4), 6: (1, 2, 3, 6), 8: (1, 2, 4, 8)}


def make_plan(pack: int = 1, **cost: float) -> BatchPlan:
    cfg = DataConfig(buckets=FIXED, micro_batches=7, balance_group=pack, cost=CostConfig(**cost))
    return BatchPlan(random_table(600), cfg, 16, 3)


def place(degree: int, rank: int = 0) -> SequenceSharing:
    return SequenceSharing(degree=degree, rank=rank, text_tokens=TEXT)


@pytest.mark.parametrize("degree", DEGREES)
@pytest.mark.parametrize("samples", [1, 2, 3, 7, 8, 130])
def test_groups_divide_the_samples(degree: int, samples: int) -> None:
    assert place(degree).degrees == DEGREES[degree]
    for size in DEGREES[degree]:
        parts = [place(degree, rank).local_rows(samples, size) for rank in range(degree)]
        assert [i for part in parts[::size] for i in part] == list(range(samples))
        assert all(parts[rank] == parts[rank // size * size] for rank in range(degree))
        assert max(map(len, parts)) == -(-samples * size // degree) and max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize(("ranks", "degree"), [(1, 2), (2, 2), (1, 4), (3, 4), (2, 6), (1, 8), (5, 1)])
@pytest.mark.parametrize("pack", [1, 7])
def test_every_sample_of_a_step_once(ranks: int, degree: int, pack: int) -> None:
    plan, chosen = make_plan(pack), Counter[int]()
    for step in range(0, 2 * plan.steps_in_epoch(0), 5):
        found: Counter[int] = Counter()
        rounds = set()
        for rank in range(ranks):
            peers = [plan.assign(step, rank, ranks, place(degree, k)) for k in range(degree)]
            rounds |= {len(mine) for mine in peers}
            for together in zip(*peers, strict=True):
                (size,) = {m.degree for m in together}
                assert size in DEGREES[degree] and len({m.bucket for m in together}) == 1
                chosen[size] += 1
                for first in range(0, degree, size):
                    (one,) = set(together[first : first + size])  # those that cut the same samples
                    assert one.weight in (0.0, 1.0) and one.sample_ids
                    found.update(one.sample_ids * int(one.weight))
        assert rounds == {-(-len(plan.step(step)) // ranks)}  # as many for every process
        assert found == Counter(i for m in plan.step(step) for i in m.sample_ids)
    assert len(chosen) > 1 or degree == 1  # the choice was made
    assert plan.step(3) == make_plan(pack, exchange=9.0).step(3)  # no cost of sharing changes what a step is


@pytest.mark.parametrize("seed", range(8))
def test_the_fastest_allowed_degree_is_chosen(seed: int) -> None:
    generator = np.random.default_rng(seed)
    degree = int(generator.choice([2, 4, 6, 8]))
    rows = features(generator.integers(1, 30, 50).astype(float), generator.integers(1, 4000, 50).astype(float))
    cost = CostConfig(per_batch=300.0, exchange_tokens=50.0 * (seed % 4), encode_tokens=100.0 * (seed % 3))
    held = rows[:, 2] + TEXT * rows[:, 1]
    table = times(rows, cost, place(degree), held.max())
    chosen, seconds = choose(table, DEGREES[degree])
    for item in range(50):
        ways = {}
        for size in DEGREES[degree]:
            most = max(len(place(degree, rank).local_rows(int(rows[item, 1]), size)) for rank in range(degree))
            if most * held[item] / rows[item, 1] / size <= held.max() / degree * (1 + 1e-9):
                ways[size] = cost.shared(rows[item : item + 1], size, degree).item()
        assert chosen[item] in ways and seconds[item] == min(ways.values()) == ways[chosen[item]]
    assert len(set(chosen.tolist())) > 1


# (samples, image tokens of each) -> the degree on four processes
SHAPES = {
    (8, 256): 1,  # two stills for each
    (4, 2304): 1,
    (2, 8448): 2,  # two processes on each clip
    (1, 20000): 4,
    (3, 8448): 4,  # does not divide: one group would have twice as much as the others
    (130, 256): 1,  # nearly divides
}


def test_long_clips_are_cut_and_short_ones_are_not() -> None:
    rows = features(*(np.array(column, dtype=float) for column in zip(*SHAPES, strict=True)))

    def chosen(cost: CostConfig, most: float) -> list[int]:
        return choose(times(rows, cost, place(4), most), place(4).degrees)[0].tolist()

    assert chosen(CostConfig(), 1e9) == list(SHAPES.values())
    # 33 stills on a process would be more tokens than a quarter of 130; 65 on two are as many.
    assert chosen(CostConfig(), 130 * (256 + TEXT)) == [1, 1, 2, 4, 4, 2]
    slow_net = CostConfig(exchange=100.0)
    assert chosen(slow_net, 1e9) == [1] * len(SHAPES)
    assert chosen(slow_net, 130 * (256 + TEXT)) == [1, 1, 1, 4, 1, 2]


def test_times_of_degrees() -> None:
    rows = features(np.array([6.0]), np.array([1000.0]))
    cost = CostConfig(
        per_batch=50.0, per_sample=7.0, per_token2=0.0, exchange=0.1, exchange_tokens=30.0, encode_tokens=9
    )
    assert cost.shared(rows, 1, 4) == pytest.approx([50 + 4 * 2 * (1007 + 9)])  # two samples at most
    assert cost.shared(rows, 2, 4) == pytest.approx([50 + 4 * (3 * (1007 / 2 + 9) + 30 + 0.1 * 3000 / 4)])
    assert cost.shared(rows, 4, 4) == pytest.approx([50 + 4 * (6 * (1007 / 4 + 9) + 30 + 0.1 * 6000 * 3 / 16)])
    assert CostConfig(exchange=0.0, exchange_tokens=0.0).shared(rows, 4, 4) == pytest.approx(rows @ CostConfig().terms)
