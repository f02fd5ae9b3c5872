"""Frames by PyAV: seek to the keyframe before the window and decode no more than the window needs.

Numbers are turned into timestamps with the timestamps of the packets, which a demuxer reads without decoding, so
variable frame rates and clips that do not start at zero need no special case. What a window returns is bit for bit
what decoding the whole clip and slicing would return, or a ``DecodeError``. In a damaged clip a frame that cannot be
decoded keeps its number, and what is predicted from it is not returned either.

Frames are as a player shows them: turned and mirrored by the display matrix, widened by the sample aspect ratio (the
number of lines stays), on a background where they are transparent. Colours follow the tags of the stream; where it has
none, pictures of at least 1280 columns or more than 576 lines are taken for BT.709, others for BT.601, as players do.
High dynamic range is not tone-mapped: the values of its curve are returned as they are, and ``probe`` says so.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Any, NamedTuple

import av
import numpy as np
from av.container import InputContainer
from av.sidedata.sidedata import Type as SideDataType
from av.stream import Disposition
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.reformatter import Colorspace, Interpolation, VideoReformatter
from av.video.stream import VideoStream

from opensora.datasets.decode.common import (
    MAX_FPS,
    WHITE,
    Allocate,
    Colour,
    Deadline,
    DecodeError,
    Resize,
    Turn,
    check_size,
    new_array,
    on_background,
    rate_of,
    scale_rgb,
)
from opensora.datasets.decode.file_type import CLIP_SUFFIXES, sniff_source
from opensora.datasets.decode.gif_blocks import pictures_in
from opensora.datasets.decode.pillow_backend import gif_lacks_pixels
from opensora.datasets.table.clip_storage import Source
from opensora.utils.files.untrusted import parsing

# What a file may be read as. Lists of other files (concat, HLS, DASH, numbered pictures), text that is drawn and
# devices are not among them: a file must not make a run open another place.
_CONTAINERS = (
    "mov", "matroska", "avi", "flv", "live_flv", "asf", "asf_o", "mpegts", "mpeg", "mpegvideo", "m4v", "h261", "h263",
    "h264", "hevc", "vvc", "av1", "obu", "ivf", "gif", "ogg", "rm", "mxf", "gxf", "nut", "nuv", "nsv", "wtv", "dv",
    "vc1", "mjpeg", "yuv4mpegpipe", "cavsvideo", "dirac", "dnxhd", "flic", "smjpeg", "kux",
)  # fmt: skip
_OPTIONS = {"format_whitelist": ",".join(_CONTAINERS), "protocol_whitelist": "file,subfile"}
_WEAK_CONTENTS = {
    "MPEG program stream": "mpeg",
    "MPEG transport stream": "mpegts",
    "MPEG video": "mpegvideo",
    "MPEG-4 video": "m4v",
    "H.264": "h264",
    "H.265": "hevc",
}
# Their "keyframe" flags do not promise that decoding can start there.
_DECODE_FROM_START = ("gif", "apng")
# Their packets carry no presentation times; what the demuxer makes up is wrong as soon as frames are reordered.
_WITHOUT_TIMES = ("avi", "h264", "hevc", "vvc", "m4v", "mpegvideo", "vc1")
# Of these the codec alone says the rate; the demuxer makes times up for 25 frames a second, and that is their average.
_BARE_STREAMS = ("h264", "hevc", "vvc", "m4v", "vc1")
# Where a frame nobody refers to may be left undecoded from packet to packet; libdav1d reads the setting only once.
_SKIPS_UNUSED = ("h264", "hevc")
# FFmpeg's own decoders pass over the alpha that WebM stores beside the picture.
_ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
_MOST_FRAMES = 2**24  # of a clip: six days at 30 per second
_MOST_STRETCH = 16  # of pixels, in width or height: beyond is a damaged header
_LEAST_STRETCH = Fraction(1, 200)  # off square: less is a rounded header, and not worth the loss of scaling
_PALETTE = "pal8"  # pixel format whose colours may be transparent, as those of PNG
_HD_WIDTH, _SD_HEIGHT = 1280, 576
# Numbers of AVColorSpace, AVColorRange and AVColorTransferCharacteristic.
_UNTAGGED_MATRIX = (2, 3)  # unspecified, reserved
_KNOWN_MATRIX = (0, 1, 4, 5, 6, 7, 9, *_UNTAGGED_MATRIX)  # what swscale converts
_UNTAGGED_RANGE, _LIMITED_RANGE = 0, 1
_HDR_CURVES = {16: "PQ", 18: "HLG"}
_LIMITED_GREY = ("h264", "hevc", "vvc", "av1", "libdav1d", "vp9")  # their grey without a tag is of limited range


@dataclass(frozen=True, kw_only=True)
class FrameIndex:
    """Timestamps of a stream's frames, from its packets."""

    pts: np.ndarray  # (n,) int64, presentation order
    key_pts: np.ndarray  # (k,) int64, ascending
    key_dts: np.ndarray  # (k,) int64, of the same keyframes
    exact: bool  # False: packets without, or with repeated, timestamps; only counting decoded frames is right
    shown_s: tuple[float, ...] = ()  # of a GIF: what every picture says of the time that it is shown


