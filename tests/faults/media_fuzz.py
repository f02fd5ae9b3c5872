"""Files of every kind made by code, seeded damage to them, and a process that reads one after another."""

import io
import os
import struct
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable
from fractions import Fraction
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
from PIL import Image

from opensora.datasets.decode.api import DecodeError, probe, read_frames, sniff
from opensora.datasets.decode.common import ResizeToFill

HEIGHT, WIDTH, FRAMES = 48, 64, 12
LIMIT_S = 5.0  # given to the readers
PATIENCE_S = 30.0  # after which a file counts as a hang, on a machine with other work

Pictures = list[np.ndarray]


class Case(NamedTuple):
    """One damaged file, and how it is asked for."""

    kind: str
    number: int
    seed: int


class Outcome(NamedTuple):
    """``escape`` is empty where the contract held."""

    frames: bool
    seconds: float
    escape: str


def pictures(channels: int = 3) -> Pictures:
    texture = np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, channels), np.uint8)
    return [np.roll(texture, 3 * i, axis=1) for i in range(FRAMES)]


def video(codec: str, pixels: str, container: str, size: tuple[int, int] = (HEIGHT, WIDTH), **options: str) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as out:
        stream: Any = out.add_stream(codec, rate=25, options=options)
        stream.height, stream.width = size
        stream.pix_fmt = pixels
        stream.codec_context.gop_size = 4
        for picture in pictures(4 if "a" in pixels.removeprefix("gray") else 3):
            form = "rgba" if picture.shape[2] == 4 else "rgb24"
            frame = av.VideoFrame.from_ndarray(picture, format=form)
            out.mux(stream.encode(frame.reformat(size[1], size[0], pixels)))
        out.mux(stream.encode())
    return buffer.getvalue()


def mp4(codec: str = "libx264", **options: str) -> bytes:
    return video(codec, "yuv420p", "mp4", **options)


