"""Frames of a clip by number, whatever decodes it and wherever its bytes are.

Frame i of a clip is the i-th frame its decoder puts out, in presentation order; times play no part. Readers are opened
per call and never kept, which makes the functions safe in forked and in spawned workers.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from opensora.datasets.decode import decord_backend, pillow_backend, pyav_backend, torchcodec_backend
from opensora.datasets.decode.common import (
    WHITE,
    Allocate,
    Colour,
    Deadline,
    DecodeError,
    MediaInfo,
    Resize,
    new_array,
    spread,
    still_resize,
)
from opensora.datasets.decode.file_type import CLIP_SUFFIXES, STILL_SUFFIXES, Sniffed, sniff, sniff_source
from opensora.datasets.table.clip_storage import Source, locate

__all__ = [
    "ANIMATIONS", "CLIP_SUFFIXES", "DECODERS", "STILL_SUFFIXES", "DecodeError", "Decoder", "MediaInfo", "Sniffed",
    "is_image", "probe", "read_frames", "require", "sniff",
]  # fmt: skip

IMAGE_SUFFIXES, VIDEO_SUFFIXES = STILL_SUFFIXES, CLIP_SUFFIXES

Decoder = Literal["pyav", "decord", "torchcodec"]
# Read by Pillow: FFmpeg does not put their frames together, or takes those of a GIF without times for one.
ANIMATIONS = ("animated PNG", "animated WebP", "animated AVIF", "GIF without times")

ReadWindow = Callable[[Source, Sequence[int], Resize | None, int, Deadline, Allocate], np.ndarray]

# name -> (what makes sure that it can be imported, what reads the frames of these numbers)
DECODERS: dict[str, tuple[Callable[[], object], ReadWindow]] = {
    "pyav": (lambda: None, pyav_backend.read_window),
    "decord": (decord_backend.load, decord_backend.read_window),
    "torchcodec": (torchcodec_backend.load, torchcodec_backend.read_window),
}


def is_image(path: str) -> bool:
    """Whether the file is read as a still, by its content; by its name where there is no such file."""
    found = sniff(path)
    return found.kind == "still" or (found.kind == "neither" and Source(path, path).kind in STILL_SUFFIXES)


def require(decoder: str) -> None:
    """Make sure that a decoder can be used, before a run starts.

    Raises:
        UserError: its package is not there, with what to install.
    """
    DECODERS[decoder][0]()


def probe(path: str, *, timeout_s: float | None = None) -> MediaInfo:
    """Number of frames, displayed size and frame rate; decodes one frame, of an animated picture all.

    Raises:
        DecodeError: the file cannot be read, or not within ``timeout_s``.
    """
    deadline = Deadline(path, timeout_s)
    source = locate(path)
    found = _sniffed(source)
    if found.kind == "still":
        picture, note = _read_still(source, found, None, deadline, WHITE)
        return MediaInfo(num_frames=1, height=picture.shape[0], width=picture.shape[1], fps=None, note=note)
    if found.what in ANIMATIONS:
        return pillow_backend.probe_animation(source, deadline)
    return pyav_backend.probe(source, deadline)


def read_frames(
    path: str,
    start: int,
    count: int,
    interval: int = 1,
    *,
    span: int | None = None,
    resize: Resize | None = None,
    threads: int = 1,
    decoder: str = "pyav",
    timeout_s: float | None = None,
    allocate: Allocate = new_array,
    background: Colour = WHITE,
) -> np.ndarray:
    """Frames start, start + interval, ... of a clip or image.

    Args:
        path: a file, or a member of an archive (``opensora.datasets.table.clip_storage``).
        count: how many frames to return.
        span: in place of ``interval``, how many frames those are spread over evenly, ``count`` or more; the first of
            these and the last are among them.
        resize: maps the displayed (height, width) to the size wanted; frames are scaled one by one (bicubic,
            antialiased, unless it says otherwise), so that memory holds the window at the small size only.
        timeout_s: give up after this time; a decoder that hangs within one packet is not noticed.
        allocate: where the frames go. Memory that is used again saves the system from clearing it, which at full size
            takes as long as decoding.
        decoder: a name in ``DECODERS``. Stills, animated pictures with GIF among them, and clips that are turned,
            transparent or have pixels that are not square are read by Pillow and PyAV whatever it says, so that all
            decoders agree.
        background: what shows through where a picture is transparent.

    Returns:
        (count, H, W, 3) uint8 RGB as displayed: turned, with square pixels, opaque.

    Raises:
        DecodeError: the file cannot be read, is too short, or is damaged inside the window.
    """
    if start < 0 or count < 1 or interval < 1:
        raise ValueError(f"start={start}, count={count}, interval={interval}: must be start >= 0, the others >= 1")
    if span is not None and span < count:
        raise ValueError(f"span={span}: must be an integer >= count={count}")
    read_plain = DECODERS[decoder][1]
    deadline = Deadline(path, timeout_s)
    source = locate(path)
    found = _sniffed(source)
    numbers: Sequence[int] = range(start, start + count * interval, interval)
    if span is not None:
        numbers = spread(start, span, count)
    if found.kind == "clip":
        if found.what in ANIMATIONS:
            return pillow_backend.read_animation(source, numbers, resize, deadline, allocate, background)
        if decoder != "pyav" and found.what != "GIF" and pyav_backend.is_plain(source, deadline):
            return read_plain(source, numbers, resize, threads, deadline, allocate)
        return pyav_backend.read_window(source, numbers, resize, threads, deadline, allocate, background)
    if start + count > 1:
        raise DecodeError(path, f"an image has 1 frame, the window needs {numbers[-1] + 1}")
    picture, _ = _read_still(source, found, still_resize(resize), deadline, background)
    frames = allocate((1, *picture.shape))
    frames[0] = picture
    return frames


def _sniffed(source: Source) -> Sniffed:
    found = sniff_source(source)
    if found.kind == "neither":
        raise DecodeError(source.path, found.what)
    return found


def _read_still(
    source: Source, found: Sniffed, resize: Resize | None, deadline: Deadline, background: Colour
) -> tuple[np.ndarray, str]:
    """((H, W, 3) uint8, a note)."""
    if found.what != "HEIC":
        return pillow_backend.read_still(source, resize, background)
    return pyav_backend.read_window(source, range(1), resize, 1, deadline, new_array, background)[0], ""