@dataclass(frozen=True, kw_only=True)
class Clip:
    """What ``probe`` finds out."""

    num_frames: int
    height: int  # as displayed
    width: int
    fps: float
    note: str


class _About(NamedTuple):
    """What the conversion of a stream's frames depends on."""

    codec: str
    stretch: Fraction  # width of a pixel over its height
    decoder: VideoCodecContext | None  # to be used in place of the stream's own


class _Stored(NamedTuple):
    """A decoded frame as it is stored."""

    height: int
    width: int
    pixels: str  # name of its pixel format
    has_alpha: bool
    matrix: int
    range: int
    curve: int
    turn: Turn


def probe(source: Source, deadline: Deadline) -> Clip:
    """Reads the times of all packets and decodes the first frame; all frames of files without times.

    Raises:
        DecodeError: the file cannot be read.
    """
    refuse = partial(DecodeError, source.path)
    with _Opened(source) as container:
        stream = _video_stream(source, container, threads=1)
        index = _index(source, container, stream, deadline)
        with parsing(refuse):
            bare = container.format.name in _BARE_STREAMS
            rate, base = (stream.guessed_rate, None) if bare else (stream.average_rate, stream.time_base)
    seen: list[_Stored] = []
    first = _read(source, range(1), None, 1, deadline, new_array, WHITE, seen.append)
    count = len(index.pts) if index.exact else sum(1 for _ in _all_frames(source, threads=1, deadline=deadline))
    fps, note = _frame_rate(index, rate, base)
    if seen and seen[0].curve in _HDR_CURVES:
        pale = f"high dynamic range ({_HDR_CURVES[seen[0].curve]}) is not tone-mapped; colours look pale"
        note = f"{note}; {pale}" if note else pale
    return Clip(num_frames=count, height=first.shape[1], width=first.shape[2], fps=fps, note=note)


def read_window(
    source: Source,
    numbers: range,
    resize: Resize | None,
    threads: int,
    deadline: Deadline,
    allocate: Allocate,
    background: Colour = WHITE,
) -> np.ndarray:
    """The frames of these numbers; see ``opensora.datasets.decode.api.read_frames``."""
    return _read(source, numbers, resize, threads, deadline, allocate, background, lambda stored: None)


