"""Whole samples or parts of them: how a micro-batch is divided among the processes that can share its tokens.

A long clip is cut into as many parts as there are processes. Short ones need not be: 8 stills on 4 processes are 2 for
each, as many tokens as a quarter of every still, with nothing to exchange and a quarter of them to read and encode. In
between, samples are dealt to groups of processes, each of which cuts its own. The degree is the size of a group: all
processes for long clips, one for short ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from opensora.datasets.buckets.cost import CostConfig, largest_group


@dataclass(frozen=True, kw_only=True)
class SequenceSharing:
    """A process's place among those of its data-parallel rank."""

    degree: int  # processes that can share a sample
    rank: int = 0
    text_tokens: int  # of a sample, which processes hold beside its image tokens

    @property
    def degrees(self) -> tuple[int, ...]:
        """How many may share one: the divisors, ascending."""
        return tuple(d for d in range(1, self.degree + 1) if self.degree % d == 0)

    def local_rows(self, samples: int, degree: int) -> range:
        """Which of a micro-batch's samples this process has, where groups of ``degree`` processes divide them.

        Contiguous, and at most one more than any other group has; none where there are more groups than samples.
        """
        groups = self.degree // degree
        base, surplus = divmod(samples, groups)
        group = self.rank // degree
        start = group * base + min(group, surplus)
        return range(start, start + base + (group < surplus))


def times(features: np.ndarray, cost: CostConfig, sharing: SequenceSharing, most_tokens: float) -> np.ndarray:
    """(degrees, n) time of each micro-batch by the number of processes that share a sample; inf where memory forbids.

    No process may hold more tokens than it has of a micro-batch of ``most_tokens`` that all processes cut: having the
    choice takes no more memory. All processes on every sample are always allowed.

    Args:
        features: (n, 4) of ``cost.features``.
        most_tokens: image and text tokens of the largest micro-batch there is.
    """
    tokens = features[:, 2] / features[:, 1] + sharing.text_tokens  # of a sample
    found = []
    for degree in sharing.degrees:
        held = largest_group(features[:, 1], degree, sharing.degree) * tokens
        time = cost.shared(features, degree, sharing.degree)
        found.append(np.where(held * sharing.degree <= most_tokens * degree * (1 + 1e-9), time, np.inf))
    return np.stack(found)


def choose(times: np.ndarray, degrees: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """((n,) degree, (n,) time) of micro-batches: the fastest, and of equals the smallest degree."""
    best = times.argmin(axis=0)
    return np.array(degrees)[best], times.min(axis=0)
