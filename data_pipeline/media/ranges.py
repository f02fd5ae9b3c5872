"""Frames of some ranges of a video, in order, with one decode: what lies between them is jumped over where that is
cheaper."""

from collections.abc import Iterator

import numpy as np
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from opensora.datasets.decode.common import Deadline, DecodeError, decoding
from opensora.datasets.decode.pyav_container import (
    Opened,
    StreamInfo,
    decode_packet,
    packets,
    stream_info,
    video_stream,
)
from opensora.datasets.decode.pyav_index import FrameIndex, SeekPosition, frame_index, seek_positions
from opensora.datasets.table.clip_storage import Source

_SKIPS_UNUSED = ("h264", "hevc")  # frames that no other one refers to may be left undecoded from packet to packet
_WORTH_A_SEEK = 48  # frames between two ranges: fewer are decoded faster than a key frame is found


class RangeReader:
    """One video; ``frames`` of one range after the other. Frames are numbered as the stage ``frames`` saw them."""

    def __init__(self, path: str, pts: np.ndarray, *, damaged: bool, timeout_s: float) -> None:
        """
        Args:
            pts: (n,) int64 of every frame that could be decoded, in order.
            damaged: packets or frames of it were; then all is decoded from the start, as it was then.
        """
        self._source, self._pts = Source(path, path), pts
        self._deadline = Deadline(path, timeout_s)
        self._by_time = not damaged and bool(np.all(np.diff(pts) > 0))
        self._numbers = {int(at): number for number, at in enumerate(pts)} if self._by_time else {}
        self._index: FrameIndex | None = None
        self._opened: Opened | None = None
        self._at = 0  # the next frame that comes
        self._wanted = 0  # frames before this one are not asked for
        self.about: StreamInfo | None = None  # of the frames that were put out last

    def __enter__(self) -> "RangeReader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """The next range opens it anew."""
        if self._opened is not None:
            self._opened.__exit__()
            self._opened = None

    @property
    def source(self) -> Source:
        return self._source

    def frames(self, first: int, last: int) -> Iterator[VideoFrame]:
        """Frames [first, last). A range begins behind the one before. A frame lasts until the next is asked for.

        Raises:
            DecodeError: one of them cannot be decoded (any more), or it takes too long.
        """
        self._wanted = first
        if self._opened is None:
            self._open()
        number, frame = self._jump(first) or self._next(first)
        for wanted in range(first, last):
            if wanted > first:
                number, frame = self._next(wanted)
            if number != wanted:
                raise self._changed(wanted)
            self._at = wanted + 1
            yield frame

    def _open(self) -> None:
        self._opened = Opened(self._source)
        self._container = self._opened.__enter__()
        self._stream = video_stream(self._source, self._container, threads=1)
        self._coming = self._decoded(None)
        self._at = 0

    def _next(self, wanted: int) -> tuple[int, VideoFrame]:
        """The next frame from ``wanted`` on."""
        for number, frame in self._coming:
            if number >= wanted:
                return number, frame
        raise self._changed(wanted)

    def _jump(self, first: int) -> tuple[int, VideoFrame] | None:
        """The frame, by way of a key frame that lies between here and there; None: decode on."""
        if not self._by_time or first - self._at < _WORTH_A_SEEK:
            return None
        codec = self.about.codec if self.about else stream_info(self._source, self._stream).codec
        for position in seek_positions(self._frame_index(), codec, int(self._pts[first])):
            if self._key_number(position) <= self._at:
                return None
            with decoding(self._source.path):
                self._container.seek(position.seek_to, stream=self._stream, backward=True)
            self._coming = self._decoded(position)
            found = next((pair for pair in self._coming if pair[0] >= first), None)
            if found is not None and found[0] == first and not found[1].is_corrupt:
                return found
            self.close()  # seeking failed this demuxer or decoder: from the very start
            self._open()
        return None

    def _key_number(self, position: SeekPosition) -> int:
        index = self._frame_index()
        at = index.key_pts[np.flatnonzero(index.key_dts == position.dts)[-1]]
        return int(np.searchsorted(self._pts, at))

    def _frame_index(self) -> FrameIndex:
        if self._index is None:
            with Opened(self._source) as container:
                stream = video_stream(self._source, container, threads=1)
                self._index = frame_index(self._source, container, stream, self._deadline)
        return self._index

    def _decoded(self, position: SeekPosition | None) -> Iterator[tuple[int, VideoFrame]]:
        """(number, frame) from where the container stands."""
        container, stream, not_after = self._container, self._stream, position.dts if position else None
        self.about = about = stream_info(self._source, stream)
        skips = self._by_time and about.codec in _SKIPS_UNUSED and about.decoder is None
        count = 0
        for packet in packets(self._source, container, stream, self._deadline):
            if not_after is not None and packet.dts is not None:
                if packet.dts > not_after:
                    return  # landed behind the key frame
                not_after = None
            if skips:
                self._leave_unused(stream, packet.pts)
            for frame in decode_packet(self._source, packet, about.decoder) or ():
                number = self._numbers.get(frame.pts) if self._by_time else count
                count += 1
                if number is not None:
                    yield number, frame

    def _leave_unused(self, stream: VideoStream, pts: int | None) -> None:
        wanted = pts is None or self._wanted >= len(self._pts) or pts >= self._pts[self._wanted]
        stream.codec_context.skip_frame = "DEFAULT" if wanted else "NONREF"

    def _changed(self, number: int) -> DecodeError:
        return DecodeError(
            self._source.path, f"frame {number} cannot be decoded any more; was the file changed since the run began?"
        )

    _container: InputContainer
    _stream: VideoStream
    _coming: Iterator[tuple[int, VideoFrame]]
