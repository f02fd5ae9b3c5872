"""Histograms: where bars begin and end, and how many clips each has."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

BINS = 36
_SKEW = 8.0  # of the largest values over the usual one, from which an axis is logarithmic
_OUTER = 0.005  # of the clips on each side that the outermost bars may gather


@dataclass(frozen=True)
class Axis:
    """Values to places between 0 and 1."""

    low: float
    high: float
    is_log: bool

    def at(self, values: np.ndarray | float) -> np.ndarray:
        """(n,) in [0, 1]: what is beyond an end is at it."""
        low, high = self._scaled(self.low), self._scaled(self.high)
        clipped = np.clip(np.asarray(values, dtype=np.float64), self.low, self.high)
        return (self._scaled(clipped) - low) / (high - low)

    def value(self, place: float) -> float:
        """The reverse."""
        low, high = float(self._scaled(self.low)), float(self._scaled(self.high))
        scaled = low + place * (high - low)
        return math.exp(scaled) if self.is_log else scaled

    def ticks(self) -> list[float]:
        """Round values, three to eight of them."""
        if self.is_log:
            exponents = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            steps = (1, 3) if len(exponents) <= 4 else (1,)
            found = [step * 10.0**exponent for exponent in exponents for step in steps]
        else:
            step = _round_step((self.high - self.low) / 8)
            first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
            found = [step * number for number in range(first, last + 1)]
        return [tick for tick in found if self.low * (1 - 1e-9) <= tick <= self.high * (1 + 1e-9)]

    def _scaled(self, values: np.ndarray | float) -> np.ndarray:
        return np.log(values) if self.is_log else np.asarray(values, dtype=np.float64)


def _round_step(least: float) -> float:
    """1, 2 or 5 times a power of ten, no less."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= least * (1 - 1e-9))


def axis_of(values: np.ndarray, marks: Sequence[float]) -> Axis:
    """From the least to the most, but for what lies far out; ``marks``, which are thresholds, are on it, and a bar
    begins at the first of them."""
    low, high = (float(value) for value in np.quantile(values, (_OUTER, 1 - _OUTER), method="nearest"))
    low, high = min([low, *marks]), max([high, *marks])
    if low > 0 and high > _SKEW * float(np.median(values)):
        low, high = _begun_at(marks, math.log(low / 1.1), math.log(high * 1.1), math.log)
        return Axis(math.exp(low), math.exp(high), True)
    margin = 0.03 * (high - low) or 0.5 * abs(high) or 0.5
    low = 0.0 if 0 <= low < margin else low - margin
    return Axis(*_begun_at(marks, low, high + margin, float), False)


def _begun_at(marks: Sequence[float], low: float, high: float, scaled: Callable[[float], float]) -> tuple[float, float]:
    """The ends of an axis of bars of one width, one of which begins at the first mark."""
    if not marks:
        return low, high
    wide = (high - low) / (BINS - 1)
    begin = scaled(marks[0]) - math.ceil((scaled(marks[0]) - low) / wide) * wide
    return begin, begin + BINS * wide


def counts(values: np.ndarray, axis: Axis) -> np.ndarray:
    """(BINS,) how many values each bar has; the outermost have what is beyond them as well."""
    place = np.minimum((axis.at(values) * BINS + 1e-9).astype(np.int64), BINS - 1)
    return np.bincount(place, minlength=BINS)
