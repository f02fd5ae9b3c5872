"""Pictures whose data end before the picture does, although their file seems whole: their decoders fill what is missing
with black or grey without a word.

A file that is cut off is no such case: Pillow refuses it.
"""

import io
import re
import struct
import zlib
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
from PIL import Image

from opensora.datasets.decode.common import MAX_PICTURE_BYTES, DecodeError, decoding
from opensora.datasets.table.clip_storage import Source

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # of a PNG, by its colour type
# Of an interlaced PNG the first column and row of every pass, and the steps between its columns and rows.
_PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
_PIECE = 1 << 20  # bytes that are inflated at a time
_MARKER = re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])")  # of a JPEG; within its coded data only the next segment has one
_SOS, _EOI, _PROGRESSIVE = 0xDA, 0xD9, (0xC2, 0xC6, 0xCA, 0xCE)
_LAST_COEFFICIENT = 63
_JUNK = bytes(i * 37 % 251 + 1 for i in range(512))
_GREY, _CORNER = (126, 130), 2  # what libjpeg makes of blocks that are missing; pixels that colours of others reach not


def check_end(source: Source, image: Image.Image) -> None:
    """That the data of a loaded picture are there to its end, where Pillow does not say.

    The look at the pixels costs nothing; only a picture that ends as one that is filled up does is looked at again.
    """
    with decoding(source.path):
        if image.format == "PNG":
            is_filled = bool(image.info.get("interlace")) or not np.asarray(image.crop(_last_rows(image, 1))).any()
        elif image.format in ("JPEG", "MPO"):
            corner = np.asarray(image.crop(_last_rows(image, _CORNER)))[:, -_CORNER:]
            is_filled = bool(((corner >= _GREY[0]) & (corner <= _GREY[1])).all())
            is_filled = is_filled or bool(image.info.get("progressive"))
        else:
            return
    if is_filled and image.format == "PNG":
        _check_end_of_png(source)
    elif is_filled:
        _check_end_of_jpeg(source, image)


def _last_rows(image: Image.Image, count: int) -> tuple[int, int, int, int]:
    return 0, max(0, image.height - count), image.width, image.height


def _check_end_of_png(source: Source) -> None:
    with source.open() as file, decoding(source.path):
        lack = next(png_lacks(file))
    if lack:
        raise DecodeError(source.path, lack)


def _check_end_of_jpeg(source: Source, image: Image.Image) -> None:
    with source.open() as file, decoding(source.path):
        data = file.read(MAX_PICTURE_BYTES)
        lack = jpeg_lacks_scans(data)
    if lack:
        raise DecodeError(source.path, lack)
    with decoding(source.path):
        more = jpeg_with_more(data)
        if more is not None:
            same = np.array_equal(np.asarray(image), np.asarray(Image.open(io.BytesIO(more), formats=("JPEG",))))
            lack = "" if same else "its data end early: the rest of the picture is missing"
    if lack:
        raise DecodeError(source.path, lack)


def png_lacks(file: BinaryIO) -> Iterator[str]:
    """What the compressed data of a PNG lack, of an animated one those of every picture in turn; empty: nothing.

    Raises:
        struct.error, KeyError: it is damaged.
    """
    header, size, inflated = b"", (0, 0), _Inflated()
    for name, data in _chunks(file):
        if name == b"IHDR":
            header, size = data, struct.unpack(">II", data[:8])
        elif name == b"fcTL":
            if inflated.begun:
                yield inflated.lacks(header, size)
            size, inflated = struct.unpack(">II", data[4:12]), _Inflated()
        else:
            inflated.add(data[4:] if name == b"fdAT" else data)
    yield inflated.lacks(header, size)


