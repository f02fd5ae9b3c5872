"""Freezes: time in which the picture stays as it is."""

import numpy as np

_REFINED = (6.0, 2.0)  # times the limits of change and peak: what an encoder still adds to a picture that stays
_AROUND = 2  # frames on both sides of such a one that are still


def still_frames(change: np.ndarray, peak: np.ndarray, most_change: float, most_peak: float) -> np.ndarray:
    """(frames,) bool: whether a frame is like the one before.

    Encoders send the details of a picture bit by bit, every third or fourth frame a few: a small change between frames
    without any is none either. A thing that moves changes every frame, or by more.

    Args:
        change, peak: (frames,) mean and largest difference from the frame before.
        most_change, most_peak: what is no difference.
    """
    exact = (change <= most_change) & (peak <= most_peak)
    refined = (change <= _REFINED[0] * most_change) & (peak <= _REFINED[1] * most_peak)
    padded = np.pad(exact, _AROUND, constant_values=False)
    sides = [padded[_AROUND + shift : len(padded) - _AROUND + shift] for shift in range(-_AROUND, _AROUND + 1) if shift]
    still: np.ndarray = exact | (refined & np.all(sides, axis=0))
    return still


def frozen_s(times: np.ndarray, still: np.ndarray, least_s: float) -> float:
    """Seconds of a clip in which a picture is shown for longer than ``least_s``, over all such pictures.

    Args:
        times: (frames + 1,): when each is shown, and when the last one ends; in seconds.
        still: (frames,): whether a frame is like the one before; that of the first is not asked.
    """
    changes = np.flatnonzero(~still[1:]) + 1  # frames that show something new
    starts, ends = np.append(0, changes), np.append(changes, len(still))
    lengths = times[ends] - times[starts]
    return float(lengths[lengths >= least_s].sum())
