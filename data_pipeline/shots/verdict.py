"""What a detector's cut is: a cut, part of a transition that takes a while, or none, as a flash or a jerk is none."""

import numpy as np

from data_pipeline.shots.thumbs import Thumbs, likeness

_REACH_S = 0.45  # before and after
# Two moments before and after are of one shot if they are alike enough, or if what lies between is further from both
# than this many times what they differ by, or if there is something of both.
_SAME, _AWAY = 0.97, 1.5
_ALIKE, _OFF = 0.88, 0.5
_SUDDEN = 0.5  # of all change around a cut: what its one step makes of it


def is_refuted(thumbs: Thumbs, cut: int, time_s: float) -> bool:
    """Whether some moment after it shows what one before it showed: the view jerked, or there was a flash."""
    before, after = _around(thumbs, cut, time_s)
    if not (before and after):
        return False
    near = {index: thumbs.pictures[index].astype(np.int16) for index in (*before, *after)}

    def apart(a: int, b: int) -> float:
        return float(np.abs(near[a] - near[b]).mean())

    for a in before:
        for b in after:
            off = max(min(apart(a, m), apart(m, b)) for m in (before[-1], after[0])) / max(apart(a, b), 0.5)
            alike = likeness(thumbs.pictures[a], thumbs.pictures[b])
            if alike > _SAME or off > _AWAY or (alike > _ALIKE and off > _OFF):
                return True
    return False


def is_sudden(thumbs: Thumbs, cut: int, time_s: float) -> bool:
    """Whether the picture changed in one step, and not on the way from or to black, or to another picture."""
    before, after = _around(thumbs, cut, time_s)
    if not (len(before) and len(after)):
        return True
    near = {index: thumbs.pictures[index].astype(np.int16) for index in (*before, *after)}
    step = np.abs(near[before[-1]] - near[after[0]]).mean()
    most = max(np.abs(near[a] - near[b]).mean() for a in before for b in after)
    return bool(step > _SUDDEN * most)


def _around(thumbs: Thumbs, cut: int, time_s: float) -> tuple[list[int], list[int]]:
    """Thumbnails within reach before a cut, and from it on."""
    middle = int(np.searchsorted(thumbs.frames, cut))
    first = int(np.searchsorted(thumbs.seconds, time_s - _REACH_S))
    end = int(np.searchsorted(thumbs.seconds, time_s + _REACH_S, side="right"))
    return list(range(min(first, middle), middle)), list(range(middle, max(end, middle)))
