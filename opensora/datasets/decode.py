"""Frames of a clip by number, whatever decodes it and wherever its bytes are.

Frame i of a clip is the i-th frame its decoder puts out, in presentation order; times play no part. Readers are opened
per call and never kept, which makes the functions safe in forked and in spawned workers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageOps

from opensora.datasets import decode_decord, decode_pyav, decode_torchcodec
from opensora.datasets.frames import (
    Allocate,
    Deadline,
    DecodeError,
    Resize,
    check_size,
    new_array,
    short_reason,
)
from opensora.datasets.storage import Source, locate

__all__ = ["DECODERS", "DecodeError", "Decoder", "MediaInfo", "is_image", "probe", "read_frames", "require"]

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
VIDEO_SUFFIXES = (".mp4", ".mkv", ".mov", ".webm", ".avi", ".m4v", ".mpg", ".mpeg", ".ts", ".wmv", ".flv", ".gif")

# In what ways pillow's parsers fail on a damaged or foreign file.
_IMAGE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)

Decoder = Literal["pyav", "decord", "torchcodec"]
ReadWindow = Callable[[Source, range, Resize | None, int, Deadline, Allocate], np.ndarray]

# name -> (what makes sure that it can be imported, what reads the frames of these numbers)
DECODERS: dict[str, tuple[Callable[[], object], ReadWindow]] = {
    "pyav": (lambda: None, decode_pyav.read_window),
    "decord": (decode_decord.load, decode_decord.read_window),
    "torchcodec": (decode_torchcodec.load, decode_torchcodec.read_window),
}


@dataclass(frozen=True, kw_only=True)
class MediaInfo:
    """What the clip table holds of a file."""

    num_frames: int
    height: int  # as displayed, after rotation
    width: int
    fps: float | None  # None for an image


def is_image(path: str) -> bool:
    """Whether the file is read as a still; gif counts as a video."""
    return Source(path, path).kind in IMAGE_SUFFIXES


def require(decoder: str) -> None:
    """Make sure that a decoder can be used, before a run starts.

    Raises:
        UserError: its package is not there, with what to install.
    """
    DECODERS[decoder][0]()


def probe(path: str, *, timeout_s: float | None = None) -> MediaInfo:
    """Number of frames, displayed size and frame rate; decodes one frame. Always by PyAV.

    Raises:
        DecodeError: the file cannot be read, or not within ``timeout_s``.
    """
    deadline = Deadline(path, timeout_s)
    source = locate(path)
    if source.kind in IMAGE_SUFFIXES:
        height, width = _read_image(source, None).shape[:2]
        return MediaInfo(num_frames=1, height=height, width=width, fps=None)
    count, height, width, fps = decode_pyav.probe(source, deadline)
    return MediaInfo(num_frames=count, height=height, width=width, fps=fps)


def read_frames(
    path: str,
    start: int,
    count: int,
    interval: int = 1,
    *,
    resize: Resize | None = None,
    threads: int = 1,
    decoder: str = "pyav",
    timeout_s: float | None = None,
    allocate: Allocate = new_array,
) -> np.ndarray:
    """Frames start, start + interval, ... of a clip or image.

    Args:
        path: a file, or a member of an archive (``opensora.datasets.storage``).
        count: how many frames to return.
        resize: maps the displayed (height, width) to the size wanted; frames are scaled one by one (bicubic,
            antialiased), so that memory holds the window at the small size only.
        timeout_s: give up after this time; a decoder that hangs within one packet is not noticed.
        allocate: where the frames go. Memory that is used again saves the system from clearing it, which at full size
            takes as long as decoding.

    Returns:
        (count, H, W, 3) uint8 RGB, rotation tag applied.

    Raises:
        DecodeError: the file cannot be read, is too short, or is damaged inside the window.
    """
    if start < 0 or count < 1 or interval < 1:
        raise ValueError(f"start={start}, count={count}, interval={interval}: allowed are start >= 0, the others >= 1")
    deadline = Deadline(path, timeout_s)
    source = locate(path)
    numbers = range(start, start + count * interval, interval)
    if source.kind not in IMAGE_SUFFIXES:
        return DECODERS[decoder][1](source, numbers, resize, threads, deadline, allocate)
    if start + count > 1:
        raise DecodeError(path, f"an image has 1 frame, the window needs {numbers[-1] + 1}")
    image = _read_image(source, resize)
    frames = allocate((1, *image.shape))
    frames[0] = image
    return frames


def _read_image(source: Source, resize: Resize | None) -> np.ndarray:
    """(H, W, 3) uint8, EXIF orientation applied, transparency dropped."""
    try:
        with source.open() as raw, Image.open(raw) as file:
            check_size(source.path, file.height, file.width)
            image = ImageOps.exif_transpose(file).convert("RGB")
            if resize is not None:
                height, width = resize(image.height, image.width)
                image = image.resize((width, height), Image.Resampling.BICUBIC)
            return np.array(image)  # pillow's own buffer is read-only
    except _IMAGE_ERRORS as error:
        raise DecodeError(source.path, short_reason(error)) from error