def is_plain(source: Source, deadline: Deadline) -> bool:
    """Whether frames are shown as they are stored: all of them, no turn, square pixels, opaque, colours that need no
    guess.

    Other decoders than this one disagree about all else.

    Raises:
        DecodeError: the file cannot be read.
    """
    with _Opened(source) as container:
        stream = _video_stream(source, container, threads=1)
        about = _about(source, stream)
        if about.stretch != 1 or about.decoder is not None:
            return False
        frame, before = _first_frame(source, container, stream, deadline)
    if frame is None:
        raise DecodeError(source.path, "no frame of it can be decoded")
    if before:
        return False
    stored = _stored(source, frame)
    guessed = stored.matrix in _UNTAGGED_MATRIX and _is_hd(stored)
    return stored.turn == Turn() and not stored.has_alpha and not guessed


def _first_frame(
    source: Source, container: InputContainer, stream: VideoStream, deadline: Deadline
) -> tuple[VideoFrame | None, bool]:
    """(the first frame that the decoder puts out, whether packets before it were to be shown earlier)."""
    times: list[int] = []
    for packet in _packets(source, container, stream, deadline):
        with parsing(partial(DecodeError, source.path)):
            times += [] if packet.pts is None else [packet.pts]
        for frame in _frames_or_damage(source, packet, None) or ():
            with parsing(partial(DecodeError, source.path)):
                return frame, frame.pts is not None and min(times, default=frame.pts) < frame.pts
    return None, False


def _read(
    source: Source,
    numbers: range,
    resize: Resize | None,
    threads: int,
    deadline: Deadline,
    allocate: Allocate,
    background: Colour,
    look: Callable[[_Stored], object],
) -> np.ndarray:
    def window(about: _About, wanted: np.ndarray) -> _Window:
        return _Window(source, about, wanted, resize, allocate, background, look)

    with _Opened(source) as container:
        stream = _video_stream(source, container, threads)
        about = _about(source, stream)
        index = _index(source, container, stream, deadline)
        if not index.exact:
            return _read_by_counting(source, window(about, np.array(numbers)), numbers, threads, deadline)
        if numbers[-1] >= len(index.pts):
            raise DecodeError(source.path, f"it has {len(index.pts)} frames, the window needs {numbers[-1] + 1}")
        wanted = index.pts[numbers.start : numbers[-1] + 1 : numbers.step]
        for position in _seek_positions(index, about.codec, int(wanted[0])):
            with parsing(partial(DecodeError, source.path)):
                container.seek(position.seek_to, stream=stream, backward=True)
            filled = window(_about(source, stream), wanted)
            if _decode_into(filled, container, stream, deadline, not_after=position.dts):
                return filled.frames()
    # Seeking failed this demuxer or decoder: from the very start there is nothing left to go wrong but the data.
    with _Opened(source) as container:
        stream = _video_stream(source, container, threads)
        filled = window(_about(source, stream), wanted)
        if _decode_into(filled, container, stream, deadline, not_after=None):
            return filled.frames()
    count = f"{filled.missing()} of the {len(numbers)} frames from {numbers.start} on"
    raise DecodeError(source.path, f"{count} cannot be decoded")


class _Opened:
    """A container that is closed at the end of the block. A range of an archive is read by FFmpeg itself."""

    def __init__(self, source: Source) -> None:
        self._source = source
        # Named as a file, or a colon in the name would make the part before it a protocol.
        self._url = f"file:{os.path.abspath(source.file)}"
        if source.size is not None:
            self._url = f"subfile,,start,{source.offset},end,{source.offset + source.size},,:{self._url}"

    def __enter__(self) -> InputContainer:
        demuxer = None
        suffix = os.path.splitext(self._source.file)[1].lower()
        if suffix not in CLIP_SUFFIXES:  # FFmpeg trusts a suffix more than these contents
            demuxer = _WEAK_CONTENTS.get(sniff_source(self._source).what)
        with parsing(partial(DecodeError, self._source.path)):
            # Text in a damaged header need not be text.
            opened = av.open(self._url, format=demuxer, metadata_errors="replace", options=dict(_OPTIONS))
        self._container = opened
        return opened

    def __exit__(self, *_: object) -> None:
        with parsing(partial(DecodeError, self._source.path)):
            self._container.close()


