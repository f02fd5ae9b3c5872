"""Whether two clips show the same moments: their thumbnails are laid over one another, and what is left is judged.

Two moments of one room differ by as much as the clip itself changes; the same moment twice, whatever was done to it, by
much less. So the share of the changes that is left tells them apart, at any contrast. Where little moves, what does is
judged alone (motion.py).
"""

from dataclasses import dataclass

import numpy as np

from data_pipeline.analysis.hashes import SIDE, Span, distances, picture_hash
from data_pipeline.matching.box import Bars, boxed, inside, mapping, true_cells

_ROUNDS = 6
_EDGE = 2  # cells at an edge whose smoothed values depend on what lies beyond
_FLOOR = 4.0  # squared grey levels that two encodings of one picture may differ by
_MOST = 0.15  # by which a crop may scale or shift
_PLACE = (np.arange(SIDE) + 0.5) / SIDE - 0.5


@dataclass
class _Overlay:
    """Where the second clip lies: place ``scale * x + shift`` of it is at x of the first, across and down."""

    scale: np.ndarray  # (2,)
    shift: np.ndarray  # (2,)


@dataclass(frozen=True)
class Likeness:
    """What is left when one clip is laid over the other."""

    distance: float  # mean over the frames, of hashes of what both show
    unexplained: float  # of the changes over time: 0 of the same moments, about 1 of others of the same place
    overlay: _Overlay
    bars: tuple[Bars, Bars]

    def lay(self, one: np.ndarray, two: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """More frames of both, (n, 32, 32), laid over one another in the same way: (n, rows, columns) each, smoothed,
        of the cells that both know."""
        first, second = _as_coarse(one, two, self.bars)
        laid, down, across = _laid_over(second, self.overlay, _inner(self.bars[0]), _inner(self.bars[1]))
        return first[:, down][:, :, across], laid[:, down][:, :, across]


def likeness(one: np.ndarray, two: np.ndarray, bars: tuple[Bars, Bars], shown: tuple[Span, Span]) -> Likeness | None:
    """
    Args:
        one: (n, 32, 32) uint8: frames of the first clip.
        two: the same moments of the second.
        bars: of each.
        shown: about which part of the first the second shows, down and across; the rest is found.

    Returns: None: they do not lie over one another.
    """
    first, second = _as_coarse(one, two, bars)
    known, known_two = _inner(bars[0]), _inner(bars[1])
    overlay = _begin(*shown)
    for _ in range(_ROUNDS):
        laid, down, across = _laid_over(second, overlay, known, known_two)
        if down.sum() < SIDE / 2 or across.sum() < SIDE / 2:
            return None
        step = _step(first, laid, overlay, np.ix_(down, across))
        overlay.scale, overlay.shift = overlay.scale + step[0], overlay.shift + step[1]
    laid, down, across = _laid_over(second, overlay, known, known_two)
    far = max(abs(overlay.scale - 1).max(), abs(overlay.shift).max())
    if down.sum() < SIDE / 2 or across.sum() < SIDE / 2 or far > _MOST:
        return None
    judged = _judge(first[:, down][:, :, across], laid[:, down][:, :, across], down, across)
    return Likeness(*judged, overlay, bars)


def _as_coarse(one: np.ndarray, two: np.ndarray, bars: tuple[Bars, Bars]) -> tuple[np.ndarray, np.ndarray]:
    """Each as coarse as the other: between bars a picture has fewer cells."""
    return _smooth(boxed(inside(one, bars[0]), bars[1])), _smooth(boxed(inside(two, bars[1]), bars[0]))


def _begin(down: Span, across: Span) -> _Overlay:
    """Of the second in this part of the first."""
    begin, end = np.array([across, down]).T
    return _Overlay(1 / (end - begin), -((begin + end) / 2 - 0.5) / (end - begin))


def _smooth(picture: np.ndarray) -> np.ndarray:
    smoothed: np.ndarray = _BLUR @ picture @ _BLUR.T
    return smoothed


def _blur() -> np.ndarray:
    matrix = np.zeros((SIDE, SIDE), np.float32)
    for row in range(SIDE):
        for step, weight in zip(range(-2, 3), (1, 4, 6, 4, 1), strict=True):
            matrix[row, np.clip(row + step, 0, SIDE - 1)] += weight / 16
    return matrix


_BLUR = _blur()


def _inner(bars: Bars) -> tuple[np.ndarray, np.ndarray]:
    """(rows, columns) that smoothing has mixed with nothing unknown."""
    down, across = (np.convolve(np.pad(true, _EDGE), np.ones(2 * _EDGE + 1), "valid") for true in true_cells(bars))
    return down > 2 * _EDGE, across > 2 * _EDGE


def _laid_over(
    picture: np.ndarray, overlay: _Overlay, known: tuple[np.ndarray, np.ndarray], own: tuple[np.ndarray, np.ndarray]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """((n, 32, 32) the second clip where it lies, rows and columns that both know)."""
    across, cells_across = mapping(overlay.scale[0], overlay.shift[0])
    down, cells_down = mapping(overlay.scale[1], overlay.shift[1])
    rows = known[0] & cells_down & (down @ own[0] > 0.99)
    columns = known[1] & cells_across & (across @ own[1] > 0.99)
    return down @ picture @ across.T, rows, columns


def _step(first: np.ndarray, laid: np.ndarray, overlay: _Overlay, part: tuple) -> tuple[np.ndarray, np.ndarray]:
    """By how much scale and shift should change (Gauss and Newton), beside a change of contrast and brightness."""
    part = (slice(None), *part)
    slope_down, slope_across = (slope[part] * SIDE for slope in np.gradient(laid, axis=(1, 2)))
    slope_across, slope_down = slope_across / overlay.scale[0], slope_down / overlay.scale[1]
    x, y = np.broadcast_to(_PLACE, (1, SIDE, SIDE))[part], np.broadcast_to(_PLACE[:, None], (1, SIDE, SIDE))[part]
    columns = (slope_across * x, slope_down * y, slope_across, slope_down, laid[part])
    slopes = np.stack([*(column.ravel() for column in columns), np.ones(columns[0].size)])  # (6, all)
    left = (first - laid)[part].ravel()
    normal = (slopes @ slopes.T).astype(np.float64)
    normal[range(4), range(4)] += 1e-3 * np.trace(normal[:4, :4]) / 4 + 1.0
    normal[range(4, 6), range(4, 6)] += 1e-3
    found = np.clip(np.linalg.solve(normal, slopes @ left), -0.03, 0.03)
    return found[:2], found[2:4]


def _judge(one: np.ndarray, two: np.ndarray, down: np.ndarray, across: np.ndarray) -> tuple[float, float]:
    """(distance, unexplained) of what both show; contrast and brightness may differ."""
    centred, other = one - one.mean(), two - two.mean()
    gain = gain_of(one, two)
    left = float(((centred - gain * other) ** 2).mean())
    changes = float(((one - one.mean(axis=0)) ** 2).mean()) + gain**2 * float(((two - two.mean(axis=0)) ** 2).mean())
    shown = [(np.flatnonzero(side)[0] / SIDE, (np.flatnonzero(side)[-1] + 1) / SIDE) for side in (down, across)]
    bits = [picture_hash(_put_back(each, down, across), *shown) for each in (one, two)]
    return float(distances(*bits).mean()), left / (changes + _FLOOR)


def gain_of(one: np.ndarray, two: np.ndarray) -> float:
    """By how much the contrast of the first is that of the second."""
    centred, other = one - one.mean(), two - two.mean()
    return float((centred * other).sum() / max(float((other**2).sum()), 1e-6))


def _put_back(part: np.ndarray, down: np.ndarray, across: np.ndarray) -> np.ndarray:
    """Rows and columns of pictures where they were: (n, 32, 32)."""
    rows = np.zeros((len(part), SIDE, part.shape[2]), part.dtype)
    rows[:, down] = part
    whole = np.zeros((len(part), SIDE, SIDE), part.dtype)
    whole[:, :, across] = rows
    return whole
