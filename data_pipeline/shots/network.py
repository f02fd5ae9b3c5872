"""Transitions by the probabilities of TransNetV2."""

from collections.abc import Iterator

import numpy as np

from data_pipeline.shots.transitions import Transition

_CUT = 3  # frames that are within a transition at most, if it is a cut


def network_transitions(middle: np.ndarray, within: np.ndarray, threshold: float) -> list[Transition]:
    """In order of time.

    Args:
        middle, within: (n,) probabilities of each frame: ``TransnetAnalyser``.
    """
    wide = list(_runs(within > threshold))
    found = []
    for first, last in _runs(middle > threshold):
        around = next(((a, b) for a, b in wide if a <= last and first <= b), (first, last))
        if around[1] - around[0] < _CUT:
            found.append(Transition("cut", last + 1, last + 1))
        else:
            found.append(Transition("gradual", around[0], around[1] + 1))
    return list(dict.fromkeys(found))


def _runs(is_high: np.ndarray) -> Iterator[tuple[int, int]]:
    """(first, last) of each run of true values."""
    steps = np.diff(np.concatenate([[0], is_high.astype(np.int8), [0]]))
    yield from zip(np.flatnonzero(steps == 1).tolist(), (np.flatnonzero(steps == -1) - 1).tolist(), strict=True)