def _video_stream(source: Source, container: InputContainer, threads: int) -> VideoStream:
    """FFmpeg's own choice among several video streams (cover pictures lose, then the larger picture wins)."""
    with parsing(partial(DecodeError, source.path)):
        stream = container.streams.best("video")
    if not isinstance(stream, VideoStream):
        raise DecodeError(source.path, "no video stream")
    with parsing(partial(DecodeError, source.path)):
        context = stream.codec_context
        is_cover = bool(stream.disposition & Disposition.attached_pic)
    if is_cover:
        raise DecodeError(source.path, "no video stream, only a cover picture")
    if context is None:
        raise DecodeError(source.path, "no decoder for its video codec")
    with parsing(partial(DecodeError, source.path)):
        height, width = context.height, context.width
        context.thread_count = threads
        context.thread_type = "AUTO" if threads > 1 else "SLICE"
    if height and width:  # else only the frames say
        check_size(source.path, height, width)
    return stream


def _about(source: Source, stream: VideoStream) -> _About:
    """Anew after every seek: a decoder in place of the stream's own is not reset by it."""
    with parsing(partial(DecodeError, source.path)):
        codec, ratio = stream.codec_context.name, stream.sample_aspect_ratio
        beside = _ALPHA_DECODERS.get(codec) if stream.metadata.get("alpha_mode") == "1" else None
        decoder: Any = VideoCodecContext.create(beside, "r") if beside else None
    stretch = ratio if ratio is not None and ratio > 0 else Fraction(1)
    if not Fraction(1, _MOST_STRETCH) <= stretch <= _MOST_STRETCH:
        raise DecodeError(source.path, f"its pixels are {stretch} times as wide as high, so its header is damaged")
    return _About(codec, Fraction(1) if abs(stretch - 1) < _LEAST_STRETCH else stretch, decoder)


def _packets(source: Source, container: InputContainer, stream: VideoStream, deadline: Deadline) -> Iterator[av.Packet]:
    refuse = partial(DecodeError, source.path)
    with parsing(refuse):
        packets = container.demux(stream)
    while True:
        deadline.check()
        with parsing(refuse):
            packet = next(packets, None)
        if packet is None:
            return
        yield packet


def _index(source: Source, container: InputContainer, stream: VideoStream, deadline: Deadline) -> FrameIndex:
    """Read every packet's timestamps; leaves the container at its end."""
    refuse = partial(DecodeError, source.path)
    pts: list[int] = []
    keys: list[tuple[int, int]] = []
    shown_s: list[float] = []
    with parsing(refuse):
        is_gif = container.format.name == "gif"
        exact = container.format.name not in _WITHOUT_TIMES
        hidden_by_vp8 = stream.codec_context.name in ("vp8", "libvpx")
    start = _start(source) if is_gif else b""
    for packet in _packets(source, container, stream, deadline):
        with parsing(refuse):
            nothing = packet.size == 0 or packet.is_discard
            shown, decoded, is_key = packet.pts, packet.dts, packet.is_keyframe
            # A reference picture of VP8 that is never shown.
            hidden = hidden_by_vp8 and not nothing and not bytes(packet)[0] & 0x10
            content = bytes(packet) if is_gif else b""
        if nothing:
            continue
        if is_gif:
            pictures = pictures_in(content)
            if not all(picture.is_whole for picture in pictures) or gif_lacks_pixels(start, content):
                break  # FFmpeg would show what there is of it, and the others are drawn over it
            shown_s += [picture.seconds for picture in pictures[:1]]
        if shown is None:
            exact = False
            continue
        if (not is_key and not keys) or hidden:
            continue  # nothing to predict from: the decoder puts out nothing
        pts.append(shown)
        if is_key:
            keys.append((shown, shown if decoded is None else decoded))
        if len(pts) > _MOST_FRAMES:
            raise DecodeError(source.path, f"more than {_MOST_FRAMES} frames; cut it into clips")
    ordered = np.unique(np.array(pts, dtype=np.int64))
    exact = exact and len(ordered) == len(pts)
    first_key = keys[0][0] if keys else 0
    if exact and keys and ordered[0] < first_key:
        shown_before = _shown_before(source, first_key, deadline)
        ordered = np.array([at for at in ordered.tolist() if at >= first_key or at in shown_before], dtype=np.int64)
    keys.sort()
    key_array = np.array(keys, dtype=np.int64).reshape(-1, 2)
    return FrameIndex(
        pts=ordered,
        key_pts=key_array[:, 0],
        key_dts=key_array[:, 1],
        exact=exact,
        shown_s=tuple(shown_s),
    )


