"""How much each frame differs from the one before, as PySceneDetect scores it, and thumbnails of what is seen.

The score is that of its ContentDetector: mean difference of hue, saturation and value, 0 to 255. The thumbnails, some
per second, are what a second opinion looks at: whether two moments show the same, and whether one is a mix of two.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import cv2
import numpy as np
import pyarrow as pa
from scenedetect.common import FrameTimecode
from scenedetect.detectors import ContentDetector

from data_pipeline.analysis.base import Clock, Video
from data_pipeline.media.scan import Frame
from opensora.utils.limits import Limits

THUMB_HEIGHT, THUMB_WIDTH = 14, 24


@dataclass(frozen=True, kw_only=True)
class ContentConfig:
    """What the search for shots sees."""

    side: int = 256  # pixels of the longer side at which frames are compared; PySceneDetect's own choice
    thumbs_per_second: float = 12.0  # thumbnails kept, 1 KB each

    LIMITS: ClassVar[Limits] = {
        "side": (4096, "a difference of frames needs no detail"),
        "thumbs_per_second": (120.0, "transitions are slower"),
    }

    def __post_init__(self) -> None:
        if self.side < 64:
            raise ValueError(f"side={self.side}: must be at least 64")
        if self.thumbs_per_second < 4:
            raise ValueError(f"thumbs_per_second={self.thumbs_per_second}: must be at least 4 to see transitions")


class ContentAnalyser:
    """See above; the thresholds are in stage ``shots``."""

    name: ClassVar[str] = "content"
    version: ClassVar[int] = 1
    columns: ClassVar[pa.Schema] = pa.schema(
        [
            ("content_score", pa.list_(pa.float64())),  # of each frame against the one before; the first has 0
            ("content_frame", pa.list_(pa.int32())),  # the frames that have a thumbnail
            ("content_thumbs", pa.binary()),  # theirs: (n, THUMB_HEIGHT, THUMB_WIDTH, 3) uint8 BGR
        ]
    )

    def __init__(self, config: ContentConfig) -> None:
        self.config = config

    def start(self, video: Video) -> "ContentMeasurement":
        """See ``Analyser``."""
        cv2.setNumThreads(1)
        return ContentMeasurement(self.config)


class ContentMeasurement:
    """Of one video."""

    def __init__(self, config: ContentConfig) -> None:
        self._side, self._is_due = config.side, Clock(config.thumbs_per_second)
        self._detector = _Scorer()
        self._scores: list[float] = []
        self._frames: list[int] = []
        self._thumbs: list[bytes] = []
        self._size: tuple[int, ...] = ()

    def see(self, frame: Frame) -> None:
        """See ``Measurement``."""
        picture = frame.bgr(self._side)
        if picture.shape != self._size:  # of a stream that changes its size: nothing to compare with
            self._detector, self._size = _Scorer(), picture.shape
        self._scores.append(self._detector.score(picture))
        if self._is_due(frame):
            thumb = cv2.resize(picture, (THUMB_WIDTH, THUMB_HEIGHT), interpolation=cv2.INTER_AREA)
            self._frames.append(frame.index)
            self._thumbs.append(thumb.tobytes())

    def columns(self) -> dict[str, Any]:
        """See ``Measurement``."""
        scores = np.array(self._scores)
        return {
            "content_score": scores,
            "content_frame": np.array(self._frames, np.int32),
            "content_thumbs": b"".join(self._thumbs),
        }


class _Scorer(ContentDetector):
    """The detector's score without its decisions; it takes no edges into account, which its defaults weigh with 0."""

    _TIME = FrameTimecode(0, 25.0)  # of which a score does not depend

    def score(self, picture: np.ndarray) -> float:
        """Against the picture of the call before; 0 for the first one."""
        return float(self._calculate_frame_score(self._TIME, picture))


def thumbs_of(content: bytes) -> np.ndarray:
    """``content_thumbs`` as (n, THUMB_HEIGHT, THUMB_WIDTH, 3) uint8."""
    return np.frombuffer(content, np.uint8).reshape(-1, THUMB_HEIGHT, THUMB_WIDTH, 3)
