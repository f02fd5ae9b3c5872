"""Small JPEGs of a video, for the contact sheets of the report: so that nobody opens 10,000 files to look at 20."""

import io
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from PIL import Image

from data_pipeline.analysis.base import Clock, Video
from data_pipeline.media.scan import Frame
from opensora.utils.limits import Limits


@dataclass(frozen=True, kw_only=True)
class PicturesConfig:
    """How many, and how large."""

    per_second: float = 1.0  # an hour at the default is about 15 MB
    side: int = 160  # pixels of the longer one
    quality: int = 70  # of JPEG

    LIMITS: ClassVar[Limits] = {
        "per_second": (10.0, "pictures would take more room than the videos"),
        "side": (1024, "a contact sheet shows small ones"),
        "quality": (95, "more is larger, and not better"),
    }

    def __post_init__(self) -> None:
        if not self.per_second > 0:
            raise ValueError(f"per_second={self.per_second:g}: must be a number above 0")
        if self.side < 16:
            raise ValueError(f"side={self.side}: must be an integer >= 16")
        if self.quality < 1:
            raise ValueError(f"quality={self.quality}: must be an integer >= 1")


class Pictures:
    """See ``Analyser``."""

    name: ClassVar[str] = "pictures"
    version: ClassVar[int] = 1
    columns: ClassVar[pa.Schema] = pa.schema(
        [
            ("picture_frame", pa.list_(pa.int32())),  # numbers of the frames that there is a picture of
            ("picture_jpeg", pa.list_(pa.binary())),
        ]
    )

    def __init__(self, config: PicturesConfig) -> None:
        self.config: Any = config

    def start(self, video: Video) -> "_Album":
        """See ``Analyser``."""
        return _Album(self.config)


class _Album:
    """The pictures of one video."""

    def __init__(self, config: PicturesConfig) -> None:
        self._config, self._due = config, Clock(config.per_second)
        self._frames: list[int] = []
        self._jpegs: list[bytes] = []

    def see(self, frame: Frame) -> None:
        """See ``Measurement``."""
        if self._due(frame):
            self._frames.append(frame.index)
            self._jpegs.append(jpeg(frame.bgr(self._config.side), self._config.quality))

    def columns(self) -> dict[str, Any]:
        """See ``Measurement``."""
        return {"picture_frame": self._frames, "picture_jpeg": self._jpegs}


def jpeg(bgr: np.ndarray, quality: int) -> bytes:
    """A picture (h, w, 3) uint8 as a file."""
    sink = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(bgr[..., ::-1])).save(sink, "JPEG", quality=quality)
    return sink.getvalue()