def _shown_before(source: Source, first_key: int, deadline: Deadline) -> set[int]:
    """Times of the frames that are decoded after the first keyframe and shown before it, as far as they can be: where
    a clip was cut out of a longer one without coding it anew, they are predicted from what was cut off."""
    found: set[int] = set()
    at: int | None
    for frame in _all_frames(source, threads=1, deadline=deadline):
        with parsing(partial(DecodeError, source.path)):
            damaged, at = frame.is_corrupt, frame.pts
        if at is None or at >= first_key:
            break
        if not damaged:
            found.add(at)
    return found


def _start(source: Source) -> bytes:
    """The size and the flags of a GIF."""
    with source.open() as file, parsing(partial(DecodeError, source.path)):
        return file.read(13)


@dataclass(frozen=True, kw_only=True)
class _Position:
    seek_to: int
    dts: int  # decoding has to start at this packet or before it


def _seek_positions(index: FrameIndex, codec: str, first_pts: int) -> Iterator[_Position]:
    """Where to try, best first. Some demuxers look their target up among pts, others among dts."""
    if codec in _DECODE_FROM_START:
        return
    before = int(np.searchsorted(index.key_pts, first_pts, side="right")) - 1
    if before <= 0:
        return
    dts = int(index.key_dts[before])
    for seek_to in dict.fromkeys((int(index.key_pts[before]), dts)):
        yield _Position(seek_to=seek_to, dts=dts)


class _Window:
    """The frames asked for, filled in as they come; converted at once so that decoder buffers go back."""

    def __init__(
        self,
        source: Source,
        about: _About,
        wanted_pts: np.ndarray,
        resize: Resize | None,
        allocate: Allocate,
        background: Colour,
        look: Callable[[_Stored], object],
    ) -> None:
        self.source = source
        self.about = about
        self.slots = {int(pts): slot for slot, pts in enumerate(wanted_pts)}
        self._empty = set(self.slots.values())
        self._resize = resize
        self._allocate = allocate
        self._background = background
        self._look = look
        self._reformatter = VideoReformatter()
        self._frames: np.ndarray | None = None

    def put(self, slot: int, frame: VideoFrame) -> None:
        stored = _stored(self.source, frame)
        if self._frames is None:
            self._look(stored)
            self._frames = self._allocate((len(self.slots), *self._size(stored), 3))
        height, width = stored.turn.shape(*self._frames.shape[1:3])
        if stored.has_alpha:
            rgba = self._convert(frame, stored, stored.height, stored.width, "rgba")
            unused = stored.pixels == _PALETTE and not rgba[..., 3].any()  # a palette without alpha, its bytes left 0
            opaque = rgba[..., :3] if unused else on_background(rgba, self._background)
            picture = scale_rgb(np.ascontiguousarray(opaque), lambda *_: (height, width))
        else:
            picture = self._convert(frame, stored, height, width, "rgb24")
        if _is_limited_grey(stored, self.about.codec):
            picture = _FULL_RANGE[picture]
        self._frames[slot] = stored.turn(picture)
        self._empty.discard(slot)

    def _size(self, stored: _Stored) -> tuple[int, int]:
        """(height, width) wanted, of frames as displayed."""
        wide = max(1, round(stored.width * self.about.stretch))
        height, width = stored.turn.shape(stored.height, wide)
        check_size(self.source.path, height, width)
        return (height, width) if self._resize is None else self._resize(height, width)

    def _convert(self, frame: VideoFrame, stored: _Stored, height: int, width: int, pixels: str) -> np.ndarray:
        """(height, width, 3 or 4) uint8 in memory of FFmpeg's."""
        if stored.matrix not in _KNOWN_MATRIX:
            raise DecodeError(self.source.path, f"its colour matrix (number {stored.matrix}) cannot be converted")
        matrix = Colorspace.ITU709 if stored.matrix in _UNTAGGED_MATRIX and _is_hd(stored) else None
        channels = len(pixels.removesuffix("24"))
        with parsing(partial(DecodeError, self.source.path)):
            rgb = self._reformatter.reformat(
                frame, width, height, pixels, src_colorspace=matrix, interpolation=Interpolation.BICUBIC
            )
            plane = rgb.planes[0]  # its lines are padded
            strides = (plane.line_size, channels, 1)
            return np.ndarray((rgb.height, rgb.width, channels), np.uint8, buffer=memoryview(plane), strides=strides)

    def missing(self) -> int:
        return len(self._empty)

    def frames(self) -> np.ndarray:
        assert self._frames is not None and not self._empty
        return self._frames


