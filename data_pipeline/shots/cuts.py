"""Cuts by PySceneDetect's rules, from scores that were taken before."""

from fractions import Fraction
from typing import Any

import numpy as np
from scenedetect.common import FrameTimecode, Timecode
from scenedetect.detector import SceneDetector
from scenedetect.detectors import AdaptiveDetector, ContentDetector

LEAST_SCORE = 15.0  # PySceneDetect's own choice
_RATE = 25.0  # a timecode wants one; all that is asked of them is exact differences of pts


def adaptive_cuts(
    scores: np.ndarray,
    pts: np.ndarray,
    base: Fraction,
    *,
    threshold: float,
    apart_s: float,
    least: float = LEAST_SCORE,
) -> list[int]:
    """First frames of shots, as AdaptiveDetector finds them: a score far above those of the frames around it.

    Args:
        scores: (n,) of ContentDetector, against the frame before.
        pts: (n,) int64, not falling, in units of ``base`` seconds.
        apart_s: shorter shots are not told from the one before: ``min_scene_len``.
        least: of a cut's score, whatever is around it.
    """
    options = {"adaptive_threshold": threshold, "min_content_val": least}
    return _cuts(_Adaptive(scores, min_scene_len=apart_s, **options), pts, base)


def content_cuts(scores: np.ndarray, pts: np.ndarray, base: Fraction, *, threshold: float, apart_s: float) -> list[int]:
    """The same of ContentDetector: every score above ``threshold``."""
    return _cuts(_Content(scores, threshold=threshold, min_scene_len=apart_s), pts, base)


class _Stored:
    """The half of a detector that looks at pictures: here it looks up what was seen."""

    def __init__(self, scores: np.ndarray, **options: Any) -> None:
        super().__init__(**options)
        self._scores = iter(scores.tolist())

    def _calculate_frame_score(self, timecode: FrameTimecode, frame_img: np.ndarray) -> float:
        score: float = next(self._scores)
        return score


class _Adaptive(_Stored, AdaptiveDetector):
    pass


class _Content(_Stored, ContentDetector):
    pass


def _cuts(detector: SceneDetector, pts: np.ndarray, base: Fraction) -> list[int]:
    """Frame numbers of what the detector says; a frame has the number of the first with its time."""
    since = (pts - pts[0]).tolist() if len(pts) else []
    number = {time: index for index, time in reversed(list(enumerate(since)))}
    nothing = np.empty((0, 0, 3), np.uint8)
    found = []
    for time in since:
        found += detector.process_frame(FrameTimecode(Timecode(time, base), _RATE), nothing)
    return sorted({number[each.pts] for each in found} - {0})
