"""Where the picture is: inside the bars of a frame, in part of it, shifted and scaled."""

import numpy as np

from data_pipeline.analysis.hashes import SIDE, Span

ASKED = 8  # frames of a clip that are looked for in other clips
_CUT = 0.05  # of each side; what is cropped by half as much or twice is near enough to be found
_MIDDLE = (_CUT / 2, 1 - _CUT / 2)
CROPS: tuple[tuple[Span, Span], ...] = (
    (_MIDDLE, _MIDDLE),
    *(((down, down + 1 - _CUT), (across, across + 1 - _CUT)) for down in (0.0, _CUT) for across in (0.0, _CUT)),
)  # as parts of the height and width

Bars = tuple[float, float, float, float]  # top, bottom, left, right, as shares of the height and width
_PLACE = (np.arange(SIDE) + 0.5) / SIDE - 0.5  # of each cell: -0.5 to 0.5


def inside(thumb: np.ndarray, bars: Bars) -> np.ndarray:
    """(n, 32, 32) uint8 -> (n, 32, 32) float32 of the picture between the bars, as if there were none. Cells that a bar
    touches are not looked at: the next one stands in for them."""
    if not any(bars):
        return thumb.astype(np.float32)
    top, bottom, left, right = bars
    down, across = _of_part(top, 1 - bottom)[0], _of_part(left, 1 - right)[0]
    return down @ thumb.astype(np.float32) @ across.T


def boxed(picture: np.ndarray, bars: Bars) -> np.ndarray:
    """What would be left of another picture, (n, 32, 32) as of ``inside``, if it had been shown between these bars."""
    if not any(bars):
        return picture
    top, bottom, left, right = bars
    down, across = _squeezed(top, 1 - bottom), _squeezed(left, 1 - right)
    return inside(down @ picture @ across.T, bars)


def _squeezed(begin: float, end: float) -> np.ndarray:
    """(32, 32): the mean of a side of a picture in each cell of a frame that shows it from ``begin`` to ``end``."""
    edges = np.clip((np.arange(SIDE + 1) / SIDE - begin) / (end - begin), 0, 1) * SIDE  # in cells of the picture
    cell = np.arange(SIDE)
    within = np.maximum(np.minimum(edges[1:, None], cell + 1) - np.maximum(edges[:-1, None], cell), 0)
    shares: np.ndarray = (within / np.maximum(np.diff(edges)[:, None], 1e-9)).astype(np.float32)
    return shares


def true_cells(bars: Bars) -> tuple[np.ndarray, np.ndarray]:
    """Which rows and columns of ``inside`` have their values from cells that no bar touches: two (32,) of bool."""
    top, bottom, left, right = bars
    return _of_part(top, 1 - bottom)[1], _of_part(left, 1 - right)[1]


def _of_part(begin: float, end: float) -> tuple[np.ndarray, np.ndarray]:
    slack = 0.1  # of a cell: bars are measured on other pictures than these
    first = min(int(np.ceil(begin * SIDE - slack)), SIDE - 2)
    last = max(int(np.floor(end * SIDE + slack)) - 1, first + 1)
    return mapping(end - begin, (begin + end - 1) / 2, first, last)


def mapping(scale: float, shift: float, first: int = 0, last: int = SIDE - 1) -> tuple[np.ndarray, np.ndarray]:
    """A (32, 32) matrix whose product with a side of a picture is that picture at ``scale * place + shift``, places
    from -0.5 to 0.5, and which of the results lie between the cells ``first`` and ``last``; others are at the edge."""
    cell = (scale * _PLACE + shift + 0.5) * SIDE - 0.5
    known = (cell > first - 0.02) & (cell < last + 0.02)
    cell = np.clip(cell, first, last)
    below = np.minimum(np.floor(cell).astype(int), SIDE - 2)
    matrix, row = np.zeros((SIDE, SIDE), np.float32), np.arange(SIDE)
    matrix[row, below] = 1 - (cell - below)
    matrix[row, below + 1] = cell - below
    return matrix, known
