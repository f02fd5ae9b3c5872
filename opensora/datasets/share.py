"""Over how many processes each micro-batch of a step is spread, where that may be chosen.

A data-parallel place has several processes that can share a micro-batch's tokens. A long clip should have them all. A
short one is better computed by fewer, each on clips of its own: fewer or no exchanges, and more tokens in every
product. A step is cut into rounds. In one round the processes of the whole run work at one degree, so that they meet
the same collectives in the same order; the next round may have another.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from opensora.datasets.cost import CostConfig


@dataclass(frozen=True, kw_only=True)
class Sharing:
    """A process's place among those of its data-parallel rank."""

    degree: int  # processes that can share a micro-batch
    rank: int = 0
    text_tokens: int  # of a sample, which processes hold beside its image tokens

    @property
    def degrees(self) -> tuple[int, ...]:
        """How many may share one: the divisors, ascending."""
        return tuple(d for d in range(1, self.degree + 1) if self.degree % d == 0)


class Round(NamedTuple):
    """What all processes do at the same time; those that share an item have consecutive numbers."""

    degree: int  # processes that share an item
    items: np.ndarray  # (processes / degree,) int64: the item of each group of them
    counts: np.ndarray  # (processes / degree,) bool: False where the item is another group's, repeated to keep in step
    time: float


def times(features: np.ndarray, cost: CostConfig, sharing: Sharing, most_tokens: float) -> np.ndarray:
    """(degrees, n) time of each micro-batch by the number of processes that share it; inf where they may not be so few.

    No process holds more tokens than it would of a micro-batch of ``most_tokens`` that all share, so that memory does
    not grow.

    Args:
        features: (n, 4) of ``cost.features``.
        most_tokens: image and text tokens of the largest micro-batch there is.
    """
    tokens = features[:, 1] * sharing.text_tokens + features[:, 2]
    found = np.stack([cost.shared(features, degree, sharing.degree) for degree in sharing.degrees])
    found[np.array(sharing.degrees)[:, None] * most_tokens < tokens * sharing.degree] = np.inf
    return found


def rounds(times: np.ndarray, degrees: Sequence[int], processes: int) -> list[Round]:
    """The rounds of a step, longest items first, whose sum of times is the least there is.

    Items are taken in order of their time; a round takes the next ``processes / degree`` of them and lasts as long as
    its longest. Which degrees follow each other is found exactly, from the best ways to have done the first n items.
    All items at the last degree is one of the ways: nothing is lost by having the choice.

    Args:
        times: (degrees, n) of every item; finite at the last degree.
        degrees: divisors of ``processes``.
    """
    order = np.argsort(-times[-1], kind="stable")
    ordered, count = times[:, order], len(order)
    least = np.full(count + 1, np.inf)
    least[0] = 0.0
    before: list[tuple[int, int]] = [(0, 0)] * (count + 1)  # (items done before the round, number of its degree)
    for done in range(count):
        if np.isinf(least[done]):
            continue
        for number, degree in enumerate(degrees):
            after = min(count, done + processes // degree)
            total = least[done] + ordered[number, done:after].max()
            if total < least[after]:
                least[after], before[after] = total, (done, number)
    cuts = []
    done = count
    while done:
        start, number = before[done]
        cuts.append((start, done, number))
        done = start
    return _dealt([(order[start:end], number) for start, end, number in reversed(cuts)], times, degrees, processes)


def _dealt(
    chosen: Sequence[tuple[np.ndarray, int]], times: np.ndarray, degrees: Sequence[int], processes: int
) -> list[Round]:
    """Who gets which item of a round, most expensive first: the group with the least to do so far."""
    loads, dealt = np.zeros(processes), []
    for mine, number in chosen:
        degree = degrees[number]
        groups = loads.reshape(-1, degree)  # a view
        by_load = np.argsort(groups.max(axis=1), kind="stable")
        items = np.full(len(groups), mine[-1])  # the cheapest, for those that get none
        counts = np.zeros(len(groups), dtype=bool)
        items[by_load[: len(mine)]] = mine
        counts[by_load[: len(mine)]] = True
        groups += np.where(counts, times[number, items], 0.0)[:, None]
        dealt.append(Round(degree, items, counts, float(times[number, mine].max())))
    return dealt
