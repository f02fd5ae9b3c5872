"""Steps whose micro-batches can be shared out evenly, and the sharing. Costs in, positions out; nothing else is known.

Every process waits for the slowest one at the end of a step, so what counts is the largest load of a step. Two
decisions keep it down. ``compose`` puts micro-batches of like cost into one step, which makes the step even for any
number of processes; it may not know how many there are. ``deal`` then gives each process its share.
"""

import heapq

import numpy as np


def compose(costs: np.ndarray, per_step: int, pack: int, generator: np.random.Generator) -> np.ndarray:
    """(steps, per_step) int64: which items make each step; every item once, steps in random order.

    Items are joined to packs of ``pack`` whose sums differ as little as possible, packs are sorted by sum, and a step
    takes consecutive ones. With pack=1 a step holds items of one cost. With larger packs it holds all kinds, and can
    be shared out evenly among as many processes as it has packs, or a divisor of that many.

    Args:
        costs: (n,) in random order, n a multiple of ``per_step`` and that of ``pack``.
    """
    packs = _packs(costs, pack)  # (n / pack, pack)
    packs = packs[np.argsort(costs[packs].sum(axis=1), kind="stable")]
    steps = packs.reshape(-1, per_step)
    return steps[generator.permutation(len(steps))]


def deal(costs: np.ndarray, degree: int) -> tuple[np.ndarray, int]:
    """(owner of each item, items per process): loads as even as two greedy rules get them.

    No process has more than items per process, n / degree rounded up; some have fewer where it does not divide.
    """
    most = -(-len(costs) // degree)
    ways = [_longest_first(costs, degree, most)]
    if len(costs) == most * degree:
        owners = np.empty(len(costs), dtype=np.int64)
        owners[_packs(costs, most)] = np.arange(degree)[:, None]
        ways.append(owners)
    return min(ways, key=lambda owners: np.bincount(owners, costs, minlength=degree).max()), most


def _packs(costs: np.ndarray, size: int) -> np.ndarray:
    """(n / size, size): items joined so that sums are close: the next cheaper n / size items in each round, the most
    expensive of them to the smallest sum so far."""
    order = np.argsort(-costs, kind="stable").reshape(size, -1)
    packs = order[:1].T  # (n / size, 1)
    for items in order[1:]:
        by_sum = np.argsort(costs[packs].sum(axis=1), kind="stable")
        packs = np.concatenate([packs[by_sum], items[:, None]], axis=1)
    return packs


def _longest_first(costs: np.ndarray, degree: int, most: int) -> np.ndarray:
    """Each item, most expensive first, to the least loaded process that still has room."""
    owners = np.empty(len(costs), dtype=np.int64)
    loads = [(0.0, 0, process) for process in range(degree)]
    for item in np.argsort(-costs, kind="stable").tolist():
        load, held, process = heapq.heappop(loads)
        owners[item] = process
        if held + 1 < most:
            heapq.heappush(loads, (load + float(costs[item]), held + 1, process))
    return owners