def _stored(source: Source, frame: VideoFrame) -> _Stored:
    with parsing(partial(DecodeError, source.path)):
        layout = frame.format
        has_alpha = layout.name == _PALETTE or any(component.is_alpha for component in layout.components)
        facts = (frame.height, frame.width, layout.name, has_alpha)
        colours = (frame.colorspace, frame.color_range, frame.color_trc)
        side_data: Any = frame.side_data  # iterates over its values, unlike a mapping
        matrix = next((data for data in side_data if data.type is SideDataType.DISPLAYMATRIX), None)
        entries = None if matrix is None else np.frombuffer(bytes(matrix), np.int32)[:9].tolist()
    return _Stored(*facts, *colours, Turn() if entries is None else _turn_of(entries))


def _turn_of(matrix: list[int]) -> Turn:
    """The nearest turn by quarters, mirrored or not, to a display matrix (rows a b u, c d v, x y w)."""
    a, b, _, c, d = matrix[:5]
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return Turn(flip_rows=d < 0, flip_columns=a < 0)
    return Turn(transpose=True, flip_rows=b < 0, flip_columns=c < 0)


def _is_hd(stored: _Stored) -> bool:
    """Whether players take colours without a tag for BT.709."""
    is_yuv = stored.pixels.startswith(("yuv", "nv", "p0", "p2", "p4", "y2", "uyvy", "vuy", "xv"))
    return is_yuv and (stored.width >= _HD_WIDTH or stored.height > _SD_HEIGHT)


# What limited range (16 to 235) becomes in full range.
_FULL_RANGE = np.rint((np.arange(256) - 16.0) * (255 / 219)).clip(0, 255).astype(np.uint8)


def _is_limited_grey(stored: _Stored, codec: str) -> bool:
    """swscale takes all grey for full range."""
    if not stored.pixels.startswith("gray"):
        return False
    return stored.range == _LIMITED_RANGE or (stored.range == _UNTAGGED_RANGE and codec in _LIMITED_GREY)


