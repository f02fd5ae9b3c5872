"""Small grey pictures of a few frames a second, and their hashes: what duplicates are found and confirmed by.

A hash is the sign of 64 low frequencies of a picture (DCT). It hardly changes with size, quality or codec, and that of
the mirrored picture follows from it, as the odd horizontal frequencies change their sign. The stage ``prints`` makes
them, which knows where in a frame the picture is.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from data_pipeline.analysis.base import Clock, Video
from data_pipeline.media.scan import Frame
from opensora.utils.limits import Limits

SIDE = 32  # of a thumbnail, whatever shape the picture has
_SEEN = 64  # the longer side of the picture that it is made from
_LOW = 8  # frequencies in each direction

_UNIT = 4096  # of a cosine

Span = tuple[float, float]  # begin and end as shares of a side
WHOLE_SIDE: Span = (0.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class HashConfig:
    """How often: frames of two copies that are cut elsewhere are half an interval apart at most."""

    per_second: float = 8.0  # at 4 a hand moves too far within half an interval to be recognised

    LIMITS: ClassVar[Limits] = {"per_second": (60.0, "each is a picture of 1 KB; neighbouring frames are alike")}

    def __post_init__(self) -> None:
        if not self.per_second > 0:
            raise ValueError(f"per_second={self.per_second}: must be a number above 0")


class HashAnalyser:
    """See ``Analyser``."""

    name: ClassVar[str] = "hash"
    version: ClassVar[int] = 1
    columns: ClassVar[pa.Schema] = pa.schema(
        [
            ("hash_frame", pa.list_(pa.int32())),
            ("hash_ms", pa.list_(pa.int32())),  # since the first frame
            ("hash_thumb", pa.large_binary()),  # 32 x 32 grey levels each, one behind the other
        ]
    )

    def __init__(self, config: HashConfig) -> None:
        self.config = config

    def start(self, video: Video) -> "HashMeasurement":
        """See ``Analyser``."""
        return HashMeasurement(Clock(self.config.per_second))


class HashMeasurement:
    """See ``Measurement``."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._frame, self._ms, self._thumb = list[int](), list[int](), list[bytes]()

    def see(self, frame: Frame) -> None:
        """See ``Measurement``."""
        if self._clock(frame):
            self._frame.append(frame.index)
            self._ms.append(round(1000 * frame.time_s))
            self._thumb.append(thumbnail(frame.grey(_SEEN)).tobytes())

    def columns(self) -> dict[str, Any]:
        """See ``Measurement``."""
        return {"hash_frame": self._frame, "hash_ms": self._ms, "hash_thumb": b"".join(self._thumb)}


def thumbnail(grey: np.ndarray) -> np.ndarray:
    """(h, w) uint8 -> (32, 32) uint8, the mean over the area of each."""
    height, width = grey.shape
    total = _areas(height) @ grey.astype(np.float64) @ _areas(width).T  # of whole numbers: the same on any processor
    return (np.floor(total / (height * width) + 0.5)).astype(np.uint8)


def thumbnails(column: bytes) -> np.ndarray:
    """``hash_thumb`` -> (n, 32, 32) uint8."""
    return np.frombuffer(column, np.uint8).reshape(-1, SIDE, SIDE)


@cache
def _areas(size: int) -> np.ndarray:
    """(32, size): how much of each of 32 equal parts lies in each of ``size`` cells, in 32nds of a cell."""
    edges, cell = np.arange(SIDE + 1) * size, np.arange(size) * SIDE
    within = np.minimum(edges[1:, None], cell + SIDE) - np.maximum(edges[:-1, None], cell)
    return np.maximum(within, 0).astype(np.float64)


def picture_hash(thumb: np.ndarray, down: Span = WHOLE_SIDE, across: Span = WHOLE_SIDE) -> np.ndarray:
    """(n, 32, 32) -> (n,) uint64, of what lies in these parts of the height and width. Bit 8 v + h, from the lowest:
    whether the cosine of v half waves down and h across is positive; in place of the mean, that of 8 across."""
    whole = np.rint(thumb).astype(np.float64)  # sums of whole numbers are exact, in whatever order they are made
    found = _cosines(*down)[:_LOW] @ whole @ _cosines(*across).T  # (n, 8, 9)
    low = found[..., :_LOW].reshape(-1, _LOW * _LOW).copy()
    low[:, 0] = found[:, 0, _LOW]
    packed = np.packbits(low > 0, axis=1, bitorder="little")  # (n, 8)
    bits: np.ndarray = packed.view("<u8")[:, 0].astype(np.uint64)
    return bits


@cache
def _cosines(begin: float, end: float) -> np.ndarray:
    """(9, 32) of whole numbers: 0 to 8 half waves over a part of the side, each cell with the share of it that lies
    inside."""
    edges = np.clip(np.arange(SIDE + 1) / SIDE, begin, end)
    share, middle = np.diff(edges) * SIDE, (edges[:-1] + edges[1:]) / 2
    wave = np.cos(np.arange(_LOW + 1)[:, None] * np.pi * (middle - begin) / (end - begin)) * share
    wave[1:] -= wave[1:].sum(axis=1, keepdims=True) / share.sum() * share  # how bright a picture is does not matter
    return np.rint(wave * _UNIT)


def mirrored_hash(bits: np.ndarray) -> np.ndarray:
    """The hashes of the same pictures, left and right exchanged."""
    return bits ^ _ODD


def distances(bits: np.ndarray, others: np.ndarray) -> np.ndarray:
    """In how many bits hashes differ, one by one."""
    count: np.ndarray = np.bitwise_count(bits ^ others)
    return count


_ODD = np.uint64(sum(1 << (_LOW * v + h) for v in range(_LOW) for h in range(1, _LOW, 2)))
