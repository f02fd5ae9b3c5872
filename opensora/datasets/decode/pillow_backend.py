"""Stills by Pillow, and the animated pictures that FFmpeg does not put together (WebP, PNG, AVIF, GIF without times).

Whatever the pixels are stored as, what comes out is what a viewer shows, as 8-bit RGB:

* grey of 16 bits by its own range (65535, or what the file's bits can hold, is white);
* grey of 32 bits, integers or floats, whose files do not say what white is: the first of 1, 255 and 65535 that fits
  the values (``_WHITES``), else the least value is black and the largest white; what is no number is black;
* transparency on a background, CMYK and YCbCr by the usual formulas, L*a*b* to sRGB; ICC profiles are not applied;
* turned as EXIF says; EXIF that cannot be read is ignored, with a note.

A picture is there whole or not at all: one whose data end early is refused, also where Pillow would fill the rest.
"""

import contextlib
import io
import logging
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import repeat
from typing import cast

import numpy as np
from PIL import Image, UnidentifiedImageError

from opensora.datasets.decode.common import (
    LIMITS,
    MAX_PIXELS,
    Allocate,
    Colour,
    Deadline,
    DecodeError,
    Resize,
    Turn,
    check_size,
    in_bands,
    on_background,
    rate_of,
    scale_rgb,
)
from opensora.datasets.decode.truncated import jpeg_lacks_scans, jpeg_with_more, png_lacks
from opensora.datasets.table.clip_storage import Source
from opensora.utils.files.untrusted import parsing

# EPS and the like, which would start another program, are left out. JPEG is MPO too.
_FORMATS = (
    "PNG", "JPEG", "WEBP", "BMP", "DIB", "TIFF", "AVIF", "JPEG2000", "PPM", "TGA", "QOI", "PCX", "SGI", "PSD",
    "ICO", "GIF",
)  # fmt: skip
_SIXTEEN_BITS = ("I;16", "I;16B", "I;16L", "I;16N")
_WITH_ALPHA = ("LA", "PA", "RGBA", "La", "RGBa")
# White of grey that does not say, and the largest values that point to it: a little may be out of range, and is cut.
_WHITES = ((1.0, 0.0, 1.1), (255.0, 16.0, 280.0), (65535.0, 4096.0, 72000.0))
_BITS_PER_SAMPLE, _PHOTOMETRIC, _ORIENTATION, _SAMPLE_FORMAT, _DNG_VERSION = 258, 262, 274, 339, 50706  # tags
_WHITE_IS_ZERO, _UNSIGNED = 0, 1
_TURNS = {
    2: Turn(flip_columns=True),
    3: Turn(flip_rows=True, flip_columns=True),
    4: Turn(flip_rows=True),
    5: Turn(transpose=True),
    6: Turn(transpose=True, flip_columns=True),
    7: Turn(transpose=True, flip_rows=True, flip_columns=True),
    8: Turn(transpose=True, flip_rows=True),
}
# XYZ of the D50 white that L*a*b* has in pictures -> linear sRGB (Bradford), and that white.
_D50_TO_SRGB = np.array(
    [[3.1338561, -1.6168667, -0.4906146], [-0.9787684, 1.9161415, 0.0334540], [0.0719453, -0.2289914, 1.4052427]]
)
_D50 = np.array([0.96422, 1.0, 0.82521])
_STDERR = 2
_ERROR_OUTPUT = threading.Lock()  # held while it leads nowhere
# What it logs of a damaged file is in the exception that follows. Whoever sets up logging still gets it; without that
# Python would print it.
logging.getLogger("PIL").addHandler(logging.NullHandler())
# What may be read of a file until its size in pixels is known: more is no header. Files of real pictures take some
# hundred reads; what a format without compression needs for MAX_PIXELS pixels of 16 bytes may be read at once.
_HEADER_READS, _BYTES_A_READ, _HEADER_BYTES = 1 << 18, 16, 16 * MAX_PIXELS
_GREY, _CORNER = (126, 130), 2  # what libjpeg makes of blocks that are missing; pixels that colours of others reach not

