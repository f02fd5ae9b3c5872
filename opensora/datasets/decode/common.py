"""What all decoders share: how they fail, how long they may take, and where their frames go."""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from opensora.utils.files.untrusted import parsing

# A picture beyond these is a damaged header (or a bomb): 16k x 16k as RGB are 768 MiB. The clip table has the same
# limits (``opensora.datasets.table.table_files``), so that what ``probe`` accepts it accepts too.
MAX_SIDE = 2**16 - 1
MAX_PIXELS = 2**26
MAX_PICTURE_BYTES = 16 * MAX_PIXELS  # of a file, what a format without compression needs
LIMITS = f"at most {MAX_SIDE} of a side and {MAX_PIXELS} in all are read; scale it down"
MAX_FPS = 1e5
# A picture of an animation that lasts this long or less, or does not say, is shown for a tenth of a second: as browsers
# do.
BRIEFEST_S, USUAL_S = 0.01, 0.1
_BAND_PIXELS = 2**20
_AT_ONCE = 8  # frames held at full size

Resize = Callable[[int, int], tuple[int, int]]  # displayed (height, width) -> the size wanted
Allocate = Callable[[tuple[int, int, int, int]], np.ndarray]  # shape -> uint8 array
Colour = tuple[int, int, int]  # RGB from 0 to 255
WHITE: Colour = (255, 255, 255)


class DecodeError(Exception):
    """This file cannot give these frames; ``path`` and ``cause`` say which and why."""

    def __init__(self, path: str, cause: str) -> None:
        super().__init__(path, cause)
        self.path = path
        self.cause = cause

    def __str__(self) -> str:
        return f"{self.path}: {self.cause}"


class TooSlow(DecodeError):
    """This file was not read within its time."""


def too_short(path: str, count: int, numbers: Sequence[int]) -> DecodeError:
    """The error of a file whose ``count`` frames do not reach to the last of ``numbers``."""
    if count == 0:
        return DecodeError(path, "no frame of it can be decoded")
    return DecodeError(path, f"it has {count} frames, the window needs {numbers[-1] + 1}")


def decoding(path: str, part: str = "") -> parsing:
    """A ``with`` block that calls a decoder: what the decoder raises is a ``DecodeError`` of this file.

    Args:
        part: of the file that it is about, which the message begins with.
    """
    return parsing(lambda reason: DecodeError(path, part + reason))


@dataclass(frozen=True, kw_only=True)
class MediaInfo:
    """What the clip table holds of a file."""

    num_frames: int
    height: int  # as displayed: turned, with square pixels
    width: int
    fps: float | None  # None for an image
    note: str = ""  # what a user should know although the file can be read; empty: nothing


