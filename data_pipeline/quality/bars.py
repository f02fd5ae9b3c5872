"""Black bars of a clip: letterbox, pillarbox, or all round."""

import numpy as np

_ALL = 0.98  # of the height or width: a picture that is dark so far from one side is black, and tells nothing
_NEAR = 0.01  # of the height or width, by which depths of one bar differ
_STEEP = 0.03  # the same: how far inside a bar's edge whole lines are bright
_CLEAR = 0.1  # of the pictures that are dark up to the edge, how many show it


def find_bars(dark: np.ndarray, dim: np.ndarray, inside: np.ndarray, share: float) -> tuple[float, ...]:
    """Shares of the height or width that are bar at the top, bottom, left and right.

    A bar is what is dark from its side on in nearly all pictures of the clip. A scene can be as dark at its edges.
    Where the rest of the file, in as many pictures, has a narrower bar at that side, that is the bar; and where whole
    lines never become bright at its edge, but only some pixels of them, as around the moon, there is none.

    Args:
        dark: (samples, 4) shares that are dark from each side, in all pictures of the file.
        dim: (samples, 4) the same by the mean of each line.
        inside: (samples,) bool, those of the clip.
        share: of the pictures that have the bar.
    """
    clip, file = _common(dark[inside], share), _common(dark, share)
    if clip is None or file is None:
        return 0.0, 0.0, 0.0, 0.0
    bars = np.where(file > 0, np.minimum(clip, file), clip)
    ends_there = np.abs(dark - bars) <= _NEAR
    is_clear = ends_there & (dim - dark <= _STEEP)
    shown = is_clear.sum(axis=0) >= np.maximum(1, _CLEAR * ends_there.sum(axis=0))
    return tuple(np.where(shown, bars, 0.0).astype(float).tolist())


def _common(dark: np.ndarray, share: float) -> np.ndarray | None:
    """(4,): the most that as many of the pictures have; None: all of them are black."""
    seen = np.sort(dark[dark.max(axis=1) < _ALL], axis=0) if len(dark) else dark
    if not len(seen):
        return None
    common: np.ndarray = seen[int(np.floor((1 - share) * len(seen) + 1e-9))]
    return common
