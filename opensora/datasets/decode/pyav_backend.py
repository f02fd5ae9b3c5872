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

from collections.abc import Callable, Sequence

import numpy as np
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from opensora.datasets.decode.common import (
    WHITE,
    Allocate,
    Colour,
    Deadline,
    DecodeError,
    MediaInfo,
    Resize,
    Turn,
    decoding,
    new_array,
    too_short,
)
from opensora.datasets.decode.pyav_container import (
    Opened,
    StreamInfo,
    all_frames,
    decode_packet,
    packets,
    stream_info,
    video_stream,
)
from opensora.datasets.decode.pyav_index import frame_index, frame_rate, seek_positions
from opensora.datasets.decode.pyav_pixels import HDR_CURVES, UNTAGGED_MATRIX, StoredFrame, Window, is_hd, stored_frame
from opensora.datasets.table.clip_storage import Source

# Of these the codec alone says the rate; the demuxer makes times up for 25 frames a second, and that is their average.
_BARE_STREAMS = ("h264", "hevc", "vvc", "m4v", "vc1")
# Where a frame nobody refers to may be left undecoded from packet to packet; libdav1d reads the setting only once.
_SKIPS_UNUSED = ("h264", "hevc")


def probe(source: Source, deadline: Deadline) -> MediaInfo:
    """Reads the times of all packets and decodes the first frame; all frames of files without times.

    Raises:
        DecodeError: the file cannot be read.
    """
    with Opened(source) as container:
        stream = video_stream(source, container, threads=1)
        index = frame_index(source, container, stream, deadline)
        with decoding(source.path):
            bare = container.format.name in _BARE_STREAMS
            rate, base = (stream.guessed_rate, None) if bare else (stream.average_rate, stream.time_base)
    seen: list[StoredFrame] = []
    first = _read(source, range(1), None, 1, deadline, new_array, WHITE, seen.append)
    count = len(index.pts) if index.exact else sum(1 for _ in all_frames(source, threads=1, deadline=deadline))
    fps, note = frame_rate(index, rate, base)
    if seen and seen[0].curve in HDR_CURVES:
        pale = f"high dynamic range ({HDR_CURVES[seen[0].curve]}) is not tone-mapped; colours look pale"
        note = f"{note}; {pale}" if note else pale
    return MediaInfo(num_frames=count, height=first.shape[1], width=first.shape[2], fps=fps, note=note)


def read_window(
    source: Source,
    numbers: Sequence[int],
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
    with Opened(source) as container:
        stream = video_stream(source, container, threads=1)
        about = stream_info(source, stream)
        if about.stretch != 1 or about.decoder is not None:
            return False
        frame, before = _first_frame(source, container, stream, deadline)
    if frame is None:
        raise DecodeError(source.path, "no frame of it can be decoded")
    if before:
        return False
    stored = stored_frame(source, frame)
    guessed = stored.matrix in UNTAGGED_MATRIX and is_hd(stored)
    return stored.turn == Turn() and not stored.has_alpha and not guessed


def _first_frame(
    source: Source, container: InputContainer, stream: VideoStream, deadline: Deadline
) -> tuple[VideoFrame | None, bool]:
    """(the first frame that the decoder puts out, whether packets before it were to be shown earlier)."""
    times: list[int] = []
    for packet in packets(source, container, stream, deadline):
        with decoding(source.path):
            times += [] if packet.pts is None else [packet.pts]
        for frame in decode_packet(source, packet, None) or ():
            with decoding(source.path):
                return frame, frame.pts is not None and min(times, default=frame.pts) < frame.pts
    return None, False


def _read(
    source: Source,
    numbers: Sequence[int],
    resize: Resize | None,
    threads: int,
    deadline: Deadline,
    allocate: Allocate,
    background: Colour,
    look: Callable[[StoredFrame], object],
) -> np.ndarray:
    def window(about: StreamInfo, wanted: np.ndarray) -> Window:
        return Window(source, about, wanted, resize, allocate, background, look)

    with Opened(source) as container:
        stream = video_stream(source, container, threads)
        about = stream_info(source, stream)
        index = frame_index(source, container, stream, deadline)
        if not index.exact:
            return _read_by_counting(source, window(about, np.array(numbers)), numbers, threads, deadline)
        if numbers[-1] >= len(index.pts):
            raise too_short(source.path, len(index.pts), numbers)
        wanted = index.pts[np.array(numbers)]
        for position in seek_positions(index, about.codec, int(wanted[0])):
            with decoding(source.path):
                container.seek(position.seek_to, stream=stream, backward=True)
            filled = window(stream_info(source, stream), wanted)
            if _decode_into(filled, container, stream, deadline, not_after=position.dts):
                return filled.frames()
    # Seeking failed this demuxer or decoder: from the very start there is nothing left to go wrong but the data.
    with Opened(source) as container:
        stream = video_stream(source, container, threads)
        filled = window(stream_info(source, stream), wanted)
        if _decode_into(filled, container, stream, deadline, not_after=None):
            return filled.frames()
    count = f"{filled.missing()} of the {len(numbers)} frames from {numbers[0]} on"
    raise DecodeError(source.path, f"{count} cannot be decoded")


def _decode_into(
    window: Window, container: InputContainer, stream: VideoStream, deadline: Deadline, not_after: int | None
) -> bool:
    """Decode from where the container stands until the window is full; False when a frame does not come.

    Frames that are not wanted and that no other frame refers to are not decoded at all; this cannot change the others.
    """
    with decoding(window.source.path):
        context = stream.codec_context
        skips = context.name in _SKIPS_UNUSED
    for packet in packets(window.source, container, stream, deadline):
        with decoding(window.source.path):
            shown, decoded = packet.pts, packet.dts
            if skips:
                context.skip_frame = "DEFAULT" if shown is None or shown in window.slots else "NONREF"
        if not_after is not None and decoded is not None:
            if decoded > not_after:
                return False  # landed behind the keyframe
            not_after = None
        frames = decode_packet(window.source, packet, window.about.decoder)
        if frames is None:
            return False
        for frame in frames:
            with decoding(window.source.path):
                damaged, pts = frame.is_corrupt, frame.pts
            if damaged:
                return False  # what follows is predicted from it
            if pts in window.slots:
                window.put(window.slots[pts], frame)
        if window.missing() == 0:
            return True
    return False


def _read_by_counting(
    source: Source, window: Window, numbers: Sequence[int], threads: int, deadline: Deadline
) -> np.ndarray:
    """The slow way for streams whose packets do not say when they are shown."""
    seen = 0
    for seen, frame in enumerate(all_frames(source, threads, deadline), start=1):
        if seen - 1 in window.slots:
            window.put(window.slots[seen - 1], frame)
        if window.missing() == 0:
            return window.frames()
    raise too_short(source.path, seen, numbers)
