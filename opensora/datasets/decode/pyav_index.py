"""When the frames of a clip are shown, by the timestamps of its packets, which a demuxer reads without decoding."""

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from av.container import InputContainer
from av.video.stream import VideoStream

from opensora.datasets.decode.common import MAX_FPS, Deadline, DecodeError, decoding, rate_of
from opensora.datasets.decode.gif_blocks import pictures_in
from opensora.datasets.decode.pyav_container import all_frames, packets
from opensora.datasets.decode.truncated import gif_lacks_pixels
from opensora.datasets.table.clip_storage import Source

# Their "keyframe" flags do not promise that decoding can start there.
_DECODE_FROM_START = ("gif", "apng")
# Their packets carry no presentation times; what the demuxer makes up is wrong as soon as frames are reordered.
_WITHOUT_TIMES = ("avi", "h264", "hevc", "vvc", "m4v", "mpegvideo", "vc1")
_MOST_FRAMES = 2**24  # of a clip: six days at 30 per second


@dataclass(frozen=True, kw_only=True)
class FrameIndex:
    """Timestamps of a stream's frames, from its packets."""

    pts: np.ndarray  # (n,) int64, presentation order
    key_pts: np.ndarray  # (k,) int64, ascending
    key_dts: np.ndarray  # (k,) int64, of the same keyframes
    exact: bool  # False: packets without, or with repeated, timestamps; only counting decoded frames is right
    shown_s: tuple[float, ...] = ()  # of a GIF: what every picture says of the time that it is shown


def frame_index(source: Source, container: InputContainer, stream: VideoStream, deadline: Deadline) -> FrameIndex:
    """Read every packet's timestamps; leaves the container at its end."""
    pts: list[int] = []
    keys: list[tuple[int, int]] = []
    shown_s: list[float] = []
    with decoding(source.path):
        is_gif = container.format.name == "gif"
        exact = container.format.name not in _WITHOUT_TIMES
        hidden_by_vp8 = stream.codec_context.name in ("vp8", "libvpx")
    start = b""
    if is_gif:
        with source.open() as file, decoding(source.path):
            start = file.read(13)  # its size and flags
    for packet in packets(source, container, stream, deadline):
        with decoding(source.path):
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
    for frame in all_frames(source, threads=1, deadline=deadline):
        with decoding(source.path):
            damaged, at = frame.is_corrupt, frame.pts
        if at is None or at >= first_key:
            break
        if not damaged:
            found.add(at)
    return found


@dataclass(frozen=True, kw_only=True)
class SeekPosition:
    """Where decoding may begin."""

    seek_to: int
    dts: int  # decoding has to start at this packet or before it


def seek_positions(index: FrameIndex, codec: str, first_pts: int) -> Iterator[SeekPosition]:
    """Where to try, best first. Some demuxers look their target up among pts, others among dts."""
    if codec in _DECODE_FROM_START:
        return
    before = int(np.searchsorted(index.key_pts, first_pts, side="right")) - 1
    if before <= 0:
        return
    dts = int(index.key_dts[before])
    for seek_to in dict.fromkeys((int(index.key_pts[before]), dts)):
        yield SeekPosition(seek_to=seek_to, dts=dts)


def frame_rate(index: FrameIndex, declared: Fraction | None, base: Fraction | None) -> tuple[float, str]:
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
