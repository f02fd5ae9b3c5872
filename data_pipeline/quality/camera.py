"""What the camera does in a clip, in words: by the shifts, zooms and rolls measured between pairs of its frames."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from data_pipeline.rows import Row

# Of each part: its name where the picture's motion is positive (right, down, larger, clockwise), and where negative. A
# camera that turns to the left moves the picture to the right, one that tilts up moves it down.
PARTS = (("pan left", "pan right"), ("tilt up", "tilt down"), ("zoom in", "zoom out"), ("roll left", "roll right"))
STATIC, SHAKE, MIXED = "static", "shake", "mixed"
NAMES = (STATIC, *(name for names in PARTS for name in names), SHAKE, MIXED)
_NEARLY = 0.75  # of its speed: a camera that trembles more than that does not glide
_USUALLY = 0.7  # share of the pairs that move to the same side, of a motion that has one
_LEAST_AGREE = 0.25  # share of a pair's textured points: with fewer, what they agree on is chance


@dataclass(frozen=True)
class Pairs:
    """The camera's motion between the frames of each pair, in order of time."""

    speeds: np.ndarray  # (pairs, 4): right, down, larger, clockwise; of a usual pixel, in % of the longer side a second
    agree: np.ndarray  # (pairs,): share of the textured points that it explains

    @classmethod
    def of(cls, frames: Row, inside: np.ndarray) -> "Pairs":
        """From the columns of ``MotionAnalyser``."""
        radius = mean_radius(frames["height"], frames["width"])
        names = ("motion_right", "motion_down", "motion_larger", "motion_clockwise")
        speeds = np.stack([frames[name][inside].astype(np.float64) for name in names], axis=1)
        return cls(100 * speeds * (1, 1, radius, radius), frames["motion_agree"][inside])


def mean_radius(height: float, width: float) -> float:
    """Root of the mean square distance of a pixel from the centre, over the longer side: how fast zooms and rolls move
    a usual pixel."""
    return float(np.hypot(height, width) / np.sqrt(12) / max(height, width))


def describe_motion(pairs: Pairs, *, static: float, shake: float, mixed: float) -> dict[str, Any]:
    """``camera_motion``, ``camera_speed`` and ``shake`` (see ``MeasureStage``); none where no pair tells anything.

    Args:
        static: below this speed the camera stands still, as far as it can be measured from moment to moment.
        shake: a camera that trembles more, and nearly as fast as it glides, shakes.
        mixed: share of the largest part that a second one may have.
    """
    speeds = pairs.speeds[pairs.agree >= _LEAST_AGREE]
    if not len(speeds):
        return {}
    steady, trembling = np.median(speeds, axis=0), tremble(speeds)
    speed, usual = float(np.linalg.norm(steady)), float(np.median(np.linalg.norm(speeds, axis=1)))
    found: dict[str, Any] = {"camera_speed": speed, "shake": trembling}
    if trembling > max(shake, _NEARLY * speed):
        return found | {"camera_motion": SHAKE}
    if max(speed, usual / 2) < static:
        return found | {"camera_motion": STATIC}
    return found | {"camera_motion": _direction(speeds, usual, static, mixed)}


def _direction(speeds: np.ndarray, usual: float, static: float, mixed: float) -> str:
    """By name; a camera that moves, but not to the same side most of the time, does several things."""
    steady = np.median(speeds, axis=0)
    second, largest = np.argsort(np.abs(steady))[-2:]
    if abs(steady[largest]) < max(static / 2, mixed * usual) or abs(steady[second]) > mixed * abs(steady[largest]):
        return MIXED
    if np.mean(speeds[:, largest] * steady[largest] > 0) < _USUALLY:
        return MIXED
    return PARTS[largest][0 if steady[largest] > 0 else 1]


def tremble(speeds: np.ndarray) -> float:
    """How far motions are from those of the moments around them, most of the time: no steady motion has any, nor one
    that turns once.

    Args:
        speeds: (pairs, 4).
    """
    if len(speeds) < 3:
        return 0.0
    bends = np.linalg.norm(speeds[2:] - 2 * speeds[1:-1] + speeds[:-2], axis=1)
    return float(np.median(bends) / np.sqrt(6))  # of independent motions it is their standard deviation
