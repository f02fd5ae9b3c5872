"""Marks that never move while the picture around them does: logos of channels, watermarks, captions that stay.

Their edges are where the gradient points the same way in all frames of a clip. So are those of a scene that a camera on
a tripod films: an edge only counts where what surrounds it changes. And so is an edge that lies along the way of a
camera that pans: a mark has edges in more than one direction.
"""

import cv2
import numpy as np

SIDE = 480  # pixels of the longer side that are looked at
LEAST_FRAMES = 5
_EDGE = 10.0  # grey levels a pixel, along the mean direction, in all frames but one
_MOVES = 24.0  # grey levels between the darkest and the brightest frame: what differs by less stands still
_ALIVE = 0.7  # of the picture must move, or what stands still may be the scene before a camera that does
_JOINED = 0.015  # of the longer side: edges so near belong to one mark
_RING = 0.02  # of the longer side, around a mark
_SMALLEST, _LARGEST = 0.0003, 0.1  # of the picture
_DENSE = 0.08  # of a mark's box that is edge
_ACROSS = 0.1  # of the edges' strength, at least, is across what most of them face


def logo_share(grey: np.ndarray) -> float | None:
    """
    Args:
        grey: (n, h, w) uint8: frames spread over a clip.

    Returns:
        The share of the picture that lies in the boxes of such marks. None: too little of it moves.
    """
    moving = _range(grey) >= _MOVES
    if len(grey) < LEAST_FRAMES or moving.mean() < _ALIVE:
        return None
    edges, down, across = _lasting_edges(grey)
    side = max(grey.shape[1:])
    joined = cv2.morphologyEx(edges.astype(np.uint8), cv2.MORPH_CLOSE, _square(_JOINED * side))
    count, _, boxes, _ = cv2.connectedComponentsWithStats(joined, connectivity=8)
    marks = [box for box in boxes[1:count] if _is_mark(box, edges, moving, round(_RING * side) + 1)]
    marks = [box for box in marks if _turns(down[_inner(box)], across[_inner(box)])]
    return float(sum(int(box[cv2.CC_STAT_WIDTH]) * int(box[cv2.CC_STAT_HEIGHT]) for box in marks) / edges.size)


def _range(grey: np.ndarray) -> np.ndarray:
    spread: np.ndarray = grey.max(axis=0).astype(np.int16) - grey.min(axis=0)
    return spread


def _lasting_edges(grey: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """((h, w) bool, and their mean slopes down and across, 0 where there is none)."""
    smooth = np.stack([cv2.GaussianBlur(frame, (3, 3), 0) for frame in grey]).astype(np.float32)
    down, across = np.gradient(smooth, axis=(1, 2))
    mean_down, mean_across = down.mean(axis=0), across.mean(axis=0)
    length = np.hypot(mean_down, mean_across) + 1e-6
    along = (down * mean_down + across * mean_across) / length  # (n, h, w)
    lasting: np.ndarray = np.partition(along, 1, axis=0)[1] >= _EDGE
    return lasting, mean_down * lasting, mean_across * lasting


def _is_mark(box: np.ndarray, edges: np.ndarray, moving: np.ndarray, ring: int) -> bool:
    left, top, width, height = (int(box[i]) for i in range(4))
    share = width * height / edges.size
    if not _SMALLEST <= share <= _LARGEST:
        return False
    inner = _inner(box)
    outer = np.s_[max(0, top - ring) : top + height + ring, max(0, left - ring) : left + width + ring]
    if edges[inner].mean() < _DENSE:
        return False
    around = moving[outer].sum() - moving[inner].sum(), moving[outer].size - moving[inner].size
    return bool(around[0] >= 0.5 * around[1])


def _inner(box: np.ndarray) -> tuple[slice, slice]:
    left, top, width, height = (int(box[i]) for i in range(4))
    return np.s_[top : top + height, left : left + width]


def _turns(down: np.ndarray, across: np.ndarray) -> bool:
    """Whether edges of these slopes face more than one direction."""
    mixed = float((down * across).sum())
    total = np.array([[(down**2).sum(), mixed], [mixed, (across**2).sum()]], np.float64)
    least, most = np.linalg.eigvalsh(total)
    return bool(least >= _ACROSS * most)


def _square(side: float) -> np.ndarray:
    odd = 2 * round(side / 2) + 1
    return np.ones((odd, odd), np.uint8)
