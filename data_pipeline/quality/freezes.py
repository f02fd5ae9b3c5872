"""Freezes: time in which the picture stays as it is."""

import numpy as np


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
