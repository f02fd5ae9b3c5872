"""Frames of a clip by number: seek to the keyframe before the window and decode no more than the window needs.

Frame i of a clip is the i-th frame its decoder puts out, in presentation order; times play no part. Numbers are turned
into timestamps with the timestamps of the packets, which a demuxer reads without decoding, so variable frame rates and
clips that do not start at zero need no special case. What a window returns is bit for bit what decoding the whole clip
and slicing would return, or a ``DecodeError``. In a damaged clip a frame that cannot be decoded keeps its number, and
what is predicted from it is not returned either.

Readers are opened per call and never kept, which makes the functions safe in forked workers.
"""

import contextlib
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.reformatter import Interpolation, VideoReformatter
from av.video.stream import VideoStream
from PIL import Image, ImageOps

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
VIDEO_SUFFIXES = (".mp4", ".mkv", ".mov", ".webm", ".avi", ".m4v", ".mpg", ".mpeg", ".ts", ".wmv", ".flv", ".gif")

# Their "keyframe" flags do not promise that decoding can start there.
_DECODE_FROM_START = ("gif", "apng")
# Their packets carry no presentation times; what the demuxer makes up is wrong as soon as frames are reordered.
_WITHOUT_TIMES = ("avi", "h264", "hevc")
# Where a frame nobody refers to may be left undecoded from packet to packet; libdav1d reads the setting only once.
_SKIPS_UNUSED = ("h264", "hevc")
# What a damaged or foreign file raises: FFmpeg's errors, the system's, and the ways in which pillow's parsers fail.
_FILE_ERRORS = (av.FFmpegError, OSError)
_IMAGE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)

Resize = Callable[[int, int], tuple[int, int]]


class DecodeError(Exception):
    """This file cannot give these frames; ``path`` and ``cause`` say which and why."""

    def __init__(self, path: str, cause: str) -> None:
        super().__init__(path, cause)
        self.path = path
        self.cause = cause

    def __str__(self) -> str:
        return f"{self.path}: {self.cause}"


@dataclass(frozen=True, kw_only=True)
class MediaInfo:
    """What the clip table holds of a file."""

    num_frames: int
    height: int  # as displayed, after rotation
    width: int
    fps: float | None  # None for an image


@dataclass(frozen=True, kw_only=True)
class FrameIndex:
    """Timestamps of a stream's frames, from its packets."""

    pts: np.ndarray  # (n,) int64, presentation order
    key_pts: np.ndarray  # (k,) int64, ascending
    key_dts: np.ndarray  # (k,) int64, of the same keyframes
    exact: bool  # False: packets without, or with repeated, timestamps; only counting decoded frames is right


def is_image(path: str) -> bool:
    """Whether the file is read as a still; gif counts as a video."""
    return path.lower().endswith(IMAGE_SUFFIXES)


def probe(path: str) -> MediaInfo:
    """Number of frames, displayed size and frame rate; decodes one frame.

    Raises:
        DecodeError: the file cannot be read.
    """
    _refuse_irregular(path)
    if is_image(path):
        height, width = _read_image(path, None).shape[:2]
        return MediaInfo(num_frames=1, height=height, width=width, fps=None)
    try:
        with av.open(path) as container:
            stream = _video_stream(path, container, threads=1)
            index = _index(container, stream)
            rate, base = stream.average_rate, stream.time_base
        first = read_frames(path, 0, 1)
        count = len(index.pts) if index.exact else sum(1 for _ in _all_frames(path, threads=1))
    except _FILE_ERRORS as error:
        raise _decode_error(path, error) from error
    fps = _frame_rate(index, rate, base)
    return MediaInfo(num_frames=count, height=first.shape[1], width=first.shape[2], fps=fps)


def read_frames(
    path: str, start: int, count: int, interval: int = 1, *, resize: Resize | None = None, threads: int = 1
) -> np.ndarray:
    """Frames start, start + interval, ... of a clip or image.

    Args:
        count: how many frames to return.
        resize: maps the displayed (height, width) to the size wanted; frames are scaled one by one (bicubic,
            antialiased), so that memory holds the window at the small size only.

    Returns:
        (count, H, W, 3) uint8 RGB, rotation tag applied.

    Raises:
        DecodeError: the file cannot be read, is too short, or is damaged inside the window.
    """
    if start < 0 or count < 1 or interval < 1:
        raise ValueError(f"start={start}, count={count}, interval={interval}: allowed are start >= 0, the others >= 1")
    _refuse_irregular(path)
    if is_image(path):
        if start + count > 1:
            raise DecodeError(path, f"an image has 1 frame, the window needs {start + (count - 1) * interval + 1}")
        return _read_image(path, resize)[None]
    try:
        return _read_window(path, start, count, interval, resize, threads)
    except _FILE_ERRORS as error:
        raise _decode_error(path, error) from error


