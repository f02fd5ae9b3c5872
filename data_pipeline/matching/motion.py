"""Whether what moves in two clips moves alike, where the ground behind it is the same.

A camera that stands shows one picture for hours, and next to all of that picture says nothing of the moment. So only
cells in which something moves are asked, whether they change alike over time; how bright all of the picture is does not
count, as cameras adapt to it by themselves. What moves must also be what both show: two clips of one room may well have
the end of somebody's leaving in common, and nothing else.
"""

import numpy as np

from data_pipeline.matching.align import gain_of

_MOVES = 3.0  # squared grey levels over time; a bad encoding of a cell in which nothing moves has less than 2


def unexplained_motion(one: np.ndarray, two: np.ndarray) -> float | None:
    """
    Args:
        one: (n, rows, columns): frames of one clip.
        two: the same moments of the other, laid over them.

    Returns: the share of what moves that is left, 0 of the same moments, about 1 of others. None: nothing moves.
    """
    changes, others = _changes(one, one.mean(axis=0)), gain_of(one, two) * _changes(two, two.mean(axis=0))
    moved, also = (changes**2).mean(axis=0), (others**2).mean(axis=0)
    cells = np.maximum(moved, also) >= _MOVES
    if not cells.any():
        return None
    left = ((changes - others) ** 2).mean(axis=0)
    return float(left[cells].sum() / (moved + also)[cells].sum())


def motion_within(frames: np.ndarray, within: np.ndarray) -> float:
    """The share of what moves in a clip, (n, rows, columns), that moves in some of its frames, (n,) of bool; 1 where
    nothing moves. What moves is what differs from the clip's usual picture."""
    changes = _changes(frames, np.median(frames, axis=0)) ** 2
    of_frame = changes[:, changes.mean(axis=0) >= _MOVES].sum(axis=1)
    return float(of_frame[within].sum() / of_frame.sum()) if of_frame.any() else 1.0


def _changes(frames: np.ndarray, usual: np.ndarray) -> np.ndarray:
    """Of each frame against a picture, without what all cells have in common."""
    changes = frames - usual
    found: np.ndarray = changes - np.median(changes, axis=(1, 2), keepdims=True)
    return found