def turned_mp4() -> bytes:
    """With a display matrix and pixels that are not square."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as out:
        stream: Any = out.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(4, 3)
        stream.set_display_rotation(90, hflip=True)
        for picture in pictures():
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        out.mux(stream.encode())
    return buffer.getvalue()


def still(form: str, mode: str = "RGB", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pictures()[0]).convert(mode).save(buffer, form, **options)
    return buffer.getvalue()


def numbers(form: str, kind: Any, most: float, **options: Any) -> bytes:
    buffer = io.BytesIO()
    grey = (pictures()[0][..., 0] / 255 * most).astype(kind)
    Image.fromarray(grey).save(buffer, form, **options)
    return buffer.getvalue()


def animation(form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    images = [Image.fromarray(picture) for picture in pictures(4)[:6]]
    images[0].save(buffer, form, save_all=True, append_images=images[1:], duration=100, **options)
    return buffer.getvalue()


def exif() -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112], tags[0x010F], tags[0x0132], tags[0x011A] = 6, "maker", "2024:01:01 00:00:00", 72.0
    tags.get_ifd(0x8769)[0x9000] = b"0230"
    tags.get_ifd(0x8825)[1] = "N"
    return tags


def tar(form: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
        for name in ("b" * 60 + "/" + "b" * 60 + ".png", MEMBER):
            data = still("PNG") if name.endswith("png") else mp4()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def zipped(compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in ((MEMBER, mp4()), ("p.png", still("PNG"))):
            info = zipfile.ZipInfo(name)
            info.compress_type = compression
            with archive.open(info, "w", force_zip64=True) as file:
                file.write(data)
    return buffer.getvalue()


MEMBER = "a.mp4"
# kind -> (suffix, what makes its bytes)
BASES: dict[str, tuple[str, Callable[[], bytes]]] = {
    "mp4 h264": (".mp4", mp4),
    "mp4 h265": (".mp4", lambda: mp4("libx265", **{"x265-params": "log-level=none"})),
    "mp4 turned, not square": (".mp4", turned_mp4),
    "fragmented mp4": (".mp4", lambda: fragmented()),
    "mkv h264": (".mkv", lambda: video("libx264", "yuv420p", "matroska")),
    "mkv ffv1": (".mkv", lambda: video("ffv1", "yuv420p", "matroska")),
    "webm vp9": (".webm", lambda: video("libvpx-vp9", "yuv420p", "webm")),
    "webm vp9 alpha": (".webm", lambda: video("libvpx-vp9", "yuva420p", "webm")),
    "webm vp8": (".webm", lambda: video("libvpx", "yuv420p", "webm")),
    "avi mpeg4": (".avi", lambda: video("mpeg4", "yuv420p", "avi")),
    "avi mjpeg": (".avi", lambda: video("mjpeg", "yuvj420p", "avi")),
    "mov prores alpha": (".mov", lambda: video("prores_ks", "yuva444p10le", "mov")),
    "mov animation": (".mov", lambda: video("qtrle", "argb", "mov")),
    "gif": (".gif", lambda: animation("GIF", disposal=2)),
    "mpeg-ts": (".ts", lambda: video("libx264", "yuv420p", "mpegts")),
    "m2ts": (".m2ts", lambda: m2ts()),
    "mpeg-ps": (".mpg", lambda: video("mpeg2video", "yuv420p", "vob")),
    "flv": (".flv", lambda: video("flv", "yuv420p", "flv")),
    "wmv": (".wmv", lambda: video("wmv2", "yuv420p", "asf")),
    "3gp h263": (".3gp", lambda: video("h263", "yuv420p", "3gp", (144, 176))),
    "ogg vp8": (".ogv", lambda: video("libvpx", "yuv420p", "ogg")),
    "ivf": (".ivf", lambda: video("libvpx-vp9", "yuv420p", "ivf")),
    "nut": (".nut", lambda: video("ffv1", "bgra", "nut")),
    "mxf": (".mxf", lambda: video("mpeg2video", "yuv420p", "mxf")),
    "raw h264": (".h264", lambda: video("libx264", "yuv420p", "h264")),
    "y4m": (".y4m", lambda: video("wrapped_avframe", "yuv420p", "yuv4mpegpipe")),
    "png": (".png", lambda: still("PNG")),
    "png 16 bits": (".png", lambda: numbers("PNG", np.uint16, 65535)),
    "png palette": (".png", lambda: still("PNG", "P", transparency=3)),
    "png with exif": (".png", lambda: still("PNG", exif=exif(), icc_profile=b"junk" * 20)),
    "apng": (".png", lambda: animation("PNG")),
    "jpg": (".jpg", lambda: still("JPEG")),
    "jpg with exif": (".jpg", lambda: still("JPEG", exif=exif(), icc_profile=b"junk" * 20)),
    "jpg progressive cmyk": (".jpg", lambda: still("JPEG", "CMYK", progressive=True)),
    "webp": (".webp", lambda: still("WEBP", exif=exif())),
    "webp animated": (".webp", lambda: animation("WEBP")),
    "avif": (".avif", lambda: still("AVIF", exif=exif())),
    "avif animated": (".avif", lambda: animation("AVIF")),
    "tiff": (".tiff", lambda: still("TIFF", compression="tiff_lzw", exif=exif())),
    "tiff jpeg": (".tiff", lambda: still("TIFF", compression="jpeg")),
    "tiff float": (".tiff", lambda: numbers("TIFF", np.float32, 1.0)),
    "tiff 16 bits": (".tif", lambda: numbers("TIFF", np.uint16, 65535, compression="tiff_deflate")),
    "tiff lab": (".tif", lambda: still("TIFF", "YCbCr")),
    "heic": (".heic", lambda: heic()),
    "bmp": (".bmp", lambda: still("BMP")),
    "jpeg 2000": (".jp2", lambda: still("JPEG2000")),
    "ppm": (".ppm", lambda: still("PPM")),
    "tga": (".tga", lambda: still("TGA", compression="tga_rle")),
    "qoi": (".qoi", lambda: still("QOI")),
    "pcx": (".pcx", lambda: still("PCX")),
    "sgi": (".sgi", lambda: still("SGI")),
    "ico": (".ico", lambda: still("ICO")),
    "tar": (".tar", lambda: tar(tarfile.USTAR_FORMAT)),
    "tar gnu": (".tar", lambda: tar(tarfile.GNU_FORMAT)),
    "tar pax": (".tar", lambda: tar(tarfile.PAX_FORMAT)),
    "zip": (".zip", zipped),
    "zip deflated": (".zip", lambda: zipped(zipfile.ZIP_DEFLATED)),
    "range": (".bin", mp4),
}
_PATHS = (
    "0", "1", "-1", "999999999999999999", "9" * 5000, "٣", "1e3", "0x10", " 4", "\0", "#", "@", "+", "/", "\ud800",
)  # fmt: skip


def fragmented() -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4", options={"movflags": "frag_keyframe+empty_moov"}) as out:
        stream: Any = out.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        stream.codec_context.gop_size = 4
        for picture in pictures():
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        out.mux(stream.encode())
    return buffer.getvalue()


def m2ts() -> bytes:
    """A transport stream with four bytes of time before each packet."""
    plain = video("libx264", "yuv420p", "mpegts")
    return b"".join(b"\0\0\0\0" + plain[i : i + 188] for i in range(0, len(plain), 188))


def box(name: bytes, *parts: bytes, version: int | None = None) -> bytes:
    body = (b"" if version is None else struct.pack(">I", version << 24)) + b"".join(parts)
    return struct.pack(">I", 8 + len(body)) + name + body


def heic(picture: np.ndarray | None = None, turns: int = 0, kind: bytes = b"hvc1") -> bytes:
    """A picture of one H.265 frame, turned by quarters counter-clockwise; ``kind`` is the type of its item."""
    picture = pictures()[0] if picture is None else picture
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as out:
        stream: Any = out.add_stream("libx265", rate=1, options={"x265-params": "log-level=none:crf=1:keyint=1"})
        stream.height, stream.width = picture.shape[:2]
        stream.pix_fmt = "yuv420p"
        out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        out.mux(stream.encode())
    movie = buffer.getvalue()
    at = movie.index(b"hvcC") - 4
    settings = movie[at : at + int.from_bytes(movie[at : at + 4], "big")]
    with av.open(io.BytesIO(movie)) as opened:
        frame = bytes(next(packet for packet in opened.demux(video=0) if packet.size))
    size = box(b"ispe", struct.pack(">II", picture.shape[1], picture.shape[0]), version=0)
    properties = box(b"ipco", settings, size, box(b"irot", bytes([turns])))
    applied = box(b"ipma", struct.pack(">IHB", 1, 1, 3), b"\x81\x02\x83", version=0)
    item = box(b"infe", struct.pack(">HH", 1, 0), kind, b"\0", version=2)
    described = (
        box(b"hdlr", bytes(4), b"pict", bytes(13), version=0)
        + box(b"pitm", b"\0\1", version=0)
        + box(b"iinf", b"\0\1", item, version=0)
        + box(b"iprp", properties, applied)
    )
    head = box(b"ftyp", b"heic", bytes(4), b"mif1heic")
    place = len(head) + 12 + len(described) + 30 + 8  # of the frame, behind the boxes meta and iloc
    where = struct.pack(">BBHHHHII", 0x44, 0, 1, 1, 0, 1, place, len(frame))
    return head + box(b"meta", described, box(b"iloc", where, version=0), version=0) + box(b"mdat", frame)


def write_bases(folder: Path) -> None:
    for kind, (suffix, make) in BASES.items():
        (folder / f"{kind}{suffix}").write_bytes(make())


def damaged(data: bytes, other: bytes, rng: np.random.Generator) -> bytes:
    """One to three changes: bits, bytes, lengths, blocks, pieces of another file."""
    raw = bytearray(data)
    for _ in range(int(rng.integers(1, 4))):
        if len(raw) < 16:
            break
        _CHANGES[int(rng.integers(len(_CHANGES)))](raw, other, rng)
    return bytes(raw)


def _place(raw: bytearray, rng: np.random.Generator) -> int:
    """Half of them in the first or last 600 bytes, where headers are."""
    where = rng.random()
    if where < 0.35:
        return int(rng.integers(min(len(raw), 600)))
    if where < 0.5:
        return len(raw) - 1 - int(rng.integers(min(len(raw), 600)))
    return int(rng.integers(len(raw)))


def _flip_bits(raw: bytearray, other: bytes, rng: np.random.Generator) -> None:
    for _ in range(int(rng.integers(1, 9))):
        raw[_place(raw, rng)] ^= 1 << int(rng.integers(8))


def _set_bytes(raw: bytearray, other: bytes, rng: np.random.Generator) -> None:
    for _ in range(int(rng.integers(1, 5))):
        raw[_place(raw, rng)] = int(rng.choice([0, 1, 0x7F, 0x80, 0xFE, 0xFF, int(rng.integers(256))]))


def _set_length(raw: bytearray, other: bytes, rng: np.random.Generator) -> None:
    """A number of two, four or eight bytes, which may be a length, becomes an extreme."""
    size = int(rng.choice([2, 4, 8]))
    at = _place(raw, rng)
    most = 256**size - 1
    value = int(rng.choice(np.array([0, 1, 2, most, most // 2, most // 2 + 1, len(raw), most - 7], dtype=object)))
    raw[at : at + size] = (value & most).to_bytes(size, "big" if rng.random() < 0.5 else "little")


def _cut(raw: bytearray, other: bytes, rng: np.random.Generator) -> None:
    del raw[_place(raw, rng) :]


def _zero(raw: bytearray, other: bytes, rng: np.random.Generator) -> None:
    at, size = _place(raw, rng), int(rng.integers(1, 512))
    raw[at : at + size] = bytes(len(raw[at : at + size]))


def _noise(raw: bytearray, other: bytes, rng: np.random.Generator) -> None:
    at, size = _place(raw, rng), int(rng.integers(1, 256))
    raw[at : at + size] = rng.bytes(len(raw[at : at + size]))


def _remove(raw: bytearray, other: bytes, rng: np.random.Generator) -> None:
    at = _place(raw, rng)
    del raw[at : at + int(rng.integers(1, 512))]


def _repeat(raw: bytearray, other: bytes, rng: np.random.Generator) -> None:
    at, size = _place(raw, rng), int(rng.integers(1, 512))
    raw[at:at] = raw[at : at + size]


def _splice(raw: bytearray, other: bytes, rng: np.random.Generator) -> None:
    at, start = _place(raw, rng), int(rng.integers(max(1, len(other))))
    piece = other[start : start + int(rng.integers(1, 2048))]
    raw[at : at + (len(piece) if rng.random() < 0.5 else 0)] = piece


_CHANGES = (
    _flip_bits, _flip_bits, _set_bytes, _set_length, _set_length, _cut, _zero, _noise, _remove, _repeat, _splice,
)  # fmt: skip


def path_of(case: Case, folder: Path, scratch: Path) -> str:
    """Write the damaged file and say how it is asked for."""
    rng = np.random.default_rng([case.seed, case.number, *case.kind.encode()])
    suffix, _ = BASES[case.kind]
    names = list(BASES)
    other = names[int(rng.integers(len(names)))]
    data = (folder / f"{case.kind}{suffix}").read_bytes()
    target = scratch / f"case{suffix}"
    if case.kind == "range":
        target.write_bytes(data)
        return _odd_range(str(target), len(data), rng)
    target.write_bytes(damaged(data, (folder / f"{other}{BASES[other][0]}").read_bytes(), rng))
    return f"{target}#{MEMBER}" if suffix in (".tar", ".zip") else str(target)


def _odd_range(file: str, size: int, rng: np.random.Generator) -> str:
    offset, length = (str(int(rng.integers(0, size))) for _ in range(2))
    if rng.random() < 0.3:
        return f"{file}#a.mp4@{offset}+{length}"
    parts = ["#", "a.mp4", "@", offset, "+", length]
    for _ in range(int(rng.integers(1, 4))):
        at = int(rng.integers(len(parts)))
        parts[at] = str(rng.choice(np.array(_PATHS, dtype=object))) if rng.random() < 0.8 else ""
    return file + "".join(parts)


def attempt(path: str) -> Outcome:
    """Ask for everything; the contract is frames, or a ``DecodeError`` of one line, in time."""
    began = time.monotonic()
    read, escape = False, ""
    for name, ask in _QUESTIONS.items():
        try:
            read |= ask(path)
        except DecodeError as error:
            line = str(error).replace(path, "")
            if "\n" in line or not error.cause.strip() or len(error.cause) > 300 + len(path) or error.path != path:
                escape = escape or f"{name}: no good line: {line[:300]!r}"
        except Exception as error:
            escape = escape or f"{name}: {type(error).__name__}: {error}"
    return Outcome(read, time.monotonic() - began, escape)


def _ask_probe(path: str) -> bool:
    info = probe(path, timeout_s=LIMIT_S)
    if not (info.num_frames >= 1 and info.height >= 1 and info.width >= 1 and (info.fps is None or 0 < info.fps < 1e5)):
        raise ValueError(f"{info} is no clip")
    return True


def _ask_frames(path: str) -> bool:
    start = len(path) * 7 % 5
    frames = read_frames(path, start, 2, timeout_s=LIMIT_S, resize=ResizeToFill(24, 24))
    if frames.dtype != np.uint8 or frames.shape[0] != 2 or min(frames.shape[1:3]) != 24:
        raise ValueError(f"{frames.shape} {frames.dtype} are no frames")
    return True


def _ask_first(path: str) -> bool:
    frames = read_frames(path, 0, 1, timeout_s=LIMIT_S)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3:
        raise ValueError(f"{frames.shape} {frames.dtype} are no frames")
    return True


def _ask_kind(path: str) -> bool:
    sniff(path)
    return False


_QUESTIONS: dict[str, Callable[[str], bool]] = {
    "sniff": _ask_kind,
    "probe": _ask_probe,
    "first frame": _ask_first,
    "frames": _ask_frames,
}


def work(connection: Connection, folder: Path, scratch: Path) -> None:
    """A process that reads cases until it is told None. What libraries print goes to ``scratch``/output."""
    output = os.open(scratch / "output", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    while True:
        try:
            case = connection.recv()
        except EOFError:
            return
        if case is None:
            return
        connection.send(attempt(path_of(case, folder, scratch)))
        sys.stdout.flush()