def _read_window(path: str, start: int, count: int, interval: int, resize: Resize | None, threads: int) -> np.ndarray:
    numbers = range(start, start + count * interval, interval)
    with av.open(path) as container:
        stream = _video_stream(path, container, threads)
        index = _index(container, stream)
        if not index.exact:
            return _read_by_counting(path, numbers, resize, threads)
        if numbers[-1] >= len(index.pts):
            raise DecodeError(path, f"it has {len(index.pts)} frames, the window needs {numbers[-1] + 1}")
        wanted = index.pts[numbers.start : numbers[-1] + 1 : interval]
        for position in _seek_positions(index, stream, int(wanted[0])):
            container.seek(position.seek_to, stream=stream, backward=True)
            window = _Window(wanted, resize)
            if _decode_into(window, container, stream, not_after=position.dts):
                return window.frames()
    # Seeking failed this demuxer or decoder: from the very start there is nothing left to go wrong but the data.
    with av.open(path) as container:
        window = _Window(wanted, resize)
        if _decode_into(window, container, _video_stream(path, container, threads), not_after=None):
            return window.frames()
    raise DecodeError(path, f"{window.missing()} of the {count} frames from {start} on cannot be decoded")


def _video_stream(path: str, container: InputContainer, threads: int) -> VideoStream:
    """FFmpeg's own choice among several video streams (cover pictures lose, then the larger picture wins)."""
    stream = container.streams.best("video")
    if not isinstance(stream, VideoStream):
        raise DecodeError(path, "no video stream")
    context = stream.codec_context
    context.thread_count = threads
    context.thread_type = "AUTO" if threads > 1 else "SLICE"
    return stream


def _index(container: InputContainer, stream: VideoStream) -> FrameIndex:
    """Read every packet's timestamps; leaves the container at its end."""
    pts: list[int] = []
    keys: list[tuple[int, int]] = []
    exact = container.format.name not in _WITHOUT_TIMES
    hidden_by_vp8 = stream.codec_context.name in ("vp8", "libvpx")
    for packet in container.demux(stream):
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

    def __init__(self, wanted_pts: np.ndarray, resize: Resize | None) -> None:
        self.slots = {int(pts): slot for slot, pts in enumerate(wanted_pts)}
        self._empty = set(self.slots.values())
        self._resize = resize
        self._reformatter = VideoReformatter()
        self._frames: np.ndarray | None = None

    def put(self, slot: int, frame: VideoFrame) -> None:
        turns = round(frame.rotation / 90) % 4  # counter-clockwise quarter turns
        height, width = (frame.height, frame.width) if turns % 2 == 0 else (frame.width, frame.height)
        if self._frames is None:
            if self._resize is not None:
                height, width = self._resize(height, width)
            self._frames = np.empty((len(self.slots), height, width, 3), dtype=np.uint8)
        target = self._frames.shape[1:3] if turns % 2 == 0 else self._frames.shape[2:0:-1]
        rgb = self._reformatter.reformat(frame, target[1], target[0], "rgb24", interpolation=Interpolation.BICUBIC)
        self._frames[slot] = np.rot90(rgb.to_ndarray(), turns)
        self._empty.discard(slot)

    def missing(self) -> int:
        return len(self._empty)

    def frames(self) -> np.ndarray:
        assert self._frames is not None and not self._empty
        return self._frames


def _decode_into(window: _Window, container: InputContainer, stream: VideoStream, not_after: int | None) -> bool:
    """Decode from where the container stands until the window is full; False when a frame does not come.

    Frames that are not wanted and that no other frame refers to are not decoded at all; this cannot change the others.
    """
    context = stream.codec_context
    skips = context.name in _SKIPS_UNUSED
    for packet in container.demux(stream):
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


def _all_frames(path: str, threads: int) -> Iterator[VideoFrame]:
    """Every frame, in presentation order; a damaged packet releases none and decoding goes on, as players do."""
    with av.open(path) as container:
        for packet in container.demux(_video_stream(path, container, threads)):
            with contextlib.suppress(av.error.InvalidDataError):
                yield from _frames_of(packet)


def _read_by_counting(path: str, numbers: range, resize: Resize | None, threads: int) -> np.ndarray:
    """The slow way for streams whose packets do not say when they are shown."""
    window = _Window(np.array(numbers), resize)
    seen = 0
    for seen, frame in enumerate(_all_frames(path, threads), start=1):
        if seen - 1 in window.slots:
            window.put(window.slots[seen - 1], frame)
        if window.missing() == 0:
            return window.frames()
    raise DecodeError(path, f"it has {seen} frames, the window needs {numbers[-1] + 1}")


def _frame_rate(index: FrameIndex, declared: Fraction | None, base: Fraction | None) -> float:
    """Frames per second by the timestamps; the declared rate where it agrees, because timestamps may be rounded."""
    seconds = float((index.pts[-1] - index.pts[0]) * base) if base and len(index.pts) > 1 else 0.0
    if seconds <= 0:
        return float(declared) if declared else 1.0
    measured = (len(index.pts) - 1) / seconds
    return float(declared) if declared and abs(measured / float(declared) - 1) < 0.01 else measured


def _read_image(path: str, resize: Resize | None) -> np.ndarray:
    """(H, W, 3) uint8, EXIF orientation applied, transparency dropped."""
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file).convert("RGB")
            if resize is not None:
                height, width = resize(image.height, image.width)
                image = image.resize((width, height), Image.Resampling.BICUBIC)
            return np.array(image)  # pillow's own buffer is read-only
    except _IMAGE_ERRORS as error:
        raise _decode_error(path, error) from error


def _refuse_irregular(path: str) -> None:
    """Opening a pipe or a device would block for ever."""
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        raise _decode_error(path, error) from error
    if not stat.S_ISREG(mode):
        raise DecodeError(path, "not a regular file")


def _decode_error(path: str, error: BaseException) -> DecodeError:
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return DecodeError(path, " ".join(str(reason).split())[:200])
