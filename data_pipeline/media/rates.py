"""Frames at any times to frames at a constant rate."""

from dataclasses import dataclass
from fractions import Fraction

import numpy as np

_NEAR = 0.1  # of the usual distance of two frames: such steps are the usual one, measured in a coarse unit of time
_MOSTLY = 0.8  # of the steps: then the others are gaps in a constant rate
_SLOWEST = Fraction(1, 1001)
_ROUNDING = 2e-4  # of a rate that times in a fine unit give


@dataclass(frozen=True)
class ConstantRate:
    """What is shown when."""

    rate: Fraction  # frames a second
    frames: np.ndarray  # (n,) int64: which of the given frames each one is, ascending, some twice or left out


def at_constant_rate(pts: np.ndarray, base: Fraction, end: int, most: float) -> ConstantRate:
    """Frames of a range at its own rate, or at a whole part of it where that is above ``most``.

    Of a constant rate every frame is taken once, or every second or third one, however its times are rounded. Of a
    variable one each moment shows the frame whose time is nearest.

    Args:
        pts: (n,) int64, in order, in units of ``base`` seconds.
        end: when the last one ends.
        most: frames a second.
    """
    times = np.maximum.accumulate(np.asarray(pts, dtype=np.int64)) - int(pts[0])
    count, span = len(times), int(times[-1])
    if span == 0:  # one frame, or no times
        seconds = float(max(end - int(pts[0]), 1) * base)
        return ConstantRate(min(_known(count / seconds, 0.0), Fraction(most).limit_denominator(1001)), np.arange(count))
    seconds = float(span * base)
    own = _known(_usual_rate(times, base), float(base) / seconds)
    every = max(1, int(np.ceil(float(own) / most - 1e-3)))
    rate = own / every
    even = np.arange(count) * (span / (count - 1))
    if np.max(np.abs(times - even)) * float(base * own) <= 0.5:
        return ConstantRate(rate, np.arange(0, count, every))
    moments = np.arange(round(seconds * rate) + 1) / float(rate * base)
    return ConstantRate(rate, _nearest(times, moments))


def _usual_rate(times: np.ndarray, base: Fraction) -> float:
    """Of the steps that most frames keep to; the mean of all where there is no such step."""
    steps = np.diff(times)
    usual = float(np.median(steps))
    near = np.abs(steps - usual) <= max(1.0, _NEAR * usual)
    step = float(np.mean(steps[near] if usual > 0 and np.mean(near) >= _MOSTLY else steps))
    return 1.0 / (step * float(base))


def _known(rate: float, uncertain: float) -> Fraction:
    """The rate that this one was measured of: a whole number, one of television, else what is simple."""
    whole = round(rate)
    likely = [Fraction(whole), Fraction(1000 * whole, 1001)] if whole else []
    best = min(likely, key=lambda one: abs(float(one) - rate), default=None)
    if best is not None and abs(float(best) / rate - 1) <= min(5e-3, max(_ROUNDING, uncertain)):
        return best
    return max(Fraction(rate).limit_denominator(1001), _SLOWEST)


def _nearest(times: np.ndarray, moments: np.ndarray) -> np.ndarray:
    after = np.clip(np.searchsorted(times, moments), 1, len(times) - 1)
    before = after - 1
    return np.where(moments - times[before] <= times[after] - moments, before, after)
