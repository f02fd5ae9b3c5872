"""Clips opened by PyAV: the container, its video stream, its packets, and the frames that packets become."""

import os
from collections.abc import Iterator
from fractions import Fraction
from typing import Any, NamedTuple

import av
from av.container import InputContainer
from av.stream import Disposition
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from opensora.datasets.decode.common import Deadline, DecodeError, check_size, decoding
from opensora.datasets.decode.file_type import CLIP_SUFFIXES, sniff_source
from opensora.datasets.table.clip_storage import Source

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
# FFmpeg's own decoders pass over the alpha that WebM stores beside the picture.
_ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
_MOST_STRETCH = 16  # of pixels, in width or height: beyond is a damaged header
_LEAST_STRETCH = Fraction(1, 200)  # off square: less is a rounded header, and not worth the loss of scaling


class StreamInfo(NamedTuple):
    """What the conversion of a stream's frames depends on."""

    codec: str
    stretch: Fraction  # width of a pixel over its height
    decoder: VideoCodecContext | None  # to be used in place of the stream's own


class Opened:
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
        with decoding(self._source.path):
            # Text in a damaged header need not be text.
            opened = av.open(self._url, format=demuxer, metadata_errors="replace", options=dict(_OPTIONS))
        self._container = opened
        return opened

    def __exit__(self, *_: object) -> None:
        with decoding(self._source.path):
            self._container.close()


def video_stream(source: Source, container: InputContainer, threads: int) -> VideoStream:
    """FFmpeg's own choice among several video streams (cover pictures lose, then the larger picture wins)."""
    with decoding(source.path):
        stream = container.streams.best("video")
    if not isinstance(stream, VideoStream):
        raise DecodeError(source.path, "no video stream")
    with decoding(source.path):
        context = stream.codec_context
        is_cover = bool(stream.disposition & Disposition.attached_pic)
    if is_cover:
        raise DecodeError(source.path, "no video stream, only a cover picture")
    if context is None:
        raise DecodeError(source.path, "no decoder for its video codec")
    with decoding(source.path):
        height, width = context.height, context.width
        context.thread_count = threads
        context.thread_type = "AUTO" if threads > 1 else "SLICE"
    if height and width:  # else only the frames say
        check_size(source.path, height, width)
    return stream


def stream_info(source: Source, stream: VideoStream) -> StreamInfo:
    """Anew after every seek: a decoder in place of the stream's own is not reset by it."""
    with decoding(source.path):
        codec, ratio = stream.codec_context.name, stream.sample_aspect_ratio
        beside = _ALPHA_DECODERS.get(codec) if stream.metadata.get("alpha_mode") == "1" else None
        decoder: Any = VideoCodecContext.create(beside, "r") if beside else None
    stretch = ratio if ratio is not None and ratio > 0 else Fraction(1)
    if not Fraction(1, _MOST_STRETCH) <= stretch <= _MOST_STRETCH:
        raise DecodeError(source.path, f"its pixels are {stretch} times as wide as high, so its header is damaged")
    return StreamInfo(codec, Fraction(1) if abs(stretch - 1) < _LEAST_STRETCH else stretch, decoder)


def packets(source: Source, container: InputContainer, stream: VideoStream, deadline: Deadline) -> Iterator[av.Packet]:
    """Every packet of the stream; asks before each whether there is time left."""
    with decoding(source.path):
        demuxed = container.demux(stream)
    while True:
        deadline.check()
        with decoding(source.path):
            packet = next(demuxed, None)
        if packet is None:
            return
        yield packet


def decode_packet(source: Source, packet: av.Packet, decoder: VideoCodecContext | None) -> list[VideoFrame] | None:
    """The frames that the decoder releases on this packet: none for most, several at the end.

    Args:
        decoder: to be used in place of the stream's own; for it an empty packet is the end.

    Returns:
        None: the packet is damaged, and others behind it may not be.
    """
    with decoding(source.path):
        try:
            frames = packet.decode() if decoder is None else decoder.decode(packet if packet.size else None)
            return [frame for frame in frames if isinstance(frame, VideoFrame)]
        except av.error.InvalidDataError:
            return None


def all_frames(source: Source, threads: int, deadline: Deadline) -> Iterator[VideoFrame]:
    """Every frame, in presentation order; a damaged packet releases none and decoding goes on, as players do."""
    with Opened(source) as container:
        stream = video_stream(source, container, threads)
        decoder = stream_info(source, stream).decoder
        for packet in packets(source, container, stream, deadline):
            yield from decode_packet(source, packet, decoder) or ()