@dataclass(frozen=True)
class Turn:
    """How a stored picture has to be turned for display: rows and columns exchanged first, then the flips."""

    transpose: bool = False
    flip_rows: bool = False  # upside down
    flip_columns: bool = False  # left and right exchanged

    def shape(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) after turning."""
        return (width, height) if self.transpose else (height, width)

    def __call__(self, picture: np.ndarray) -> np.ndarray:
        """(H, W, C) as displayed; a view."""
        if self.transpose:
            picture = picture.transpose(1, 0, 2)
        return picture[:: -1 if self.flip_rows else 1, :: -1 if self.flip_columns else 1]


def on_background(rgba: np.ndarray, background: Colour) -> np.ndarray:
    """(H, W, 4) uint8 with straight alpha -> (H, W, 3) uint8 as it looks on this colour."""
    if rgba[..., 3].min(initial=255) == 255:
        return rgba[..., :3]
    behind = np.array(background, dtype=np.uint16)

    def mixed(rows: np.ndarray) -> np.ndarray:
        alpha = rows[..., 3:].astype(np.uint16)
        return (rows[..., :3] * alpha + behind * (255 - alpha) + 127) // 255

    return in_bands(mixed, rgba)


def in_bands(convert: Callable[[np.ndarray], np.ndarray], stored: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 of what ``convert`` makes of the rows of a picture, some at a time: what it needs in between is
    many times the picture."""
    height, width = stored.shape[:2]
    rows = max(1, _BAND_PIXELS // width)
    picture = np.empty((height, width, 3), np.uint8)
    for top in range(0, height, rows):
        picture[top : top + rows] = convert(stored[top : top + rows])
    return picture


@dataclass(frozen=True)
class ResizeToFill:
    """``cover_size`` for one target: a ``Resize`` that can be sent to another process."""

    height: int
    width: int
    bilinear: bool = False  # how pixels are found, see ``scale_rgb``

    def __call__(self, height: int, width: int) -> tuple[int, int]:
        return cover_size(height, width, self.height, self.width)


def is_bilinear(resize: Resize | None) -> bool:
    """Whether frames are scaled from the four nearest pixels."""
    return isinstance(resize, ResizeToFill) and resize.bilinear


def still_resize(resize: Resize | None) -> Resize | None:
    """How a still is scaled where a clip would be scaled so: always bicubic."""
    return replace(resize, bilinear=False) if isinstance(resize, ResizeToFill) else resize


def spread(start: int, span: int, count: int) -> Sequence[int]:
    """Numbers of ``count`` frames, spread evenly from ``start`` to ``start + span - 1`` and rounded down, so that
    neighbours are not all equally far apart."""
    numbers: list[int] = np.linspace(start, start + span - 1, count).astype(np.int64).tolist()
    return numbers


def cover_size(height: int, width: int, target_height: int, target_width: int) -> tuple[int, int]:
    """Smallest (height, width) of the same ratio that covers the target; one side equals the target's."""
    if height * target_width >= width * target_height:
        return max(target_height, _divide(height * target_width, width)), target_width
    return target_height, max(target_width, _divide(width * target_height, height))


def _divide(numerator: int, denominator: int) -> int:
    """Nearest integer."""
    return (2 * numerator + denominator) // (2 * denominator)


class Deadline:
    """When a sample has to be read; decoders ask between packets. One that hangs inside a packet does not ask: that
    takes a process of its own (``opensora.datasets.decode.process``)."""

    def __init__(self, path: str, seconds: float | None) -> None:
        """``seconds`` from now; None: any time."""
        self._path = path
        self._seconds = seconds
        self._at = time.monotonic() + seconds if seconds is not None else None

    def check(self) -> None:
        """Raises: TooSlow: it is over."""
        if self._at is not None and time.monotonic() > self._at:
            raise TooSlow(self._path, f"not read within {self._seconds:g} s (data.decode_timeout_s)")


def rate_of(times: Sequence[float]) -> float:
    """Frames a second of an animation from the seconds that each frame says it is shown; the last one's do not count,
    unless it is the only one."""
    shown = [seconds if BRIEFEST_S < seconds < math.inf else USUAL_S for seconds in times[:-1] or times]
    return 1000 * len(shown) / math.fsum(1000 * seconds for seconds in shown)  # what files say are milliseconds


def new_array(shape: tuple[int, int, int, int]) -> np.ndarray:
    """The default ``Allocate``."""
    return np.empty(shape, dtype=np.uint8)


def check_size(path: str, height: int, width: int) -> None:
    """Raises: DecodeError: no picture that anybody would train on."""
    if height < 1 or width < 1:
        raise DecodeError(path, f"a picture of {width}x{height} pixels")
    if max(height, width) > MAX_SIDE or height * width > MAX_PIXELS:
        raise DecodeError(path, f"{width}x{height} pixels, {LIMITS}")


def scale_rgb(frame: np.ndarray, resize: Resize | None) -> np.ndarray:
    """(H, W, 3) uint8 at the size wanted; bicubic, antialiased, or see ``bilinear``."""
    if resize is None:
        return frame
    height, width = resize(*frame.shape[:2])
    if (height, width) == frame.shape[:2]:
        return frame
    if is_bilinear(resize):
        return bilinear(frame, height, width)
    return np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC))


def bilinear(frame: np.ndarray, height: int, width: int) -> np.ndarray:
    """(H, W, 3) uint8 -> (height, width, 3) uint8. Every pixel is mixed from the four around its place, however much
    smaller the result is (``torch.nn.functional.interpolate`` without antialiasing, which Open-Sora 1.x scales by)."""
    above, below, down = _neighbours(frame.shape[0], height)
    left, right, across = _neighbours(frame.shape[1], width)
    rows = frame[above] * (1 - down)[:, None, None] + frame[below] * down[:, None, None]
    mixed = rows[:, left] * (1 - across)[:, None] + rows[:, right] * across[:, None]
    return np.rint(mixed).astype(np.uint8)


def _neighbours(size: int, wanted: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of every pixel along an axis: the one before its place, the one behind, and how far it is on the way, fp32."""
    place = np.maximum((np.arange(wanted) + 0.5) * (size / wanted) - 0.5, 0)
    before = np.minimum(place.astype(np.int64), size - 1)
    return before, np.minimum(before + 1, size - 1), (place - before).astype(np.float32)


def read_in_batches(
    read: Callable[[list[int]], Iterable[np.ndarray]],
    numbers: Sequence[int],
    resize: Resize | None,
    deadline: Deadline,
    allocate: Allocate,
) -> np.ndarray:
    """The frames of these numbers from a decoder that is asked by number; few at a time are held at full size."""
    frames: np.ndarray | None = None
    for first in range(0, len(numbers), _AT_ONCE):
        deadline.check()
        for slot, frame in enumerate(read(list(numbers[first : first + _AT_ONCE])), first):
            scaled = scale_rgb(frame, resize)
            if frames is None:
                frames = allocate((len(numbers), *scaled.shape))
            frames[slot] = scaled
    assert frames is not None
    return frames
