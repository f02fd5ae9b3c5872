"""What a file is, by its first bytes: a still, a clip, or neither and why.

Names lie: a JPEG called ``a.png``, a WebM called ``a.mp4``, a web page called ``a.jpg``. So the content decides, and
the suffix only where the content says nothing. No parser of a library is called here, and at most a few KiB are read,
so that any file of a folder may be asked about.
"""

import re
import struct
from dataclasses import dataclass
from typing import BinaryIO, Literal

from opensora.datasets.decode.common import DecodeError
from opensora.datasets.table.clip_storage import Source, locate

STILL_SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".webp", ".bmp", ".dib", ".tif", ".tiff", ".avif", ".heic",
    ".heif", ".jp2", ".j2k", ".jpx", ".ppm", ".pgm", ".pbm", ".pnm", ".pam", ".tga", ".qoi", ".pcx", ".sgi", ".psd",
    ".ico",
)  # fmt: skip
CLIP_SUFFIXES = (
    ".mp4", ".mkv", ".mov", ".webm", ".avi", ".m4v", ".mpg", ".mpeg", ".ts", ".wmv", ".flv", ".gif", ".apng", ".avifs",
    ".3gp", ".3g2", ".m2ts", ".mts", ".m2t", ".m2v", ".m1v", ".mpv", ".mpe", ".vob", ".ogv", ".ogm", ".ogg", ".asf",
    ".f4v", ".qt", ".divx", ".dv", ".rm", ".rmvb", ".mxf", ".nut", ".ivf", ".y4m", ".h264", ".264", ".hevc", ".h265",
    ".265", ".av1", ".obu", ".mjpeg", ".mjpg", ".wtv", ".amv",
)  # fmt: skip
# Camera raw files look like TIFF or MP4, and what Pillow finds in them is a small preview.
_RAW_SUFFIXES = (".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf", ".pef", ".srw")

_HEAD = 4096  # bytes looked at
_GIF_TIMES = b"\x21\xf9\x04"  # a graphic control extension, which says how long a frame is shown
_MOST_CHUNKS = 256  # of a PNG before its pixels

Kind = Literal["still", "clip", "neither"]


@dataclass(frozen=True)
class Sniffed:
    """What a file is. ``what`` names the format, or for ``neither`` the reason, in words for a list of files."""

    kind: Kind
    what: str


