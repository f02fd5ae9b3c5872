"""Pixels to files: H.264 by PyAV (its wheels bring the encoder), png by Pillow."""

import io
import os
from fractions import Fraction
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_BT709 = 1  # as matrix, primaries and transfer
_RATE_ROUNDING = 0.005  # of 23.976 or 23.98 for 24000/1001


def write_video(
    path: str | os.PathLike[str], frames_uint8_THWC: NDArray[np.uint8], fps: float, *, crf: int = 18
) -> Path:
    """(T, H, W, 3) uint8 RGB -> an H.264 mp4 in yuv420p, which every player reads.

    Colours are BT.709 of limited range, and tagged so: without tags players guess by the size of the picture, and
    guess differently. Chroma is stored for 2x2 pixels, so an odd height or width gets its last row or column twice:
    171x96 becomes 172x96. 23.976, 29.97 and 59.94 are taken for the rates of 1000/1001 that they stand for. ``crf`` is
    libx264's quality: 0 loses nothing but chroma detail, 18 is visually lossless, larger is smaller. Folders are made.

    Raises:
        ValueError: frames of another shape or dtype, or no frame.
    """
    import av
    from av.video.reformatter import ColorRange, Colorspace

    _check(frames_uint8_THWC, 4, "(T, H, W, 3)")
    if len(frames_uint8_THWC) == 0 or fps <= 0:
        raise ValueError(f"{path}: {len(frames_uint8_THWC)} frames at {fps} fps: need at least one frame and fps > 0")
    height, width = frames_uint8_THWC.shape[1:3]
    frames = np.pad(frames_uint8_THWC, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    target = _with_folder(path)
    with av.open(str(target), "w", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=_rate(fps))
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        context = stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = _BT709
        context.color_range = ColorRange.MPEG
        # Without mbtree=0 libx264 now and then writes other bytes for the same frames.
        stream.options = {"crf": str(crf), "preset": "medium", "x264-params": "mbtree=0"}
        for pixels in frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            stored = frame.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG)
            container.mux(stream.encode(stored))
        container.mux(stream.encode())
    return target


def write_image(path: str | os.PathLike[str], frame_HWC: NDArray[np.uint8]) -> Path:
    """(H, W, 3) uint8 RGB -> png. Folders are made.

    Raises:
        ValueError: a frame of another shape or dtype.
    """
    from PIL import Image

    _check(frame_HWC, 3, "(H, W, 3)")
    target = _with_folder(path)
    Image.fromarray(frame_HWC, mode="RGB").save(target, format="PNG")
    return target


def gif(frames_uint8_THWC: NDArray[np.uint8], fps: float) -> bytes:
    """(T, H, W, 3) uint8 RGB -> an animated GIF without end, of at most 256 colours a frame.

    Raises:
        ValueError: frames of another shape or dtype, or no frame.
    """
    from PIL import Image

    _check(frames_uint8_THWC, 4, "(T, H, W, 3)")
    if len(frames_uint8_THWC) == 0 or fps <= 0:
        raise ValueError(f"{len(frames_uint8_THWC)} frames at {fps} fps: need at least one frame and fps > 0")
    first, *others = (Image.fromarray(np.ascontiguousarray(frame)) for frame in frames_uint8_THWC)
    file = io.BytesIO()
    first.save(file, "GIF", save_all=True, append_images=others, duration=max(20, round(1000 / fps)), loop=0)
    return file.getvalue()


def _rate(fps: float) -> Fraction:
    whole = round(fps)
    of_television = Fraction(1000 * whole, 1001)
    if whole and fps != whole and abs(fps - of_television) < _RATE_ROUNDING:
        return of_television
    return Fraction(fps).limit_denominator(1001)


def _check(pixels: NDArray[np.uint8], dims: int, wanted: str) -> None:
    if pixels.ndim != dims or pixels.shape[-1] != 3 or pixels.dtype != np.uint8:
        raise ValueError(f"pixels {pixels.shape} {pixels.dtype}: need {wanted} uint8")


def _with_folder(path: str | os.PathLike[str]) -> Path:
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    return target
