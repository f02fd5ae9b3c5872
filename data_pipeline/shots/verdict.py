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
_SAME, _GAIN = 0.95, 2.5  # likeness of one view in two lights, and how much brighter it may be in one of them
_MOVED = 0.9  # likeness of two pictures of a view that moves
_SUDDEN = 0.5  # of all change around a cut: what its one step makes of it


def is_refuted(thumbs: Thumbs, cut: int, time_s: float) -> bool:
    """Whether what is there after it was there before: the view jerked, there was a flash, or somebody moved."""
    before, after = _around(thumbs, cut, time_s, _REACH_S)
    if not (len(before) and len(after)):
        return False
    if not _is_step(before, after) and _alike(before[-1], after[0]) > _MOVED:
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
    """Share of the places that are not what they were, also in another light if both show the same."""
    first, second = np.median(before, axis=0), np.median(after, axis=0)
    varied = np.maximum(np.abs(before - first).mean(axis=0), np.abs(after - second).mean(axis=0))
    limit = np.maximum(_CHANGED, _VARIED * varied)
    changed = (np.abs(second - first) > limit).any(axis=-1).mean()
    if _alike(first, second) > _SAME:
        changed = min(changed, (np.abs(second - _lit_as(first, second)) > limit).any(axis=-1).mean())
    return float(changed)


def _alike(picture: np.ndarray, other: np.ndarray) -> float:
    return likeness(picture.astype(np.uint8), other.astype(np.uint8))


def _lit_as(picture: np.ndarray, other: np.ndarray) -> np.ndarray:
    """With the level and the contrast of another one."""
    level, there = np.median(picture), np.median(other)
    gain = np.clip(other.std() / max(picture.std(), 1.0), 1.0 / _GAIN, _GAIN)
    return np.asarray((picture - level) * gain + there)


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
