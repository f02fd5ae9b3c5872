"""Files that readers choke on, made by code: name -> bytes, and what must become of each in the data pipeline."""

import io
import random
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

import av
import numpy as np
from PIL import Image

from tests.faults.media_fuzz import animation, fragmented, m2ts, mp4, pictures, still, turned_mp4, video

ROWS = "rows"  # it can be measured


class Odd(NamedTuple):
    """A file, and the kinds of error of which one must be told; none: it has rows; ROWS among them: either."""

    content: Callable[[], bytes]
    kinds: tuple[str, ...] = ()


def encoded(
    size: tuple[int, int] = (48, 64),
    times: list[int] | None = None,
    pixels: str = "yuv420p",
    count: int = 12,
    **options: str,
) -> bytes:
    """An H.264 file of frames shown at these 25ths of a second."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as out:
        stream: Any = out.add_stream("libx264", rate=25, options={"bf": "0", **options})
        stream.height, stream.width, stream.pix_fmt = *size, pixels
        for number in range(count):
            picture = np.full((*size, 3), 20 * number, np.uint8)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(*size[::-1], pixels)
            frame.pts = number if times is None else times[number]
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return buffer.getvalue()


def audio_only(container: str = "mp4") -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as out:
        add_audio(out)
    return buffer.getvalue()


def add_audio(out: Any, seconds: int = 1) -> None:
    stream = out.add_stream("aac", rate=16000, layout="mono")
    for _ in range(seconds * 16):
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        out.mux(stream.encode(frame))
    out.mux(stream.encode())


def cover_only() -> bytes:
    """A song with a picture on it."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as out:
        cover: Any = out.add_stream("mjpeg", rate=1)
        cover.height, cover.width, cover.pix_fmt = 48, 64, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        add_audio(out)
        picture = av.VideoFrame.from_ndarray(pictures()[0], format="rgb24").reformat(64, 48, "yuvj420p")
        out.mux(cover.encode(picture))
        out.mux(cover.encode())
    return buffer.getvalue()


def many_streams() -> bytes:
    """Five video streams of several sizes, and sound."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as out:
        streams: list[Any] = []
        for number in range(5):
            stream: Any = out.add_stream("mpeg4", rate=25)
            stream.height, stream.width, stream.pix_fmt = 16 * (number + 1), 32 * (5 - number), "yuv420p"
            streams.append(stream)
        add_audio(out)
        for picture in pictures():
            for stream in streams:
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                out.mux(stream.encode(frame.reformat(stream.width, stream.height, "yuv420p")))
        for stream in streams:
            out.mux(stream.encode())
    return buffer.getvalue()


def no_frames() -> bytes:
    """A header of a video with nothing in it."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as out:
        stream: Any = out.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        out.start_encoding()
    return buffer.getvalue()


def huge_header() -> bytes:
    """An uncompressed video whose header asks for 60000 x 60000 pixels."""
    return b"YUV4MPEG2 W60000 H60000 F25:1 Ip A1:1 C420jpeg\nFRAME\n" + bytes(4000)


def lying_mp4() -> bytes:
    """The size in the sample description is another one than in the stream."""
    content = bytearray(mp4())
    at = content.index(b"avc1") + 4 + 24
    content[at : at + 4] = struct.pack(">HH", 60000, 60000)
    return bytes(content)


def size_changes() -> bytes:
    """Raw H.264 streams of several sizes behind each other."""
    return b"".join(video("libx264", "yuv420p", "h264", size=size) for size in ((48, 64), (64, 48), (96, 96)))


def text() -> bytes:
    return b"This is a letter, and no film at all.\n" * 50


def avi() -> bytes:
    return video("mpeg4", "yuv420p", "avi")


def webm() -> bytes:
    return video("libvpx", "yuv420p", "webm")


def cut(content: Callable[[], bytes], seed: int) -> Callable[[], bytes]:
    def make() -> bytes:
        whole = content()
        return whole[: random.Random(seed).randrange(1, len(whole))]

    return make


def scrambled(content: Callable[[], bytes], seed: int, share: float = 0.02) -> Callable[[], bytes]:
    def make() -> bytes:
        draw, whole = random.Random(seed), bytearray(content())
        for _ in range(int(len(whole) * share)):
            whole[draw.randrange(len(whole))] = draw.randrange(256)
        return bytes(whole)

    return make


def single(form: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pictures()[0]).save(buffer, form)
    return buffer.getvalue()


