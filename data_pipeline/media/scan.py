"""Every frame of a video once, in order, small: the one decode that all measurements share."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
from av.video.frame import VideoFrame
from av.video.reformatter import Colorspace, Interpolation, VideoReformatter

from opensora.datasets.decode.common import Deadline, DecodeError, decoding
from opensora.datasets.decode.pyav_container import (
    Opened,
    StreamInfo,
    decode_packet,
    packets,
    stream_info,
    video_stream,
)
from opensora.datasets.decode.pyav_pixels import UNTAGGED_MATRIX, StoredFrame, is_hd, stored_frame
from opensora.datasets.table.clip_storage import Source

# Grey is the first plane of this: asked for grey, swscale goes through RGB and back by another matrix.
_COLOUR, _LUMA = "bgr24", "yuv420p"


class Frame:
    """A frame as shown. Pictures are made when they are asked for, once for each size, and must not be written to."""

    def __init__(self, index: int, pts: int, time_s: float, picture: Callable[[int, str], np.ndarray]) -> None:
        self.index = index  # in order of presentation
        self.pts = pts  # in units of the stream's time base
        self.time_s = time_s  # since the first frame
        self._picture = picture
        self._made: dict[tuple[int, str], np.ndarray] = {}

    def bgr(self, side: int) -> np.ndarray:
        """(h, w, 3) uint8, scaled down so that the longer side is ``side`` at most."""
        return self._at(side, _COLOUR)

    def grey(self, side: int) -> np.ndarray:
        """(h, w) uint8, the luma, scaled so. Black is 0 and white 255 whatever range the file has."""
        return self._at(side, _LUMA)

    def _at(self, side: int, pixels: str) -> np.ndarray:
        if (side, pixels) not in self._made:
            self._made[side, pixels] = self._picture(side, pixels)
        return self._made[side, pixels]


@dataclass
class ScanReport:
    """What a scan met."""

    frames: int = 0
    damaged_packets: int = 0  # that the decoder refused
    damaged_frames: int = 0  # that it put out as damaged
    damaged_at: list[int] = field(default_factory=list)  # the frame that was, or that was next
    height: int = 0  # of the frames as shown, the first one's
    width: int = 0
    size_changes: int = 0  # frames of another size than the one before
    time_base: Fraction = Fraction(0)


def scan(path: str, report: ScanReport, *, frames: int, timeout_s: float) -> Iterator[Frame]:
    """Frames of a video; ``report`` is filled in meanwhile. A damaged packet releases none, and decoding goes on.

    A frame lasts until the next one is asked for.

    Args:
        frames: the most that are decoded.

    Raises:
        DecodeError: the file cannot be read, has no frame, more than ``frames`` of them, or takes too long.
    """
    source, deadline = Source(path, path), Deadline(path, timeout_s)
    with Opened(source) as container:
        stream = video_stream(source, container, threads=1)
        about = stream_info(source, stream)
        pictures = Pictures(source, about)
        report.time_base = stream.time_base or Fraction(1, 1000)
        first: int | None = None
        for packet in packets(source, container, stream, deadline):
            decoded = decode_packet(source, packet, about.decoder)
            if decoded is None:
                report.damaged_packets += 1
                report.damaged_at.append(report.frames)
            for frame in decoded or ():
                pts = _pts(frame, report, first)
                first = pts if first is None else first
                if frame.is_corrupt:
                    report.damaged_frames += 1
                    report.damaged_at.append(report.frames)
                if report.frames >= frames:
                    raise DecodeError(path, f"more than {frames} frames (limits.frames); cut it into shorter files")
                yield Frame(report.frames, pts, float((pts - first) * report.time_base), pictures.of(frame, report))
                report.frames += 1
    if report.frames == 0:
        raise DecodeError(path, "no frame of it can be decoded")


def _pts(frame: VideoFrame, report: ScanReport, first: int | None) -> int:
    """A frame without a time is shown at a 25th of a second after the one before."""
    if frame.pts is not None:
        return int(frame.pts)
    return (first or 0) + round(report.frames / (25 * report.time_base))


class Pictures:
    """Frames of one stream, scaled and turned by swscale."""

    def __init__(self, source: Source, about: StreamInfo) -> None:
        self._source, self._about = source, about
        # One for each size: swscale prepares 0.3 ms for a size that is not the last one's.
        self._reformatters: dict[tuple[int, str], VideoReformatter] = {}
        self._last: tuple[int, int] | None = None

    def of(self, frame: VideoFrame, report: ScanReport) -> Callable[[int, str], np.ndarray]:
        stored = stored_frame(self._source, frame)
        wide = max(1, round(stored.width * self._about.stretch))
        size = stored.turn.shape(stored.height, wide)
        if not report.height:
            report.height, report.width = size
        report.size_changes += self._last not in (None, size)
        self._last = size
        return lambda side, pixels: self._make(frame, stored, wide, side, pixels)

    def _make(self, frame: VideoFrame, stored: StoredFrame, width: int, side: int, pixels: str) -> np.ndarray:
        scale = min(1.0, side / max(stored.height, width))
        height, width = max(1, round(stored.height * scale)), max(1, round(width * scale))
        matrix = Colorspace.ITU709 if stored.matrix in UNTAGGED_MATRIX and is_hd(stored) else None
        channels = 3 if pixels == _COLOUR else 1
        reformatter = self._reformatters.setdefault((side, pixels), VideoReformatter())
        with decoding(self._source.path):
            made = reformatter.reformat(
                frame, width, height, pixels, matrix, dst_color_range="JPEG", interpolation=Interpolation.AREA
            )
            plane = made.planes[0]
            strides = (plane.line_size, channels, 1)
            picture = np.ndarray((height, width, channels), np.uint8, buffer=memoryview(plane), strides=strides)
        turned = np.ascontiguousarray(stored.turn(picture))
        return turned if pixels == _COLOUR else turned[..., 0]