# (offset, bytes there, what it is). None is of printable characters alone where a text could begin with them.
_STILLS = (
    (0, b"\xff\xd8\xff", "JPEG"),
    (0, b"II*\0", "TIFF"),
    (0, b"MM\0*", "TIFF"),
    (0, b"II+\0", "TIFF"),
    (0, b"MM\0+", "TIFF"),
    (0, b"\0\0\0\x0cjP  \r\n", "JPEG 2000"),
    (0, b"\xff\x4f\xff\x51", "JPEG 2000"),
    (0, b"qoif", "QOI"),
    (0, b"8BPS\0\1", "PSD"),
    (0, b"\x01\xda", "SGI"),
    (0, b"\0\0\x01\0", "ICO"),
)
_CLIPS = (
    (0, b"GIF87a", "GIF"),
    (0, b"GIF89a", "GIF"),
    (0, b"\x1a\x45\xdf\xa3", "Matroska or WebM"),
    (0, b"FLV\1", "FLV"),
    (0, b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "ASF"),
    (0, b"\0\0\x01\xba", "MPEG program stream"),
    (0, b"\0\0\x01\xb3", "MPEG video"),
    (0, b"\0\0\x01\xb0", "MPEG-4 video"),
    (0, b"\0\0\0\x01\x67", "H.264"),
    (0, b"\0\0\0\x01\x09\x10", "H.264"),
    (0, b"\0\0\0\x01\x40\x01", "H.265"),
    (0, b"\0\0\x01\x67", "H.264"),
    (0, b"\x1f\x07\0", "DV"),
    (0, b".RMF", "RealMedia"),
    (0, b"\x06\x0e\x2b\x34\x02\x05\x01\x01", "MXF"),
    (0, b"nut/multimedia container", "NUT"),
    (0, b"DKIF\0\0", "IVF"),
    (0, b"YUV4MPEG2", "YUV4MPEG"),
    (0, b"\xb7\xd8\x00\x20\x37\x49\xda\x11", "WTV"),
)
_NEITHER = (
    (0, b"version https://git-lfs", "a Git LFS pointer, not the file itself; run git lfs pull"),
    (0, b"\0\x05\x16\x07", "a companion file of macOS (AppleDouble)"),
    (0, b"%PDF", "a PDF document"),
    (0, b"%!PS", "PostScript"),
    (0, b"PK\x03\x04", "a zip archive; its members are named FILE.zip#MEMBER"),
    (257, b"ustar", "a tar archive; its members are named FILE.tar#MEMBER"),
    (0, b"\x1f\x8b", "a gzip archive"),
    (0, b"BZh", "a bzip2 archive"),
    (0, b"\xfd7zXZ", "an xz archive"),
    (0, b"\x28\xb5\x2f\xfd", "a zstd archive"),
    (0, b"7z\xbc\xaf", "a 7z archive"),
    (0, b"Rar!", "a rar archive"),
    (0, b"\x7fELF", "a program"),
    *((0, b"ID3%c" % version, "audio (MP3)") for version in (2, 3, 4)),
    (0, b"fLaC", "audio (FLAC)"),
    (0, b"\x76\x2f\x31\x01", "OpenEXR, linear light of no set brightness; save it as PNG"),
    (0, b"#?RADIANCE", "Radiance HDR, linear light of no set brightness; save it as PNG"),
    (0, b"\xff\x0a", "JPEG XL, which is not read here; save it as PNG or JPEG"),
    (0, b"\0\0\0\x0cJXL ", "JPEG XL, which is not read here; save it as PNG or JPEG"),
    (0, b"SDPX", "DPX, which is not read here; save it as PNG"),
    (0, b"XPDS", "DPX, which is not read here; save it as PNG"),
    (128, b"DICM", "a DICOM file, which is not read here; save it as PNG"),
    (0, b"PAR1", "a parquet table"),
    (0, b"\x93NUMPY", "a numpy array"),
    (0, b"\x89HDF", "an HDF5 file"),
    (0, b"SQLite format 3", "a database"),
)
_SIGNATURES: tuple[tuple[int, bytes, Sniffed], ...] = (
    *((offset, magic, Sniffed("still", what)) for offset, magic, what in _STILLS),
    *((offset, magic, Sniffed("clip", what)) for offset, magic, what in _CLIPS),
    *((offset, magic, Sniffed("neither", what)) for offset, magic, what in _NEITHER),
)
_BMP_HEADERS = (12, 16, 40, 52, 56, 64, 108, 124)  # sizes
_PNM = (b"P1", b"P2", b"P3", b"P4", b"P5", b"P6")
_NOT_READ_PNM = {b"P7": "PAM", b"PF": "PFM", b"Pf": "PFM"}
_PNM_SUFFIXES = (".ppm", ".pgm", ".pbm", ".pnm", ".pam")
# Boxes that an MP4 or QuickTime file may begin with.
_FIRST_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot", b"styp", b"moof", b"sidx")
_AVIF = Sniffed("still", "AVIF")
_HEIC = Sniffed("still", "HEIC")
_TILED_HEIC = Sniffed("neither", "HEIC of tiles, which are not put together here; save it as PNG or JPEG")
# An item that is put together of others, in the list of items of a HEIC; cameras of phones write these.
_TILES = re.compile(rb"infe(?:\x02.{7}|\x03.{9})(?:grid|iovl)", re.DOTALL)
_MOST_ITEMS = 1 << 16  # bytes
_BRANDS = {
    b"avif": _AVIF,
    b"avis": Sniffed("clip", "animated AVIF"),
    **dict.fromkeys((b"heic", b"heix", b"heim", b"heis", b"mif1"), _HEIC),
    **dict.fromkeys((b"M4A ", b"M4B ", b"M4P "), Sniffed("neither", "audio (M4A)")),
    b"crx ": Sniffed("neither", "camera raw, which is not read here; save it as PNG or JPEG"),
}
_RIFF = {
    b"AVI ": Sniffed("clip", "AVI"),
    b"AMV ": Sniffed("clip", "AMV"),
    b"CDXA": Sniffed("clip", "MPEG of a video CD"),
    b"WAVE": Sniffed("neither", "audio (WAV)"),
}
_OGG_VIDEO = (b"\x80theora", b"OVP80", b"\x01video", b"BBCD")


def sniff(path: str) -> Sniffed:
    """Whether a path of a clip table, or any file of a folder, is a still, a clip or neither, and what it is.

    A ``still`` or ``clip`` may yet be damaged: ``probe`` says. Never raises for what a file holds or is: a folder, a
    pipe, a missing or forbidden file is ``neither`` with the reason.
    """
    try:
        return sniff_source(locate(path))
    except DecodeError as error:
        return Sniffed("neither", error.cause)


def sniff_source(source: Source) -> Sniffed:
    """As ``sniff``, of bytes already found.

    Raises:
        DecodeError: they cannot be read.
    """
    if source.kind in _RAW_SUFFIXES:
        return Sniffed("neither", "camera raw, which is not read here; save it as PNG or JPEG")
    with source.open() as file:
        try:
            found = _by_content(file, source.kind)
        except OSError as error:
            raise DecodeError(source.path, f"cannot be read ({error.strerror or error})") from error
    return found or _by_name(source.kind)


