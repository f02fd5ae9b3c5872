"""Clips as they are kept: H.264 by libx264, the same bytes on every run, every frame as a player shows it."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import IO, Any

import av
import numpy as np
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter

from opensora.datasets.decode.common import WHITE, DecodeError, decoding, on_background
from opensora.datasets.decode.pyav_container import StreamInfo
from opensora.datasets.decode.pyav_pixels import (
    KNOWN_MATRIX,
    UNTAGGED_MATRIX,
    StoredFrame,
    is_hd,
    is_limited_grey,
    stored_frame,
)
from opensora.datasets.table.clip_storage import Source

LEAST_SIDE = 16  # of a picture that is worth a clip
GROUP = 48  # frames between two key frames, at most
_BT709 = 1  # as matrix, primaries and transfer
_SURE = 0.01  # of a pixel: shares of a side are rounded
# One thread, and no macroblock tree, with which libx264 now and then writes other bytes for the same frames.
_X264 = "threads=1:lookahead-threads=1:open-gop=0:mbtree=0"
_EXACT = Interpolation.BICUBIC | Interpolation.BITEXACT  # ACCURATE_RND takes twice as long, for half a level of 255


@dataclass(frozen=True, kw_only=True)
class Framing:
    """How a picture becomes that of a clip: scaled as a whole, then cut out."""

    height: int  # of the whole picture, scaled
    width: int
    top: int  # where the cut-out begins; even, as colours are stored for 2x2 pixels
    left: int
    rows: int  # of the cut-out; even
    columns: int


@dataclass(frozen=True, kw_only=True)
class Bars:
    """What of a picture is no picture, as shares of its height and width."""

    top: float = 0.0
    bottom: float = 0.0
    left: float = 0.0
    right: float = 0.0


def framing(height: int, width: int, bars: Bars, short_side: int) -> Framing | None:
    """Of a picture of this size as shown; its shorter side without bars becomes ``short_side`` at most, none is made
    larger. None: what is left is too small for a clip."""
    shown = ((1 - bars.top - bars.bottom) * height, (1 - bars.left - bars.right) * width)
    if min(shown) < LEAST_SIDE:
        return None
    scale = min(1.0, short_side / min(shown))
    whole = (max(1, round(height * scale)), max(1, round(width * scale)))
    top, rows = _cut_out(whole[0], bars.top, bars.bottom)
    left, columns = _cut_out(whole[1], bars.left, bars.right)
    if min(rows, columns) < LEAST_SIDE:
        return None
    return Framing(height=whole[0], width=whole[1], top=top, left=left, rows=rows, columns=columns)


def _cut_out(size: int, before: float, behind: float) -> tuple[int, int]:
    """(first, how many): both even, and nothing of a bar."""
    first = 2 * math.ceil((before * size - _SURE) / 2)
    last = size - math.ceil(behind * size - _SURE)
    return first, (last - first) // 2 * 2


class Converter:
    """Decoded frames to frames of a clip: turned, square pixels, opaque, BT.709 of limited range in yuv420p."""

    def __init__(self, source: Source, about: StreamInfo, framed: Framing) -> None:
        self._source, self._about, self._framed = source, about, framed
        self._to_yuv, self._to_rgba = VideoReformatter(), VideoReformatter()

    def __call__(self, frame: VideoFrame) -> VideoFrame:
        """
        Raises:
            DecodeError: its colours cannot be converted.
        """
        stored = stored_frame(self._source, frame)
        if stored.matrix not in KNOWN_MATRIX:
            cause = f"its colour matrix (number {stored.matrix}) cannot be converted"
            raise DecodeError(self._source.path, cause)
        with decoding(self._source.path):
            scaled = self._scaled(frame, stored)
            made = self._cut(scaled, stored)
        made.pict_type = 0  # or the encoder makes the same kinds of frames as the source has
        return made

    def _scaled(self, frame: VideoFrame, stored: StoredFrame) -> VideoFrame:
        """The whole picture, not turned yet."""
        height, width = stored.turn.shape(self._framed.height, self._framed.width)
        matrix = Colorspace.ITU709 if stored.matrix in UNTAGGED_MATRIX and is_hd(stored) else None
        if stored.has_alpha:
            frame, matrix = self._opaque(frame, stored, matrix), None
        # swscale takes all grey for full range, so that to full range is to leave it as it is.
        grey = is_limited_grey(stored, self._about.codec) and not stored.has_alpha
        return self._to_yuv.reformat(
            frame,
            width,
            height,
            "yuv420p",
            src_colorspace=matrix,
            dst_colorspace=Colorspace.ITU709,
            dst_color_range=ColorRange.JPEG if grey else ColorRange.MPEG,
            interpolation=_EXACT,
            threads=1,
        )

    def _opaque(self, frame: VideoFrame, stored: StoredFrame, matrix: Any) -> VideoFrame:
        rgba = self._to_rgba.reformat(frame, format="rgba", src_colorspace=matrix, interpolation=_EXACT, threads=1)
        pixels = rgba.to_ndarray()
        unused = stored.pixels == "pal8" and not pixels[..., 3].any()  # a palette without alpha, its bytes left 0
        opaque = pixels[..., :3] if unused else on_background(pixels, WHITE)
        return VideoFrame.from_ndarray(np.ascontiguousarray(opaque), format="rgb24")

    def _cut(self, scaled: VideoFrame, stored: StoredFrame) -> VideoFrame:
        """Turned, and the rectangle that is kept."""
        framed, turn = self._framed, stored.turn
        is_turned = turn.transpose or turn.flip_rows or turn.flip_columns
        if not is_turned and (framed.rows, framed.columns) == (scaled.height, scaled.width):
            return scaled
        flat = np.empty(framed.rows * framed.columns * 3 // 2, np.uint8)
        begin = 0
        for plane, part in zip(scaled.planes, (1, 2, 2), strict=True):
            lines = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[: plane.height, : plane.width]
            turned = turn(lines[..., None])[..., 0]
            top, left, rows, columns = (n // part for n in (framed.top, framed.left, framed.rows, framed.columns))
            end = begin + rows * columns
            flat[begin:end].reshape(rows, columns)[:] = turned[top : top + rows, left : left + columns]
            begin = end
        return VideoFrame.from_ndarray(flat.reshape(-1, framed.columns), format="yuv420p")


def write_clip(
    file: IO[bytes], frames: Iterable[VideoFrame], framed: Framing, rate: Fraction, *, crf: int, preset: str
) -> None:
    """Frames of a ``Converter`` -> an mp4 without sound in which every group of pictures stands alone.

    Raises:
        OSError: it cannot be written.
    """
    written = _Written(file)
    try:
        with av.open(written, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
            stream = container.add_stream("libx264", rate=rate)
            stream.width, stream.height, stream.pix_fmt = framed.columns, framed.rows, "yuv420p"
            context: Any = stream.codec_context
            context.colorspace = context.color_primaries = context.color_trc = _BT709
            context.color_range = ColorRange.MPEG
            context.sample_aspect_ratio = Fraction(1)
            context.thread_count = 1
            stream.options = {"crf": str(crf), "preset": preset, "g": str(GROUP), "bf": "2", "x264-params": _X264}
            for number, frame in enumerate(frames):
                frame.pts, frame.time_base = number, 1 / rate
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
    finally:
        if written.error is not None:
            raise written.error


class _Written:
    """A file that FFmpeg writes to by calling back; of an error there it tells no more than that there was one."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.error: OSError | None = None
        self.seek, self.tell = file.seek, file.tell

    def write(self, data: bytes) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise
