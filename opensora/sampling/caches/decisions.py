"""When a step reuses what an earlier one computed: one object per pass of guidance and clip, on numbers alone.

``reuses`` is called once per evaluation of the pass. ``change`` is the mean absolute change of what the cache looks
at, relative to the mean absolute value that it had before: in the last step computed in full (first-block cache,
DBCache) or in the step before (TeaCache). None: there is nothing before, or the cache looks at nothing.
"""

from typing import ClassVar, Protocol

from opensora.sampling.cache_config import DBCache, FirstBlockCache, MagCache, TeaCache
from opensora.sampling.evaluation import Evaluation


class Decisions(Protocol):
    """The decisions of one pass."""

    since: ClassVar[str]  # the step that a change is measured from: "full" or "before"; "none": no change is measured

    def reuses(self, change: float | None, at: Evaluation) -> bool:
        """Whether this evaluation reuses; never the first one."""


class FirstBlockDecisions:
    """change <= threshold reuses."""

    since: ClassVar[str] = "full"

    def __init__(self, cfg: FirstBlockCache) -> None:
        self.cfg = cfg

    def reuses(self, change: float | None, at: Evaluation) -> bool:
        return change is not None and change <= self.cfg.threshold


class DBDecisions:
    """change < threshold reuses, within the limits."""

    since: ClassVar[str] = "full"

    def __init__(self, cfg: DBCache) -> None:
        self.cfg = cfg
        self._reused = self._in_a_row = 0

    def reuses(self, change: float | None, at: Evaluation) -> bool:
        cfg = self.cfg
        full = (
            change is None
            or not change < cfg.threshold
            or at.step < cfg.warmup_steps
            or (cfg.max_reuses > 0 and self._reused >= cfg.max_reuses)
            or (cfg.max_in_a_row > 0 and self._in_a_row >= cfg.max_in_a_row)
        )
        self._reused += not full
        self._in_a_row = 0 if full else self._in_a_row + 1
        return not full


class TeaDecisions:
    """Changes from step to step, rescaled by a polynomial, are added up; below the threshold their sum reuses.

    The first and the last step compute, and so does a sum that reaches the threshold; each starts a new sum.
    """

    since: ClassVar[str] = "before"

    def __init__(self, cfg: TeaCache) -> None:
        self.cfg = cfg
        self._sum = 0.0

    def reuses(self, change: float | None, at: Evaluation) -> bool:
        if change is None or at.step in (0, at.steps - 1):
            self._sum = 0.0
            return False
        self._sum += self._rescaled(change)
        if self._sum < self.cfg.threshold:
            return True
        self._sum = 0.0
        return False

    def _rescaled(self, change: float) -> float:
        value = 0.0
        for coefficient in self.cfg.polynomial:
            value = value * change + coefficient
        return value


class MagDecisions:
    """The error of a reuse is how far the product of the ratios since the last full step is from 1; errors add up."""

    since: ClassVar[str] = "none"

    def __init__(self, cfg: MagCache) -> None:
        self.cfg = cfg
        self._computed = False
        self._new_window()

    def _new_window(self) -> None:
        self._product, self._error, self._in_a_row = 1.0, 0.0, 0

    def reuses(self, change: float | None, at: Evaluation) -> bool:
        if at.step < int(self.cfg.retention * at.steps + 0.5):
            self._computed = True
            return False
        self._product *= self._ratio(at)
        self._error += abs(1 - self._product)
        self._in_a_row += 1
        if self._computed and self._error <= self.cfg.threshold and self._in_a_row <= self.cfg.max_in_a_row:
            return True
        self._computed = True
        self._new_window()
        return False

    def _ratio(self, at: Evaluation) -> float:
        """Of the nearest calibrated step."""
        last = len(self.cfg.ratios) - 1
        return self.cfg.ratios[last if at.steps == 1 else round(at.step * last / (at.steps - 1))]