class _Inflated:
    """How many bytes the data of one picture become. Of damaged ones, which decoders refuse, nothing is said."""

    def __init__(self) -> None:
        self.begun = self._damaged = False
        self._count = 0
        self._inflate = zlib.decompressobj()

    def add(self, data: bytes) -> None:
        self.begun = True
        try:
            while data and not self._inflate.eof:
                self._count += len(self._inflate.decompress(data, _PIECE))
                data = self._inflate.unconsumed_tail
        except zlib.error:
            self._damaged = True

    def lacks(self, header: bytes, size: tuple[int, int]) -> str:
        wanted = _png_bytes(header, *size) if self.begun and not self._damaged else 0
        return f"its data end early: {self._count} of {wanted} bytes of pixels" if self._count < wanted else ""


def _png_bytes(header: bytes, width: int, height: int) -> int:
    """Bytes of the pixels of a PNG before compression: every row of every pass, and a byte of its own for each."""
    depth, kind, interlaced = header[8], header[9], header[12]
    total = 0
    for left, top, across, down in _PASSES if interlaced else ((0, 0, 1, 1),):
        columns, rows = -(-(width - left) // across), -(-(height - top) // down)
        if columns > 0 and rows > 0:
            total += rows * (1 + -(-columns * depth * _CHANNELS[kind] // 8))
    return total


def _chunks(file: BinaryIO) -> Iterator[tuple[bytes, bytes]]:
    """(name, data) of those that matter here, up to the end of the picture or of the file."""
    at = len(_PNG_SIGNATURE)
    while True:
        file.seek(at)
        head = file.read(8)
        if len(head) < 8 or head[4:] == b"IEND":
            return
        length = struct.unpack(">I", head[:4])[0]
        if head[4:] in (b"IHDR", b"fcTL", b"IDAT", b"fdAT"):
            yield head[4:], file.read(length)
        at += 12 + length


def jpeg_lacks_scans(data: bytes) -> str:
    """What the scans of a progressive JPEG lack; empty: nothing, or it is not progressive.

    Every coefficient has to come in some scan, to its last bit. Of a scan that ends early this says nothing.
    """
    components, bits_left = b"", dict[tuple[int, int], int]()
    for marker, segment, _ in _segments(data):
        if marker in _PROGRESSIVE:
            components = segment[6::3]
        elif marker == _SOS and components:
            count = segment[0]
            first, last, bits = segment[1 + 2 * count], segment[2 + 2 * count], segment[3 + 2 * count] & 15
            for component in segment[1 : 1 + 2 * count : 2]:
                bits_left |= {(component, number): bits for number in range(first, last + 1)}
    wanted = ((component, number) for component in components for number in range(_LAST_COEFFICIENT + 1))
    return "its data end early: scans are missing" if any(bits_left.get(one, 1) for one in wanted) else ""


def jpeg_with_more(data: bytes) -> bytes | None:
    """The JPEG with more coded data at its end. A decoder that has all it needs passes over them, and shows the same
    picture. None: no end is found."""
    end = next((at for marker, _, at in _segments(data) if marker == _EOI), None)
    return None if end is None else data[:end] + _JUNK + data[end:]


def _segments(data: bytes) -> Iterator[tuple[int, bytes, int]]:
    """(marker, what follows its length, where it stands) of each segment of the first picture, its end the last."""
    at = 2
    while (found := _MARKER.search(data, at)) is not None:
        marker, start = found[1][0], found.start()
        length = int.from_bytes(data[found.end() : found.end() + 2], "big")
        if marker == _EOI:
            yield marker, b"", start
            return
        yield marker, data[found.end() + 2 : found.end() + length], start
        at = found.end() + max(length, 2)


def gif_lacks_pixels(start: bytes, block: bytes) -> bool:
    """Whether the compressed data of a picture of a GIF end before it does; FFmpeg then shows what was there before.

    Args:
        start: of the file, 13 bytes.
        block: what FFmpeg takes for one picture.
    """
    alone = block if block[:3] == start[:3] else start[:10] + b"\0" + start[11:13] + block  # without a palette
    try:
        with Image.open(io.BytesIO(alone), formats=("GIF",)) as image:
            image.load()
    except Exception as error:  # of anything else decoders speak for themselves
        return "truncated" in str(error)
    return False
