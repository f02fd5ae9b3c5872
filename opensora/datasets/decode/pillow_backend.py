"""Stills by Pillow, and the animated pictures that FFmpeg does not put together (WebP, PNG, AVIF, GIF without times).

Whatever the pixels are stored as, what comes out is what a viewer shows (``pillow_pixels``). A picture is there whole
or not at all: one whose data end early is refused, also where Pillow would fill the rest (``truncated``).
"""

import contextlib
import io
import logging
import os
import threading
import warnings
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import repeat
from typing import cast

import numpy as np
from PIL import Image, UnidentifiedImageError

from opensora.datasets.decode.common import (
    LIMITS,
    MAX_PICTURE_BYTES,
    Allocate,
    Colour,
    Deadline,
    DecodeError,
    MediaInfo,
    Resize,
    check_size,
    decoding,
    rate_of,
    scale_rgb,
    too_short,
)
from opensora.datasets.decode.pillow_pixels import Unreadable, to_rgb, turn_of
from opensora.datasets.decode.truncated import check_end, png_lacks
from opensora.datasets.table.clip_storage import Source
from opensora.utils.files.untrusted import parsing

# EPS and the like, which would start another program, are left out. JPEG is MPO too.
_FORMATS = (
    "PNG", "JPEG", "WEBP", "BMP", "DIB", "TIFF", "AVIF", "JPEG2000", "PPM", "TGA", "QOI", "PCX", "SGI", "PSD",
    "ICO", "GIF",
)  # fmt: skip
_DNG_VERSION = 50706  # a tag
_STDERR = 2
_ERROR_OUTPUT = threading.Lock()  # held while it leads nowhere
# What it logs of a damaged file is in the exception that follows. Whoever sets up logging still gets it; without that
# Python would print it.
logging.getLogger("PIL").addHandler(logging.NullHandler())
# What may be read of a file until its size in pixels is known: more is no header. Files of real pictures take some
# hundred reads; MAX_PICTURE_BYTES may be read at once.
_HEADER_READS, _BYTES_A_READ = 1 << 18, 16

# What Pillow has to say about a file ends as an exception, or does not matter; it is no output of a run.
warnings.filterwarnings("ignore", module=r"PIL\.")


def read_still(source: Source, resize: Resize | None, background: Colour) -> tuple[np.ndarray, str]:
    """((H, W, 3) uint8 RGB as displayed, what a user should know of it).

    Raises:
        DecodeError: it cannot be read.
    """
    with contextlib.ExitStack() as opened:
        image = _open(source, opened)
        with _quiet(), decoding(source.path):
            image.load()
        check_end(source, image)
        pictures = _pictures(image)
        turn, note = turn_of(image)
        picture = turn(to_rgb(source, image, background))
    if pictures > 1:
        first_only = f"only the first of its {pictures} pictures is used"
        note = f"{note}; {first_only}" if note else first_only
    return np.ascontiguousarray(scale_rgb(np.ascontiguousarray(picture), resize)), note


def probe_animation(source: Source, deadline: Deadline) -> MediaInfo:
    """Decodes every frame, as its time is known only then.

    Raises:
        DecodeError: it cannot be read.
    """
    height = width = 0
    times: list[float] = []
    note = ""
    for image, seconds in _frames_in_turn(source, deadline):
        if not times:
            turn, note = turn_of(image)
            height, width = turn.shape(image.height, image.width)
        times.append(seconds)
    if not times:
        raise DecodeError(source.path, "it has no frame")
    return MediaInfo(num_frames=len(times), height=height, width=width, fps=rate_of(times), note=note)


def read_animation(
    source: Source,
    numbers: Sequence[int],
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
            turn, _ = turn_of(image)
            picture = scale_rgb(np.ascontiguousarray(turn(to_rgb(source, image, background))), resize)
            if frames is None:
                frames = allocate((len(numbers), *picture.shape))
            frames[numbers.index(seen - 1)] = picture
        if seen > numbers[-1]:
            assert frames is not None
            return frames
    raise too_short(source.path, seen, numbers)


class _Bounded(io.BufferedReader):
    """A file of which no more is read than a picture's header can have, until ``unbound``.

    Pillow looks for the next block of a JPEG or a GIF byte by byte, to the end of the file: gigabytes, if it is sparse.
    """

    def __init__(self, raw: io.RawIOBase) -> None:
        super().__init__(raw)
        self._reads, self._bytes = 0, 0
        self._most_bytes: int | None = MAX_PICTURE_BYTES
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


def _open(source: Source, opened: contextlib.ExitStack, *, animated: bool = False) -> Image.Image:
    formats = _formats()
    raw = opened.enter_context(_Bounded(cast(io.BufferedReader, source.open()).detach()))
    with decoding(source.path):
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
    with contextlib.ExitStack() as opened:
        image = _open(source, opened, animated=True)
        lacks = png_lacks(opened.enter_context(source.open())) if image.format == "PNG" else repeat("")
        with decoding(source.path):
            total = int(getattr(image, "n_frames", 1))
            # A PNG may hold a picture for viewers that show no animation, which is no frame of it.
            first = 1 if image.info.get("default_image") and total > 1 else 0
            if first:
                next(lacks)
        for number in range(first, total):
            deadline.check()
            part = f"frame {number - first}: "
            with decoding(source.path, part):
                image.seek(number)
                image.load()
                seconds = float(image.info.get("duration", 0)) / 1000
                lack = next(lacks, "")
            if lack:
                raise DecodeError(source.path, part + lack)
            check_size(source.path, image.height, image.width)
            yield image, seconds


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


def _pictures(image: Image.Image) -> int:
    """How many a loaded file holds, as far as can be told."""
    try:
        with parsing(Unreadable):
            return int(getattr(image, "n_frames", 1))
    except Unreadable:
        return 1
