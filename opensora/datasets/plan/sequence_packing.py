"""Which samples of a step share a sequence. Costs and tokens in, numbers of sequences out; nothing else is known."""

import heapq

import numpy as np


def fill(costs: np.ndarray, tokens: np.ndarray, budget: int, multiple: int) -> np.ndarray:
    """(n,) int64: the sequence of every sample, numbered from 0; none has more than ``budget`` tokens, none is empty.

    There are as few sequences as the budget allows, in multiples of ``multiple`` (fewer only where there are fewer
    samples), and they cost as much as each other as a greedy rule gets them: the most expensive sample first, to the
    sequence that costs least so far and has room.

    Args:
        tokens: (n,) int64, none above ``budget``.
    """
    count = multiple * -(-int(tokens.sum()) // (budget * multiple))
    while (owners := _longest_first(costs, tokens, budget, count)) is None:
        count += multiple
    return np.unique(owners, return_inverse=True)[1]


def _longest_first(costs: np.ndarray, tokens: np.ndarray, budget: int, count: int) -> np.ndarray | None:
    """(n,) the sequence of every sample, or None if some sample finds no room in any of ``count``."""
    owners = np.empty(len(costs), dtype=np.int64)
    room = [budget] * count
    loads = [(0.0, sequence) for sequence in range(count)]
    for sample in np.argsort(-costs, kind="stable").tolist():
        needed, too_full = int(tokens[sample]), []
        while loads and room[loads[0][1]] < needed:
            too_full.append(heapq.heappop(loads))
        if not loads:
            return None
        load, sequence = heapq.heappop(loads)
        owners[sample] = sequence
        room[sequence] -= needed
        for entry in (*too_full, (load + float(costs[sample]), sequence)):
            heapq.heappush(loads, entry)
    return owners
