"""Motion between two frames a moment apart, some times a second: how much there is, and what of it the camera makes.

Dense optical flow (DIS, Kroeger et al. 2016) at ``SIDE`` pixels; a similarity (shift, zoom, roll about the centre) that
RANSAC finds in it at well-textured points is the camera's; what is left is the motion of things, and parallax. Where a
picture is flat nothing shows how it moves, and it counts as still.

The two frames are ``gap_s`` apart and not neighbours, so that one rate is measured like another, and film that was
drawn or shot at a lower rate, whose frames come twice, does not look still. Moments are unevenly apart, or a camera
that shakes at their rate would seem to glide. The motion vectors of the decoder are no way to save time here: exporting
them costs 0.18 ms a frame at 854x480 and all of this 0.2 ms; FFmpeg has them of H.264 alone, without the distance in
time that each spans.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import cv2
import numpy as np
import pyarrow as pa

from data_pipeline.analysis.base import Video
from data_pipeline.media.scan import Frame
from opensora.utils.limits import Limits

SIDE = 320  # longer side of the pictures, in pixels; smaller videos are not scaled up
_GRID = 4  # pixels between those whose flow is averaged
_CELL = 16  # pixels: one point of each such cell, the one with the most texture
_LEAST_TEXTURE = 1e-4  # smallest eigenvalue of a point's gradients: below, nothing there shows where it went
_LEAST_POINTS = 12
_FLAT = 8  # of luma: what differs less from all around it shows no motion
_AROUND = np.ones((9, 9), np.uint8)
_TOLERANCE = (0.5, 0.1)  # pixels that a point may be off the camera's motion, and more, in shares of the usual motion
_STILL = (0.15, 0.25)  # pixels that a still point seems to move; share of such points that shows a camera at rest
_GOLDEN = 0.6180339887498949
_UNEVEN = 0.7  # of the step, over which moments are spread


@dataclass(frozen=True, kw_only=True)
class MotionConfig:
    """Where to look."""

    pairs_per_s: float = 2.5  # moments of a second
    gap_s: float = 0.06  # from the first frame of a pair to the second, at least; never less than to the next frame

    LIMITS: ClassVar[Limits] = {
        "pairs_per_s": (20, "each costs as much as decoding several frames"),
        "gap_s": (1.0, "beyond, little of a picture is found again"),
    }

    def __post_init__(self) -> None:
        if self.pairs_per_s <= 0:
            raise ValueError(f"pairs_per_s={self.pairs_per_s}: must be a number above 0")
        if not 0 <= self.gap_s < 1 / (2 * self.pairs_per_s):
            raise ValueError(f"gap_s={self.gap_s}: must be 0 or more, and less than half of 1 / pairs_per_s")


class MotionAnalyser:
    """See the module. Shares are of the longer side. The picture's motion, not the camera's: to the right, down,
    larger, and clockwise are positive."""

    name: ClassVar[str] = "motion"
    version: ClassVar[int] = 1
    columns: ClassVar[pa.Schema] = pa.schema(
        [
            ("motion_frame", pa.list_(pa.int32())),  # index of the first frame of each pair
            ("motion_next", pa.list_(pa.int32())),  # and of the second
            ("motion_mean", pa.list_(pa.float32())),  # mean length of the flow, flat parts as 0: shares a second
            ("motion_right", pa.list_(pa.float32())),  # of the camera's part, at the centre: shares a second
            ("motion_down", pa.list_(pa.float32())),
            ("motion_larger", pa.list_(pa.float32())),  # natural logarithm of the scale, a second
            ("motion_clockwise", pa.list_(pa.float32())),  # radians a second
            (
                "motion_rest",
                pa.list_(pa.float32()),
            ),  # mean length of the flow without that, shares a second
            ("motion_agree", pa.list_(pa.float32())),  # share of textured points that move as the camera; 0: too few
        ]
    )

    def __init__(self, config: MotionConfig) -> None:
        self.config = config

    def start(self, video: Video) -> "_Measurement":
        """See ``Analyser``."""
        cv2.setNumThreads(1)
        return _Measurement(self.config)


class _Measurement:
    def __init__(self, config: MotionConfig) -> None:
        self._config, self._step = config, 1 / config.pairs_per_s
        self._moment = 0  # number of the next one
        self._first: tuple[int, float, np.ndarray] | None = None  # of a pair: index, time, picture
        self._flow = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_ULTRAFAST)
        self._rows: list[tuple[float, ...]] = []

    def see(self, frame: Frame) -> None:
        """See ``Measurement``."""
        if self._first is not None and frame.time_s + 1e-6 >= self._first[1] + self._config.gap_s:
            self._pair(self._first, frame)
            self._first = None
        if self._first is None and frame.time_s + 1e-6 >= self._time(self._moment):
            self._first = (frame.index, frame.time_s, frame.grey(SIDE).copy())
            while self._time(self._moment) <= frame.time_s + 1e-6:
                self._moment += 1

    def _time(self, moment: int) -> float:
        return self._step * (moment + _UNEVEN * (moment * _GOLDEN % 1))

    def _pair(self, first: tuple[int, float, np.ndarray], frame: Frame) -> None:
        index, time_s, before = first
        after = frame.grey(SIDE)
        if after.shape != before.shape or min(after.shape) < 2 * _CELL or frame.time_s <= time_s:
            return
        flow = self._flow.calc(before, after, None)
        scale = 1 / (max(after.shape) * (frame.time_s - time_s))
        motion, rest, agree = camera_motion(before, flow)
        mean = mean_length(flow[::_GRID, ::_GRID], shows_motion(before))
        shift, turn = motion[:2] * scale, motion[2:] / (frame.time_s - time_s)
        self._rows.append((index, frame.index, mean * scale, *shift, *turn, rest * scale, agree))

    def columns(self) -> dict[str, Any]:
        """See ``Measurement``."""
        schema = MotionAnalyser.columns
        values = np.array(self._rows, np.float64).reshape(-1, len(schema)).T
        return {
            field.name: each.astype(field.type.value_type.to_pandas_dtype())
            for field, each in zip(schema, values, strict=True)
        }


def camera_motion(picture: np.ndarray, flow: np.ndarray) -> tuple[np.ndarray, float, float]:
    """What the camera makes of a flow.

    Args:
        picture: (h, w) uint8, the first one.
        flow: (h, w, 2), pixels to the right and down.

    Returns:
        (4,): pixels to the right and down at the centre, logarithm of the scale, radians clockwise; mean length of the
        flow without it, in pixels; share of textured points that agree, 0 where there are too few to tell.
    """
    points, shown = textured_points(picture), shows_motion(picture)
    moved = points + flow[points[:, 1].astype(int), points[:, 0].astype(int)]
    matrix = _similarity(points, moved)
    if matrix is None:
        return np.zeros(4), mean_length(flow[::_GRID, ::_GRID], shown), 0.0
    if _is_at_rest(moved - points, _flow_of(matrix, points)):
        matrix = np.eye(2, 3)
    agree = np.hypot(*(moved - points - _flow_of(matrix, points)).T) <= _tolerance(moved - points)
    height, width = picture.shape
    grid = np.stack(np.meshgrid(np.arange(0, width, _GRID), np.arange(0, height, _GRID)), axis=-1)
    rest = mean_length(flow[::_GRID, ::_GRID] - _flow_of(matrix, grid), shown)
    return _parts(matrix, height, width), rest, float(np.mean(agree))


def _is_at_rest(motion: np.ndarray, of_camera: np.ndarray) -> bool:
    """Whether so many points stay where they are, though the camera's motion would move them, that it is none: most of
    the texture is on something large that moves."""
    stays = np.hypot(*motion.T) <= _STILL[0]
    should_move = np.hypot(*of_camera.T) > _TOLERANCE[0]
    return float(np.mean(stays & should_move)) >= _STILL[1]


def _parts(matrix: np.ndarray, height: int, width: int) -> np.ndarray:
    """(4,): to the right, down, logarithm of the scale, clockwise; about the centre."""
    centre = np.array([(width - 1) / 2, (height - 1) / 2])
    shift = matrix @ np.append(centre, 1) - centre
    scale, turn = np.hypot(matrix[0, 0], matrix[1, 0]), np.arctan2(matrix[1, 0], matrix[0, 0])
    return np.array([*shift, np.log(scale), turn])


def textured_points(picture: np.ndarray) -> np.ndarray:
    """(n, 2) float32, x and y: the point with the most texture of each cell in which there is some."""
    texture = cv2.cornerMinEigenVal(picture, 3)
    rows, columns = picture.shape[0] // _CELL, picture.shape[1] // _CELL
    cells = texture[: rows * _CELL, : columns * _CELL].reshape(rows, _CELL, columns, _CELL)
    cells = cells.transpose(0, 2, 1, 3).reshape(rows * columns, _CELL * _CELL)
    best = cells.argmax(axis=1)
    cell = np.flatnonzero(cells.max(axis=1) > _LEAST_TEXTURE)
    y, x = cell // columns * _CELL + best[cell] // _CELL, cell % columns * _CELL + best[cell] % _CELL
    return np.stack([x, y], axis=1).astype(np.float32)


def _similarity(points: np.ndarray, moved: np.ndarray) -> np.ndarray | None:
    """(2, 3) that takes most points to where they moved; None: too few to tell. OpenCV draws from a fixed seed."""
    if len(points) < _LEAST_POINTS:
        return None
    tolerance = _tolerance(moved - points)
    matrix, _ = cv2.estimateAffinePartial2D(points, moved, method=cv2.RANSAC, ransacReprojThreshold=tolerance)
    found: np.ndarray | None = matrix
    return found


def _tolerance(motion: np.ndarray) -> float:
    return _TOLERANCE[0] + _TOLERANCE[1] * float(np.median(np.hypot(*motion.T)))


def _flow_of(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    """(..., 2): how far a similarity takes each of the points (..., 2)."""
    flow: np.ndarray = points @ matrix[:, :2].T + matrix[:, 2] - points
    return flow


def shows_motion(picture: np.ndarray) -> np.ndarray:
    """(h / 4, w / 4) bool, of every fourth pixel: whether it differs from what is around it."""
    contrast = cv2.subtract(cv2.dilate(picture, _AROUND), cv2.erode(picture, _AROUND))
    shown: np.ndarray = contrast[::_GRID, ::_GRID] >= _FLAT
    return shown


def mean_length(flow: np.ndarray, shown: np.ndarray) -> float:
    """Of the vectors (h, w, 2), those that are not ``shown`` (h, w) counted as 0."""
    return float(np.mean(np.hypot(flow[..., 0], flow[..., 1]) * shown))
