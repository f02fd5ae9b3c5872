"""Frames by PyAV: seek to the keyframe before the window and decode no more than the window needs.

Numbers are turned into timestamps with the timestamps of the packets, which a demuxer reads without decoding, so
variable frame rates and clips that do not start at zero need no special case. What a window returns is bit for bit
what decoding the whole clip and slicing would return, or a ``DecodeError``. In a damaged clip a frame that cannot be
decoded keeps its number, and what is predicted from it is not returned either.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.reformatter import Interpolation, VideoReformatter
from av.video.stream import VideoStream

from opensora.datasets.frames import (
    Allocate,
    Deadline,
    DecodeError,
    Resize,
    check_size,
    new_array,
    short_reason,
)
from opensora.datasets.storage import Source

# Their "keyframe" flags do not promise that decoding can start there.
_DECODE_FROM_START = ("gif", "apng")
# Their packets carry no presentation times; what the demuxer makes up is wrong as soon as frames are reordered.
_WITHOUT_TIMES = ("avi", "h264", "hevc")
# Where a frame nobody refers to may be left undecoded from packet to packet; libdav1d reads the setting only once.
_SKIPS_UNUSED = ("h264", "hevc")
# What a damaged or foreign file raises: FFmpeg's errors and the system's.
_FILE_ERRORS = (av.FFmpegError, OSError)


@dataclass(frozen=True, kw_only=True)
class FrameIndex:
    """Timestamps of a stream's frames, from its packets."""

    pts: np.ndarray  # (n,) int64, presentation order
    key_pts: np.ndarray  # (k,) int64, ascending
    key_dts: np.ndarray  # (k,) int64, of the same keyframes
    exact: bool  # False: packets without, or with repeated, timestamps; only counting decoded frames is right


def probe(source: Source, deadline: Deadline) -> tuple[int, int, int, float]:
    """(number of frames, displayed height, width, frames per second).

    Raises:
        DecodeError: the file cannot be read.
    """
    try:
        with _open(source) as container:
            stream = _video_stream(source, container, threads=1)
            index = _index(container, stream, deadline)
            rate, base = stream.average_rate, stream.time_base
        first = read_window(source, range(1), None, 1, deadline, new_array)
        count = len(index.pts) if index.exact else sum(1 for _ in _all_frames(source, threads=1, deadline=deadline))
    except _FILE_ERRORS as error:
        raise DecodeError(source.path, short_reason(error)) from error
    return count, first.shape[1], first.shape[2], _frame_rate(index, rate, base)


def read_window(
    source: Source, numbers: range, resize: Resize | None, threads: int, deadline: Deadline, allocate: Allocate
) -> np.ndarray:
    """The frames of these numbers; see ``opensora.datasets.decode.read_frames``."""
    try:
        return _read_window(source, numbers, resize, threads, deadline, allocate)
    except _FILE_ERRORS as error:
        raise DecodeError(source.path, short_reason(error)) from error


def _read_window(
    source: Source, numbers: range, resize: Resize | None, threads: int, deadline: Deadline, allocate: Allocate
) -> np.ndarray:
    with _open(source) as container:
        stream = _video_stream(source, container, threads)
        index = _index(container, stream, deadline)
        if not index.exact:
            window = _Window(source.path, np.array(numbers), resize, allocate)
            return _read_by_counting(source, window, numbers, threads, deadline)
        if numbers[-1] >= len(index.pts):
            raise DecodeError(source.path, f"it has {len(index.pts)} frames, the window needs {numbers[-1] + 1}")
        wanted = index.pts[numbers.start : numbers[-1] + 1 : numbers.step]
        for position in _seek_positions(index, stream, int(wanted[0])):
            container.seek(position.seek_to, stream=stream, backward=True)
            window = _Window(source.path, wanted, resize, allocate)
            if _decode_into(window, container, stream, deadline, not_after=position.dts):
                return window.frames()
    # Seeking failed this demuxer or decoder: from the very start there is nothing left to go wrong but the data.
    with _open(source) as container:
        window = _Window(source.path, wanted, resize, allocate)
        stream = _video_stream(source, container, threads)
        if _decode_into(window, container, stream, deadline, not_after=None):
            return window.frames()
    count = f"{window.missing()} of the {len(numbers)} frames from {numbers.start} on"
    raise DecodeError(source.path, f"{count} cannot be decoded")


def _open(source: Source) -> InputContainer:
    """A range of an archive is read by FFmpeg itself. Text in a damaged header need not be text."""
    if source.size is None:
        return av.open(source.file, metadata_errors="replace")
    url = f"subfile,,start,{source.offset},end,{source.offset + source.size},,:{source.file}"
    return av.open(url, metadata_errors="replace")


def _video_stream(source: Source, container: InputContainer, threads: int) -> VideoStream:
    """FFmpeg's own choice among several video streams (cover pictures lose, then the larger picture wins)."""
    stream = container.streams.best("video")
    if not isinstance(stream, VideoStream):
        raise DecodeError(source.path, "no video stream")
    context = stream.codec_context
    check_size(source.path, context.height, context.width)
    context.thread_count = threads
    context.thread_type = "AUTO" if threads > 1 else "SLICE"
    return stream


