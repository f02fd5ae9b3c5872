"""Light, change, bars and sharpness of frames as shown: what tells black, frozen, letterboxed and blurred clips.

Of every frame, at ``SMALL`` pixels: its mean luma, and how much differs from the frame before, on average and at most.
A few times a second, at ``LARGE`` pixels: the bright end of its luma, how deep it is dark from each side, and the
variance of its Laplacian inside what is dark.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import cv2
import numpy as np
import pyarrow as pa

from data_pipeline.analysis.base import Clock, Video
from data_pipeline.media.scan import Frame
from opensora.utils.limits import Limits

SMALL, LARGE = 96, 640  # longer side, in pixels; smaller videos are not scaled up
BAR_LEVELS = (16, 24, 32, 48)  # of luma: how deep lines are darker than each, from each side
SIDES = ("top", "bottom", "left", "right")
_BRIGHT = 0.98  # quantile
_STEP = 4  # pixels between those of a line that count for its luma
_SHARP_LEVEL = BAR_LEVELS.index(32)
_BORDER = 2  # lines inside a bar's edge that the Laplacian leaves out: the edge is no sharpness


@dataclass(frozen=True, kw_only=True)
class LumaConfig:
    """How often to look."""

    samples_per_s: float = 3.0  # for bars, black and sharpness; change is measured at every frame

    LIMITS: ClassVar[Limits] = {"samples_per_s": (100, "every frame of nearly all videos")}

    def __post_init__(self) -> None:
        if self.samples_per_s <= 0:
            raise ValueError(f"samples_per_s={self.samples_per_s}: must be a number above 0")


class LumaAnalyser:
    """See the module."""

    name: ClassVar[str] = "luma"
    version: ClassVar[int] = 1
    columns: ClassVar[pa.Schema] = pa.schema(
        [
            ("luma_mean", pa.list_(pa.float32())),  # of each frame, 0-255
            ("luma_change", pa.list_(pa.float32())),  # mean difference of its pixels from the frame before; first: 0
            ("luma_peak", pa.list_(pa.uint8())),  # the largest difference
            ("luma_frame", pa.list_(pa.int32())),  # index of each frame that was sampled
            ("luma_bright", pa.list_(pa.uint8())),  # 98 % of the pixels of a sample are no brighter
            ("luma_sharpness", pa.list_(pa.float32())),  # variance of the Laplacian of a sample
            # Of a sample, in order of SIDES and BAR_LEVELS: share of height or width, from that side, in which every
            # line is darker than that level by its mean plus two standard deviations of its pixels; by its mean alone.
            ("luma_dark", pa.list_(pa.float32())),
            ("luma_dim", pa.list_(pa.float32())),
        ]
    )

    def __init__(self, config: LumaConfig) -> None:
        self.config = config

    def start(self, video: Video) -> "_Measurement":
        """See ``Analyser``."""
        cv2.setNumThreads(1)
        return _Measurement(Clock(self.config.samples_per_s))


class _Measurement:
    def __init__(self, clock: Clock) -> None:
        self._is_sample = clock
        self._last: np.ndarray | None = None
        self._means: list[float] = []
        self._changes: list[float] = []
        self._peaks: list[int] = []
        self._samples: list[int] = []
        self._bright: list[int] = []
        self._sharpness: list[float] = []
        self._depths: list[np.ndarray] = []

    def see(self, frame: Frame) -> None:
        """See ``Measurement``."""
        small = frame.grey(SMALL)
        mean, change, peak = cv2.mean(small)[0], 0.0, 0
        if self._last is not None:
            change, peak = _difference(small, self._last)
        self._last = small
        self._means.append(mean)
        self._changes.append(change)
        self._peaks.append(peak)
        if self._is_sample(frame):
            self._sample(frame.index, small, frame.grey(LARGE))

    def _sample(self, index: int, small: np.ndarray, large: np.ndarray) -> None:
        depths = dark_depths(large)
        sides = np.array([large.shape[0], large.shape[0], large.shape[1], large.shape[1]])
        self._samples.append(index)
        self._bright.append(int(np.partition(small.ravel(), _rank(small.size))[_rank(small.size)]))
        self._sharpness.append(sharpness(large, depths[0, :, _SHARP_LEVEL].tolist()))
        self._depths.append(depths / sides[:, None])

    def columns(self) -> dict[str, Any]:
        """See ``Measurement``."""
        dark, dim = np.array(self._depths, np.float32).reshape(-1, 2, len(SIDES) * len(BAR_LEVELS)).swapaxes(0, 1)
        return {
            "luma_mean": np.array(self._means, np.float32),
            "luma_change": np.array(self._changes, np.float32),
            "luma_peak": np.array(self._peaks, np.uint8),
            "luma_frame": np.array(self._samples, np.int32),
            "luma_bright": np.array(self._bright, np.uint8),
            "luma_sharpness": np.array(self._sharpness, np.float32),
            "luma_dark": dark.ravel(),
            "luma_dim": dim.ravel(),
        }


def _difference(picture: np.ndarray, before: np.ndarray) -> tuple[float, int]:
    """Mean and most; of another size than the one before, as much as there is."""
    if picture.shape != before.shape:
        return 255.0, 255
    difference = cv2.absdiff(picture, before)
    return cv2.mean(difference)[0], int(difference.max())


def _rank(pixels: int) -> int:
    return min(pixels - 1, int(_BRIGHT * pixels))


def dark_depths(picture: np.ndarray) -> np.ndarray:
    """(2, sides, levels), see ``SIDES`` and ``BAR_LEVELS``: how many lines in a row are darker than a level, by their
    mean plus two standard deviations, which a few bright pixels raise and noise does not; and by their mean alone."""
    found = np.empty((2, len(SIDES), len(BAR_LEVELS)), np.int64)
    for axis, lines in enumerate((picture[:, ::_STEP], picture.T[:, ::_STEP])):
        pixels = lines.astype(np.float32)
        mean = pixels.mean(axis=1)
        spread = np.sqrt(np.maximum(0, np.einsum("ij,ij->i", pixels, pixels) / pixels.shape[1] - mean**2))
        for kind, luma in enumerate((mean + 2 * spread, mean)):
            found[kind, 2 * axis : 2 * axis + 2] = _depths(luma), _depths(luma[::-1])
    return found


def _depths(lines: np.ndarray) -> np.ndarray:
    """(levels,): lines before the first one that is as bright as the level."""
    bright = lines[:, None] >= np.array(BAR_LEVELS)
    return np.where(bright.any(axis=0), bright.argmax(axis=0), len(lines))


def sharpness(picture: np.ndarray, dark: Sequence[int]) -> float:
    """Variance of the Laplacian, of what is inside ``dark`` lines of each side (see ``SIDES``); 0: nothing is."""
    margins = [lines + _BORDER if lines else 0 for lines in dark]
    top, bottom, left, right = margins
    inside = picture[top : picture.shape[0] - bottom, left : picture.shape[1] - right]
    if bottom >= picture.shape[0] or right >= picture.shape[1] or min(inside.shape) < 3:
        return 0.0
    edges = cv2.Laplacian(np.ascontiguousarray(inside), cv2.CV_16S)
    return float(cv2.norm(edges, cv2.NORM_L2SQR) / edges.size - (cv2.sumElems(edges)[0] / edges.size) ** 2)