# What Pillow has to say about a file ends as an exception, or does not matter; it is no output of a run.
warnings.filterwarnings("ignore", module=r"PIL\.")


@dataclass(frozen=True, kw_only=True)
class Animation:
    """What ``probe`` finds out."""

    num_frames: int
    height: int  # as displayed
    width: int
    fps: float
    note: str


def read_still(source: Source, resize: Resize | None, background: Colour) -> tuple[np.ndarray, str]:
    """((H, W, 3) uint8 RGB as displayed, what a user should know of it).

    Raises:
        DecodeError: it cannot be read.
    """
    with contextlib.ExitStack() as opened:
        image = _open(source, opened)
        with _quiet(), parsing(partial(DecodeError, source.path)):
            image.load()
        _check_end(source, image)
        pictures = _pictures(image)
        turn, note = _turn(image)
        picture = turn(_to_rgb(source, image, background))
    if pictures > 1:
        note = _join(note, f"only the first of its {pictures} pictures is used")
    return np.ascontiguousarray(scale_rgb(np.ascontiguousarray(picture), resize)), note


def probe_animation(source: Source, deadline: Deadline) -> Animation:
    """Decodes every frame, as its time is known only then.

    Raises:
        DecodeError: it cannot be read.
    """
    height = width = 0
    times: list[float] = []
    note = ""
    for image, seconds in _frames_in_turn(source, deadline):
        if not times:
            turn, note = _turn(image)
            height, width = turn.shape(image.height, image.width)
        times.append(seconds)
    if not times:
        raise DecodeError(source.path, "it has no frame")
    return Animation(num_frames=len(times), height=height, width=width, fps=rate_of(times), note=note)


def read_animation(
    source: Source,
    numbers: range,
    resize: Resize | None,
    deadline: Deadline,
    allocate: Allocate,
    background: Colour,
) -> np.ndarray:
    """The frames of these numbers; see ``opensora.datasets.decode.api.read_frames``."""
    frames: np.ndarray | None = None
    seen = 0
    for seen, (image, _) in enumerate(_frames_in_turn(source, deadline), start=1):
        if seen - 1 in numbers:
            turn, _ = _turn(image)
            picture = scale_rgb(np.ascontiguousarray(turn(_to_rgb(source, image, background))), resize)
            if frames is None:
                frames = allocate((len(numbers), *picture.shape))
            frames[numbers.index(seen - 1)] = picture
        if seen > numbers[-1]:
            assert frames is not None
            return frames
    raise DecodeError(source.path, f"it has {seen} frames, the window needs {numbers[-1] + 1}")


class _Bounded(io.BufferedReader):
    """A file of which no more is read than a picture's header can have, until ``unbound``.

    Pillow looks for the next block of a JPEG or a GIF byte by byte, to the end of the file: gigabytes, if it is sparse.
    """

    def __init__(self, raw: io.RawIOBase) -> None:
        super().__init__(raw)
        self._reads, self._bytes = 0, 0
        self._most_bytes: int | None = _HEADER_BYTES
        self._is_bound = True

    def unbound(self, *, reads: bool) -> None:
        """Any number of bytes from here on; also any number of reads, or so many that they are of some bytes each."""
        self._most_bytes, self._is_bound = None, not reads

    def read(self, size: int | None = -1, /) -> bytes:
        if self._is_bound:
            self._reads += 1
            self._bytes += self._left() if size is None or size < 0 else size
            if self._reads > _HEADER_READS + self._bytes // _BYTES_A_READ:
                raise OSError("begins as a picture does, and no picture is found behind it")
            if self._most_bytes is not None and self._bytes > self._most_bytes:
                raise OSError(f"a header of more than {self._most_bytes} bytes, which no picture has")
        return super().read(size)

    def _left(self) -> int:
        at = self.tell()
        end = self.seek(0, os.SEEK_END)
        self.seek(at)
        return end - at


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