BROKEN = ("unreadable", "no video", ROWS)  # by where it was cut
ODD: dict[str, Odd] = {
    "empty.mp4": Odd(lambda: b"", ("no video",)),
    "one byte.mp4": Odd(lambda: b"\0", ("no video", "unreadable")),
    "zeros.mp4": Odd(lambda: bytes(10_000), ("no video", "unreadable")),
    "noise.mp4": Odd(lambda: random.Random(1).randbytes(20_000), ("no video", "unreadable")),
    "letter.mp4": Odd(text, ("no video", "unreadable")),
    "page.mkv": Odd(lambda: b"<!DOCTYPE html><html><body>404</body></html>", ("no video", "unreadable")),
    "zip.mp4": Odd(lambda: b"PK\x03\x04" + bytes(400), ("no video",)),
    "lfs.mp4": Odd(lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", ("no video",)),
    "no frames.mkv": Odd(no_frames, ("unreadable",)),
    "header only.mp4": Odd(lambda: mp4()[:40], ("unreadable",)),
    "sound.mp4": Odd(audio_only, ("unreadable", "no video")),
    "sound.mkv": Odd(lambda: audio_only("matroska"), ("unreadable", "no video")),
    "cover.mp4": Odd(cover_only, ("unreadable",)),
    "still.mp4": Odd(lambda: still("PNG"), ("still",)),
    "photo.jpg": Odd(lambda: still("JPEG"), ("still",)),
    "one frame.mkv": Odd(lambda: encoded(count=1)),
    "two frames.mkv": Odd(lambda: encoded(count=2)),
    "huge header.y4m": Odd(huge_header, ("unreadable", "too large")),
    "lying header.mp4": Odd(lying_mp4, ("unreadable", "too large", ROWS)),
    "uneven.mkv": Odd(lambda: encoded(times=[0, 1, 2, 30, 31, 33, 60, 100, 101, 102, 200, 300])),
    "late.mkv": Odd(lambda: encoded(times=[90_000 + i for i in range(12)])),
    "backwards.mkv": Odd(lambda: swapped_clusters(), BROKEN),
    "odd size.mkv": Odd(lambda: encoded((51, 77), pixels="yuv444p")),
    "1x1.mkv": Odd(lambda: video("ffv1", "bgra", "matroska", size=(1, 1))),
    "2x2.mkv": Odd(lambda: encoded((2, 2))),
    "3000x2.mkv": Odd(lambda: encoded((2, 3000))),
    "turned.mp4": Odd(turned_mp4),
    "clear.webm": Odd(lambda: video("libvpx-vp9", "yuva420p", "webm")),
    "clear.mov": Odd(lambda: video("prores_ks", "yuva444p10le", "mov")),
    "moving.gif": Odd(lambda: animation("GIF", disposal=2)),
    "one picture.gif": Odd(lambda: single("GIF"), ("moving picture", ROWS)),
    "moving.png": Odd(lambda: animation("PNG"), ("moving picture",)),
    "moving.webp": Odd(lambda: animation("WEBP"), ("moving picture",)),
    "moving.avif": Odd(lambda: animation("AVIF"), ("moving picture",)),
    "10 bits.mkv": Odd(lambda: encoded(pixels="yuv420p10le")),
    "grey.mkv": Odd(lambda: video("ffv1", "gray", "matroska")),
    "12 bits.mkv": Odd(lambda: video("ffv1", "yuv444p12le", "matroska")),
    "interlaced.mkv": Odd(lambda: encoded(**{"x264-params": "interlaced=1"})),
    "many streams.mkv": Odd(many_streams),
    "joined.mp4": Odd(lambda: mp4() + mp4()),
    "joined.ts": Odd(lambda: video("libx264", "yuv420p", "mpegts") * 2),
    "sizes.h264": Odd(size_changes),
    "fragmented.mp4": Odd(fragmented),
    "camera.m2ts": Odd(m2ts),
    "wrong name.avi": Odd(lambda: video("libvpx", "yuv420p", "webm")),
    "no suffix": Odd(mp4),
    "UPPER.MP4": Odd(mp4),
    **{f"cut {seed}.mp4": Odd(cut(mp4, seed), BROKEN) for seed in range(4)},
    **{f"cut {seed}.mkv": Odd(cut(encoded, seed), BROKEN) for seed in range(4)},
    **{f"cut {seed}.ts": Odd(cut(lambda: video("libx264", "yuv420p", "mpegts"), seed), BROKEN) for seed in range(2)},
    **{f"scrambled {seed}.mp4": Odd(scrambled(mp4, seed), BROKEN) for seed in range(4)},
    **{
        f"scrambled {seed}.avi": Odd(scrambled(lambda: video("mpeg4", "yuv420p", "avi"), seed), BROKEN)
        for seed in range(3)
    },
    **{
        f"scrambled {seed}.webm": Odd(scrambled(lambda: video("libvpx", "yuv420p", "webm"), seed), BROKEN)
        for seed in range(3)
    },
}


def swapped_clusters() -> bytes:
    """A transport stream whose second half comes first, so that time goes back."""
    content = video("libx264", "yuv420p", "mpegts")
    middle = len(content) // 2 // 188 * 188
    return content[middle:] + content[:middle] + content