def _decode_into(
    window: _Window, container: InputContainer, stream: VideoStream, deadline: Deadline, not_after: int | None
) -> bool:
    """Decode from where the container stands until the window is full; False when a frame does not come.

    Frames that are not wanted and that no other frame refers to are not decoded at all; this cannot change the others.
    """
    refuse = partial(DecodeError, window.source.path)
    with parsing(refuse):
        context = stream.codec_context
        skips = context.name in _SKIPS_UNUSED
    for packet in _packets(window.source, container, stream, deadline):
        with parsing(refuse):
            shown, decoded = packet.pts, packet.dts
            if skips:
                context.skip_frame = "DEFAULT" if shown is None or shown in window.slots else "NONREF"
        if not_after is not None and decoded is not None:
            if decoded > not_after:
                return False  # landed behind the keyframe
            not_after = None
        frames = _frames_or_damage(window.source, packet, window.about.decoder)
        if frames is None:
            return False
        for frame in frames:
            with parsing(refuse):
                damaged, pts = frame.is_corrupt, frame.pts
            if damaged:
                return False  # what follows is predicted from it
            if pts in window.slots:
                window.put(window.slots[pts], frame)
        if window.missing() == 0:
            return True
    return False


def _frames_or_damage(source: Source, packet: av.Packet, decoder: VideoCodecContext | None) -> list[VideoFrame] | None:
    """The frames that the decoder releases on this packet; None: it is damaged."""
    try:
        return _frames_of(packet) if decoder is None else _frames_beside(packet, decoder)
    except _Damaged:
        return None
    except _Unreadable as error:
        raise DecodeError(source.path, str(error)) from error


class _Damaged(Exception):
    """A packet that cannot be decoded, behind which others may be."""


class _Unreadable(Exception):
    """A decoder that gave up, with one line that says why."""


def _frames_of(packet: av.Packet) -> list[VideoFrame]:
    """The frames that the decoder releases on this packet; none for most, several at the end."""
    with parsing(_Unreadable):
        try:
            return [frame for frame in packet.decode() if isinstance(frame, VideoFrame)]
        except av.error.InvalidDataError as error:
            raise _Damaged from error


def _frames_beside(packet: av.Packet, decoder: VideoCodecContext) -> list[VideoFrame]:
    """The same by another decoder than the stream's own; an empty packet is the end."""
    with parsing(_Unreadable):
        try:
            frames = decoder.decode(packet if packet.size else None)
            return [frame for frame in frames if isinstance(frame, VideoFrame)]
        except av.error.InvalidDataError as error:
            raise _Damaged from error


def _all_frames(source: Source, threads: int, deadline: Deadline) -> Iterator[VideoFrame]:
    """Every frame, in presentation order; a damaged packet releases none and decoding goes on, as players do."""
    with _Opened(source) as container:
        stream = _video_stream(source, container, threads)
        decoder = _about(source, stream).decoder
        for packet in _packets(source, container, stream, deadline):
            yield from _frames_or_damage(source, packet, decoder) or ()


def _read_by_counting(source: Source, window: _Window, numbers: range, threads: int, deadline: Deadline) -> np.ndarray:
    """The slow way for streams whose packets do not say when they are shown."""
    seen = 0
    for seen, frame in enumerate(_all_frames(source, threads, deadline), start=1):
        if seen - 1 in window.slots:
            window.put(window.slots[seen - 1], frame)
        if window.missing() == 0:
            return window.frames()
    raise DecodeError(source.path, f"it has {seen} frames, the window needs {numbers[-1] + 1}")


def _frame_rate(index: FrameIndex, declared: Fraction | None, base: Fraction | None) -> tuple[float, str]:
    """(frames per second by the timestamps, a note); the declared rate where it agrees: timestamps may be rounded."""
    if index.shown_s:
        return rate_of(index.shown_s), ""
    seconds = float((int(index.pts[-1]) - int(index.pts[0])) * base) if base and len(index.pts) > 1 else 0.0
    rate = float(declared) if declared else 1.0
    if seconds > 0:
        measured = (len(index.pts) - 1) / seconds
        rate = rate if declared and abs(measured / rate - 1) < 0.01 else measured
    if not 0 < rate < MAX_FPS:
        return 1.0, f"its rate of {rate:g} frames per second cannot be right; 1 is used"
    return rate, ""
