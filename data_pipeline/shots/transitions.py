"""What lies between two shots."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True)
class Transition:
    """Frames [first, end) belong to neither shot; of a cut first is end, the first frame of the next shot."""

    kind: str  # cut or gradual
    first: int
    end: int

    def middle(self, times: np.ndarray) -> float:
        """Seconds; ``times`` are those of all frames."""
        return float(times[self.first] + times[min(self.end, len(times) - 1)]) / 2


def merged(found: Sequence[Transition], times: np.ndarray, apart_s: float) -> list[Transition]:
    """In order of time; those that follow one another within ``apart_s`` are one: what lies between is no shot."""
    kept: list[Transition] = []
    for each in sorted(found, key=lambda one: (one.first, one.end)):
        before = kept[-1] if kept else None
        if before is None or times[min(each.first, len(times) - 1)] - times[min(before.end, len(times) - 1)] >= apart_s:
            kept.append(each)
        elif each != before:
            kept[-1] = replace(before, kind="gradual", end=max(before.end, each.end))
    return kept
