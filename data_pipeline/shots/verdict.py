"""What a detector's cut is: a cut, part of a transition that takes a while, or none, as a flash or a jerk is none."""

import numpy as np

from data_pipeline.shots.thumbs import Thumbs, likeness

_REACH_S, _CLOSE_S = 0.45, 0.3  # before and after
# A place has changed for good by more than so many grey levels, and so many times what it varies by before or after.
_CHANGED, _VARIED = 6.0, 3.0
_FOR_GOOD = 0.24  # of the places: fewer have changed for good behind a jerk, or where somebody moves
# What lies between two moments is further from both than this many times what they differ by: it was a flash, unless
# so many places have changed for good.
_AWAY, _OTHER = 1.5, 0.5
_UNMOVED, _MOVED = 0.98, 0.9  # likeness of two pictures of one view in whatever light, and of a view that moves
_SUDDEN = 0.5  # of all change around a cut: what its one step makes of it


def is_refuted(thumbs: Thumbs, cut: int, time_s: float) -> bool:
    """Whether what is there after it was there before: the view jerked, there was a flash, or somebody moved."""
    before, after = _around(thumbs, cut, time_s, _REACH_S)
    if not (len(before) and len(after)):
        return False
    if _alike(before[-1], after[0]) > (_UNMOVED if _is_step(before, after) else _MOVED):
        return True
    share = _changed_for_good(*_around(thumbs, cut, time_s, _CLOSE_S))
    return share < _FOR_GOOD or (share < _OTHER and _detour(before, after) > _AWAY)


def is_sudden(thumbs: Thumbs, cut: int, time_s: float) -> bool:
    """Whether the picture changed in one step, and not on the way from or to black, or to another picture."""
    before, after = _around(thumbs, cut, time_s, _REACH_S)
    if not (len(before) and len(after)):
        return True
    return _is_step(before, after)


def _is_step(before: np.ndarray, after: np.ndarray) -> bool:
    return bool(np.abs(before[-1] - after[0]).mean() > _SUDDEN * _apart(before, after).max())


def _changed_for_good(before: np.ndarray, after: np.ndarray) -> float:
    """Share of the places that are not what they were."""
    first, second = np.median(before, axis=0), np.median(after, axis=0)
    varied = np.maximum(np.abs(before - first).mean(axis=0), np.abs(after - second).mean(axis=0))
    return float((np.abs(second - first) > np.maximum(_CHANGED, _VARIED * varied)).any(axis=-1).mean())


def _alike(picture: np.ndarray, other: np.ndarray) -> float:
    """See ``likeness``."""
    return likeness(picture.astype(np.uint8), other.astype(np.uint8))


def _detour(before: np.ndarray, after: np.ndarray) -> float:
    """How far the last picture before a cut, or the first behind it, is from two around it, of what these differ by."""
    apart = np.maximum(_apart(before, after), 0.5)
    away = [np.minimum(_apart(before, one), _apart(one, after)) for one in (before[-1:], after[:1])]
    return float(max((each / apart).max() for each in away))


def _apart(some: np.ndarray, others: np.ndarray) -> np.ndarray:
    """(m, n) mean difference of (m, ...) pictures and (n, ...) others, in grey levels."""
    return np.asarray(np.abs(some[:, None] - others[None]).mean(axis=(2, 3, 4)))


def _around(thumbs: Thumbs, cut: int, time_s: float, reach_s: float) -> tuple[np.ndarray, np.ndarray]:
    """Pictures within reach before a cut, and from it on; at least one each where there is one."""
    middle = int(np.searchsorted(thumbs.frames, cut))
    first = min(int(np.searchsorted(thumbs.seconds, time_s - reach_s)), max(middle - 1, 0))
    end = max(int(np.searchsorted(thumbs.seconds, time_s + reach_s, side="right")), middle + 1)
    pictures = thumbs.pictures[first:end].astype(np.float32)
    return pictures[: middle - first], pictures[middle - first :]
