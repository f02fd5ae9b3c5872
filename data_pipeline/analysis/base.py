"""What a measurement of frames is: it sees every frame of a video once, in order, and leaves columns.

Columns hold one value per frame, or per frame that was sampled, so that whatever is asked later (where are the cuts,
how much does this range move) is computed from them, and no threshold makes anybody decode again.
"""

import math
from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow as pa

from data_pipeline.media.scan import Frame


@dataclass(frozen=True, kw_only=True)
class Video:
    """What is known of a video before its first frame."""

    file: str
    num_frames: int  # by its packets
    fps: float  # the mean rate
    height: int  # as shown
    width: int


class Measurement(Protocol):
    """One video at work."""

    def see(self, frame: Frame) -> None:
        """The next frame."""

    def columns(self) -> dict[str, Any]:
        """After the last one: the columns of its ``Analyser``, for this video."""


class Analyser(Protocol):
    """A kind of measurement; ``config`` is its section of the configuration."""

    @property
    def name(self) -> str:
        """Of its section."""

    @property
    def version(self) -> int:
        """Raised by whoever changes what it measures."""

    @property
    def columns(self) -> pa.Schema:
        """What it leaves of a video."""

    @property
    def config(self) -> Any:
        """What it measures depends on nothing else."""

    def start(self, video: Video) -> Measurement:
        """A measurement of one video."""


class Clock:
    """Which frames to look at for a fixed number of samples a second, by their times: the first frame from each tick
    on. Of a variable rate no second has more."""

    def __init__(self, per_second: float) -> None:
        self._step, self._next = 1.0 / per_second, 0.0

    def __call__(self, frame: Frame) -> bool:
        """Whether this frame is one."""
        if frame.time_s + 1e-9 < self._next:
            return False
        self._next = self._step * (math.floor((frame.time_s + 1e-9) / self._step) + 1)
        return True