def _index(container: InputContainer, stream: VideoStream, deadline: Deadline) -> FrameIndex:
    """Read every packet's timestamps; leaves the container at its end."""
    pts: list[int] = []
    keys: list[tuple[int, int]] = []
    exact = container.format.name not in _WITHOUT_TIMES
    hidden_by_vp8 = stream.codec_context.name in ("vp8", "libvpx")
    for packet in container.demux(stream):
        deadline.check()
        if packet.size == 0 or packet.is_discard:
            continue
        if packet.pts is None:
            exact = False
            continue
        if not packet.is_keyframe and not keys:
            continue  # nothing to predict from: the decoder puts out nothing
        if hidden_by_vp8 and not bytes(packet)[0] & 0x10:
            continue  # a reference picture that is never shown
        pts.append(packet.pts)
        if packet.is_keyframe:
            keys.append((packet.pts, packet.pts if packet.dts is None else packet.dts))
    ordered = np.unique(np.array(pts, dtype=np.int64))
    keys.sort()
    key_array = np.array(keys, dtype=np.int64).reshape(-1, 2)
    return FrameIndex(
        pts=ordered,
        key_pts=key_array[:, 0],
        key_dts=key_array[:, 1],
        exact=exact and len(ordered) == len(pts),
    )


@dataclass(frozen=True, kw_only=True)
class _Position:
    seek_to: int
    dts: int  # decoding has to start at this packet or before it


def _seek_positions(index: FrameIndex, stream: VideoStream, first_pts: int) -> Iterator[_Position]:
    """Where to try, best first. Some demuxers look their target up among pts, others among dts."""
    if stream.codec_context.name in _DECODE_FROM_START:
        return
    before = int(np.searchsorted(index.key_pts, first_pts, side="right")) - 1
    if before <= 0:
        return
    dts = int(index.key_dts[before])
    for seek_to in dict.fromkeys((int(index.key_pts[before]), dts)):
        yield _Position(seek_to=seek_to, dts=dts)


class _Window:
    """The frames asked for, filled in as they come; converted at once so that decoder buffers go back."""

    def __init__(self, path: str, wanted_pts: np.ndarray, resize: Resize | None, allocate: Allocate) -> None:
        self._path = path
        self.slots = {int(pts): slot for slot, pts in enumerate(wanted_pts)}
        self._empty = set(self.slots.values())
        self._resize = resize
        self._allocate = allocate
        self._reformatter = VideoReformatter()
        self._frames: np.ndarray | None = None

    def put(self, slot: int, frame: VideoFrame) -> None:
        turns = round(frame.rotation / 90) % 4  # counter-clockwise quarter turns
        height, width = (frame.height, frame.width) if turns % 2 == 0 else (frame.width, frame.height)
        if self._frames is None:
            check_size(self._path, height, width)
            if self._resize is not None:
                height, width = self._resize(height, width)
            self._frames = self._allocate((len(self.slots), height, width, 3))
        target = self._frames.shape[1:3] if turns % 2 == 0 else self._frames.shape[2:0:-1]
        rgb = self._reformatter.reformat(frame, target[1], target[0], "rgb24", interpolation=Interpolation.BICUBIC)
        plane = rgb.planes[0]  # its lines are padded
        strides = (plane.line_size, 3, 1)
        picture = np.ndarray((rgb.height, rgb.width, 3), np.uint8, buffer=memoryview(plane), strides=strides)
        self._frames[slot] = np.rot90(picture, turns)
        self._empty.discard(slot)

    def missing(self) -> int:
        return len(self._empty)

    def frames(self) -> np.ndarray:
        assert self._frames is not None and not self._empty
        return self._frames


def _decode_into(
    window: _Window, container: InputContainer, stream: VideoStream, deadline: Deadline, not_after: int | None
) -> bool:
    """Decode from where the container stands until the window is full; False when a frame does not come.

    Frames that are not wanted and that no other frame refers to are not decoded at all; this cannot change the others.
    """
    context = stream.codec_context
    skips = context.name in _SKIPS_UNUSED
    for packet in container.demux(stream):
        deadline.check()
        if not_after is not None and packet.dts is not None:
            if packet.dts > not_after:
                return False  # landed behind the keyframe
            not_after = None
        if skips:
            context.skip_frame = "DEFAULT" if packet.pts is None or packet.pts in window.slots else "NONREF"
        try:
            frames = _frames_of(packet)
        except av.error.InvalidDataError:
            return False
        for frame in frames:
            if frame.is_corrupt:
                return False  # what follows is predicted from it
            if frame.pts in window.slots:
                window.put(window.slots[frame.pts], frame)
        if window.missing() == 0:
            return True
    return False


def _frames_of(packet: av.Packet) -> list[VideoFrame]:
    """The frames that the decoder releases on this packet; none for most, several at the end."""
    return [frame for frame in packet.decode() if isinstance(frame, VideoFrame)]


def _all_frames(source: Source, threads: int, deadline: Deadline) -> Iterator[VideoFrame]:
    """Every frame, in presentation order; a damaged packet releases none and decoding goes on, as players do."""
    with _open(source) as container:
        for packet in container.demux(_video_stream(source, container, threads)):
            deadline.check()
            with contextlib.suppress(av.error.InvalidDataError):
                yield from _frames_of(packet)


def _read_by_counting(source: Source, window: _Window, numbers: range, threads: int, deadline: Deadline) -> np.ndarray:
    """The slow way for streams whose packets do not say when they are shown."""
    seen = 0
    for seen, frame in enumerate(_all_frames(source, threads, deadline), start=1):
        if seen - 1 in window.slots:
            window.put(window.slots[seen - 1], frame)
        if window.missing() == 0:
            return window.frames()
    raise DecodeError(source.path, f"it has {seen} frames, the window needs {numbers[-1] + 1}")


def _frame_rate(index: FrameIndex, declared: Fraction | None, base: Fraction | None) -> float:
    """Frames per second by the timestamps; the declared rate where it agrees, because timestamps may be rounded."""
    seconds = float((index.pts[-1] - index.pts[0]) * base) if base and len(index.pts) > 1 else 0.0
    if seconds <= 0:
        return float(declared) if declared else 1.0
    measured = (len(index.pts) - 1) / seconds
    return float(declared) if declared and abs(measured / float(declared) - 1) < 0.01 else measured