def _open(source: Source, opened: contextlib.ExitStack, *, animated: bool = False) -> Image.Image:
    formats = _formats()
    raw = opened.enter_context(_Bounded(cast(io.BufferedReader, source.open()).detach()))
    with parsing(partial(DecodeError, source.path)):
        try:
            image = opened.enter_context(Image.open(raw, formats=formats))
        except Image.DecompressionBombError as error:  # far beyond the limits here, which are to be named
            raise DecodeError(source.path, f"too many pixels, {LIMITS}") from error
        except UnidentifiedImageError as error:  # its text is the name of a Python object
            raise DecodeError(source.path, "damaged: begins as a picture does, and is none") from error
        height, width = image.height, image.width
        is_raw = _DNG_VERSION in getattr(image, "tag_v2", {})
    raw.unbound(reads=not animated)
    check_size(source.path, height, width)
    if is_raw:
        raise DecodeError(source.path, "camera raw (DNG), only its preview could be read; save it as PNG or JPEG")
    return image


@lru_cache(maxsize=1)
def _formats() -> tuple[str, ...]:
    """Of ``_FORMATS`` those that this build of Pillow has."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _frames_in_turn(source: Source, deadline: Deadline) -> Iterator[tuple[Image.Image, float]]:
    """(the picture, seconds it is shown) of every frame; the picture is valid until the next."""
    refuse = partial(DecodeError, source.path)
    with contextlib.ExitStack() as opened:
        image = _open(source, opened, animated=True)
        lacks = png_lacks(opened.enter_context(source.open())) if image.format == "PNG" else repeat("")
        with parsing(refuse):
            total = int(getattr(image, "n_frames", 1))
            # A PNG may hold a picture for viewers that show no animation, which is no frame of it.
            first = 1 if image.info.get("default_image") and total > 1 else 0
            if first:
                next(lacks)
        for number in range(first, total):
            deadline.check()
            with parsing(lambda reason, number=number: refuse(f"frame {number - first}: {reason}")):  # type: ignore[misc]
                image.seek(number)
                image.load()
                seconds = float(image.info.get("duration", 0)) / 1000
                lack = next(lacks, "")
            if lack:
                raise refuse(f"frame {number - first}: {lack}")
            check_size(source.path, image.height, image.width)
            yield image, seconds


def _check_end(source: Source, image: Image.Image) -> None:
    """That the data of a loaded picture are there to its end, where Pillow does not say.

    The look at the pixels costs nothing; only a picture that ends as one that is filled up does is looked at again.
    """
    refuse = partial(DecodeError, source.path)
    with parsing(refuse):
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
    with source.open() as file, parsing(partial(DecodeError, source.path)):
        lack = next(png_lacks(file))
    if lack:
        raise DecodeError(source.path, lack)


def _check_end_of_jpeg(source: Source, image: Image.Image) -> None:
    refuse = partial(DecodeError, source.path)
    with source.open() as file, parsing(refuse):
        data = file.read(_HEADER_BYTES)
        lack = jpeg_lacks_scans(data)
    if lack:
        raise DecodeError(source.path, lack)
    with parsing(refuse):
        more = jpeg_with_more(data)
        if more is not None:
            same = np.array_equal(np.asarray(image), np.asarray(Image.open(io.BytesIO(more), formats=("JPEG",))))
            lack = "" if same else "its data end early: the rest of the picture is missing"
    if lack:
        raise DecodeError(source.path, lack)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """libtiff writes what it thinks of a damaged file to the standard error of the process, past Python."""
    with _ERROR_OUTPUT:
        try:
            kept = os.dup(_STDERR)
        except OSError:  # closed already
            yield
            return
        nowhere = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nowhere, _STDERR)
            yield
        finally:
            os.dup2(kept, _STDERR)
            os.close(kept)
            os.close(nowhere)


def _turn(image: Image.Image) -> tuple[Turn, str]:
    """(what EXIF says, a note where it cannot be read). What a damaged tag raises is no reason to lose the picture."""
    try:
        with parsing(_Unreadable):
            orientation = image.getexif().get(_ORIENTATION, 1)
    except _Unreadable:
        return Turn(), "its EXIF is damaged; the orientation in it is ignored"
    if isinstance(orientation, int) and 1 <= orientation <= 8:
        return _TURNS.get(orientation, Turn()), ""
    return Turn(), "" if orientation in (0, None) else "its EXIF orientation is none of 1 to 8 and is ignored"


def _pictures(image: Image.Image) -> int:
    """How many a loaded file holds, as far as can be told."""
    try:
        with parsing(_Unreadable):
            return int(getattr(image, "n_frames", 1))
    except _Unreadable:
        return 1


class _Unreadable(Exception):
    """Something beside the picture that cannot be read."""


def _to_rgb(source: Source, image: Image.Image, background: Colour) -> np.ndarray:
    """(H, W, 3) uint8 of a loaded image, whatever its mode."""
    refuse = partial(DecodeError, source.path)
    with parsing(refuse):
        mode, hidden = image.mode, image.info.get("transparency")
        wide = mode in _SIXTEEN_BITS or mode in ("I", "F")
        is_lab = mode == "LAB"
        has_alpha = mode in _WITH_ALPHA or hidden is not None
        stored = np.asarray(image if wide or is_lab else image.convert("RGBA" if has_alpha else "RGB"))
    if is_lab:
        return in_bands(_lab_to_rgb, stored)
    if not wide:
        return on_background(stored, background) if has_alpha else stored
    if _is_unsigned(source, image):
        stored = stored.view(np.uint32)
    scale = _grey_scale(source, image, stored)
    clear = hidden if isinstance(hidden, int) else None  # the one value that is transparent

    def grey(rows: np.ndarray) -> np.ndarray:
        shown = np.repeat(scale(rows)[..., None], 3, axis=2)
        if clear is not None:
            shown[rows == clear] = background
        return shown

    return in_bands(grey, stored)


def _is_unsigned(source: Source, image: Image.Image) -> bool:
    """Whether a TIFF of 32-bit integers means them from 0 on; Pillow takes all for signed."""
    with parsing(partial(DecodeError, source.path)):
        kinds = getattr(image, "tag_v2", {}).get(_SAMPLE_FORMAT, (_UNSIGNED,))
        return image.mode == "I" and image.format == "TIFF" and kinds[0] == _UNSIGNED


def _grey_scale(source: Source, image: Image.Image, stored: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """What makes 8 bits of grey of any number type, black to white."""
    with parsing(partial(DecodeError, source.path)):
        tags = getattr(image, "tag_v2", {})
        bits = int(tags.get(_BITS_PER_SAMPLE, (16,))[0])
        inverted = tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO
        says_white = image.mode in _SIXTEEN_BITS or image.format in ("PNG", "PPM")
    if says_white:
        black, white = 0.0, float(2 ** min(max(bits, 1), 16) - 1)
    else:
        finite = stored[np.isfinite(stored)]
        extremes = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
        black, white = _black_and_white(*extremes)

    def scale(rows: np.ndarray) -> np.ndarray:
        values = np.where(np.isfinite(rows), rows, black).astype(np.float64)
        grey = np.rint((values - black) * (255 / (white - black))).clip(0, 255).astype(np.uint8)
        return 255 - grey if inverted else grey

    return scale


def _black_and_white(least: float, most: float) -> tuple[float, float]:
    for white, above, up_to in _WHITES:
        if above <= most <= up_to and least >= -0.1 * white:
            return 0.0, white
    return (least, most) if most > least else (0.0, max(abs(most), 1.0))


def _lab_to_rgb(lab: np.ndarray) -> np.ndarray:
    """(H, W, 3) bytes, L* of 0 to 100 as 0 to 255 and a*, b* signed -> sRGB."""
    lightness = lab[..., 0].astype(np.float64) * (100 / 255)
    a, b = (lab[..., i].view(np.int8).astype(np.float64) for i in (1, 2))
    y = (lightness + 16) / 116
    roots = np.stack([y + a / 500, y, y - b / 200], axis=-1)
    xyz = np.where(roots > 6 / 29, roots**3, 3 * (6 / 29) ** 2 * (roots - 4 / 29)) * _D50
    linear = (xyz @ _D50_TO_SRGB.T).clip(0, 1)
    srgb = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.rint(srgb * 255).astype(np.uint8)


def _join(*notes: str) -> str:
    return "; ".join(note for note in notes if note)