def _by_content(file: BinaryIO, suffix: str) -> Sniffed | None:
    """None: the first bytes are of no format known here."""
    head = file.read(_HEAD)
    if not head:
        return Sniffed("neither", "an empty file")
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return Sniffed("clip", "animated PNG") if _png_is_animated(file) else Sniffed("still", "PNG")
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        animated = head[12:16] == b"VP8X" and len(head) > 20 and head[20] & 2
        return Sniffed("clip", "animated WebP") if animated else Sniffed("still", "WebP")
    if head[:4] == b"RIFF" and head[8:12] in _RIFF:
        return _RIFF[head[8:12]]
    if head[:4] == b"OggS":
        return _ogg(head, suffix)
    if head[4:8] in _FIRST_BOXES and (head[0] == 0 or head[4:8] == b"mdat"):  # else it is a word of a text
        found = _by_brand(head)
        tiled = found is _HEIC and _TILES.search(head + file.read(_MOST_ITEMS))
        return _TILED_HEIC if tiled else found
    if suffix in (".mjpeg", ".mjpg"):
        return None  # pictures of JPEG one behind the other
    if head[:6] in (b"GIF87a", b"GIF89a") and _GIF_TIMES not in head:
        return Sniffed("clip", "GIF without times")
    for offset, magic, what in _SIGNATURES:
        if head.startswith(magic, offset):
            return what
    if head[:2] == b"BM" and int.from_bytes(head[14:18], "little") in _BMP_HEADERS:
        return Sniffed("still", "BMP")
    if suffix in _PNM_SUFFIXES and head[:2] in _PNM:
        return Sniffed("still", "PNM")
    if suffix in (*_PNM_SUFFIXES, ".pfm") and head[:2] in _NOT_READ_PNM:
        return Sniffed("neither", f"{_NOT_READ_PNM[head[:2]]}, which is not read here; save it as PNG")
    if _is_transport_stream(head):
        return Sniffed("clip", "MPEG transport stream")
    return _text(head, suffix)


def _png_is_animated(file: BinaryIO) -> bool:
    """Whether an acTL chunk comes before the pixels."""
    at = 8
    for _ in range(_MOST_CHUNKS):
        file.seek(at)
        header = file.read(8)
        if len(header) < 8 or header[4:] in (b"IDAT", b"IEND"):
            return False
        if header[4:] == b"acTL":
            return True
        at += 12 + struct.unpack(">I", header[:4])[0]
    return False


def _by_brand(head: bytes) -> Sniffed:
    if head[4:8] == b"ftyp":
        size = min(int.from_bytes(head[:4], "big"), len(head))
        also = {head[i : i + 4] for i in range(16, size - 3, 4)}
        found = _BRANDS.get(head[8:12])
        if found is _HEIC and b"avif" in also and head[8:12] == b"mif1":
            return _AVIF
        if found is not None:
            return found
    return Sniffed("clip", "MP4 or QuickTime")


def _ogg(head: bytes, suffix: str) -> Sniffed | None:
    if any(mark in head for mark in _OGG_VIDEO):
        return Sniffed("clip", "Ogg")
    return None if suffix in (".ogv", ".ogm") else Sniffed("neither", "audio (Ogg)")


def _is_transport_stream(head: bytes) -> bool:
    """Its packets begin with 0x47 every 188 bytes, 192 with a time before each, 204 with a check sum behind; the fourth
    byte says that something follows, as it does not in a text of the letter G."""
    for length, first in ((188, 0), (192, 4), (192, 0), (204, 0)):
        marks = head[first : 8 * length : length]
        if len(marks) > 1 and set(marks) == {0x47} and head[first + 3] & 0x30:
            return True
    return False


def _text(head: bytes, suffix: str) -> Sniffed | None:
    """Web pages and such, which are no picture whatever they are called."""
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n")[:64].lower()
    if start.startswith((b"<!doctype html", b"<html")):
        return Sniffed("neither", "a web page (HTML), not the file itself; fetch it again")
    if start.startswith(b"<svg") or (start.startswith(b"<?xml") and b"<svg" in head.lower()):
        return Sniffed("neither", "SVG, which is drawn and not read here; save it as PNG")
    if start.startswith((b"<?xml", b"#extm3u", b"ffconcat")):
        return Sniffed("neither", "a list or description (text), not the file itself")
    if suffix == ".ts":
        return Sniffed("neither", "called .ts, but not an MPEG transport stream")
    return None


def _by_name(suffix: str) -> Sniffed:
    if suffix in STILL_SUFFIXES:
        return Sniffed("still", f"{suffix} by its name")
    if suffix in CLIP_SUFFIXES:
        return Sniffed("clip", f"{suffix} by its name")
    return Sniffed("neither", "no picture or video format that is known here")
