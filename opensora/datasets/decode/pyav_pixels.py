"""Frames that PyAV has decoded, converted to what a player shows: see ``pyav_backend``."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from av.sidedata.sidedata import SideDataContainer
from av.sidedata.sidedata import Type as SideDataType
from av.video.frame import VideoFrame
from av.video.reformatter import Colorspace, Interpolation, VideoReformatter

from opensora.datasets.decode.common import (
    Allocate,
    Colour,
    DecodeError,
    Resize,
    Turn,
    bilinear,
    check_size,
    decoding,
    is_bilinear,
    on_background,
    scale_rgb,
)
from opensora.datasets.decode.pyav_container import StreamInfo
from opensora.datasets.table.clip_storage import Source

_PALETTE = "pal8"  # pixel format whose colours may be transparent, as those of PNG
_HD_WIDTH, _SD_HEIGHT = 1280, 576
# Numbers of AVColorSpace, AVColorRange and AVColorTransferCharacteristic.
UNTAGGED_MATRIX = (2, 3)  # unspecified, reserved
KNOWN_MATRIX = (0, 1, 4, 5, 6, 7, 9, *UNTAGGED_MATRIX)  # what swscale converts
_UNTAGGED_RANGE, _LIMITED_RANGE = 0, 1
HDR_CURVES = {16: "PQ", 18: "HLG"}
_LIMITED_GREY = ("h264", "hevc", "vvc", "av1", "libdav1d", "vp9")  # their grey without a tag is of limited range
# What limited range (16 to 235) becomes in full range.
_FULL_RANGE = np.rint((np.arange(256) - 16.0) * (255 / 219)).clip(0, 255).astype(np.uint8)


class StoredFrame(NamedTuple):
    """A decoded frame as it is stored."""

    height: int
    width: int
    pixels: str  # name of its pixel format
    has_alpha: bool
    matrix: int
    range: int
    curve: int
    turn: Turn


class Window:
    """The frames asked for, filled in as they come; converted at once so that decoder buffers go back."""

    def __init__(
        self,
        source: Source,
        about: StreamInfo,
        wanted_pts: np.ndarray,
        resize: Resize | None,
        allocate: Allocate,
        background: Colour,
        look: Callable[[StoredFrame], object],
    ) -> None:
        self.source = source
        self.about = about
        self.slots = {int(pts): slot for slot, pts in enumerate(wanted_pts)}
        self._empty = set(self.slots.values())
        self._resize = resize
        self._allocate = allocate
        self._background = background
        self._look = look
        self._reformatter = VideoReformatter()
        self._frames: np.ndarray | None = None

    def put(self, slot: int, frame: VideoFrame) -> None:
        stored = stored_frame(self.source, frame)
        if self._frames is None:
            self._look(stored)
            self._frames = self._allocate((len(self.slots), *self._size(stored), 3))
        height, width = stored.turn.shape(*self._frames.shape[1:3])
        if stored.has_alpha:
            rgba = self._convert(frame, stored, stored.height, stored.width, "rgba")
            unused = stored.pixels == _PALETTE and not rgba[..., 3].any()  # a palette without alpha, its bytes left 0
            opaque = rgba[..., :3] if unused else on_background(rgba, self._background)
            picture = self._scaled(np.ascontiguousarray(opaque), height, width)
        elif is_bilinear(self._resize):
            whole = self._convert(frame, stored, stored.height, stored.width, "rgb24")
            picture = self._scaled(whole, height, width)
        else:
            picture = self._convert(frame, stored, height, width, "rgb24")
        if is_limited_grey(stored, self.about.codec):
            picture = _FULL_RANGE[picture]
        self._frames[slot] = stored.turn(picture)
        self._empty.discard(slot)

    def _scaled(self, picture: np.ndarray, height: int, width: int) -> np.ndarray:
        """(height, width, 3) uint8 of a picture at full size."""
        if is_bilinear(self._resize) and picture.shape[:2] != (height, width):
            return bilinear(picture, height, width)
        return scale_rgb(picture, lambda *_: (height, width))

    def _size(self, stored: StoredFrame) -> tuple[int, int]:
        """(height, width) wanted, of frames as displayed."""
        wide = max(1, round(stored.width * self.about.stretch))
        height, width = stored.turn.shape(stored.height, wide)
        check_size(self.source.path, height, width)
        return (height, width) if self._resize is None else self._resize(height, width)

    def _convert(self, frame: VideoFrame, stored: StoredFrame, height: int, width: int, pixels: str) -> np.ndarray:
        """(height, width, 3 or 4) uint8 in memory of FFmpeg's."""
        if stored.matrix not in KNOWN_MATRIX:
            raise DecodeError(self.source.path, f"its colour matrix (number {stored.matrix}) cannot be converted")
        matrix = Colorspace.ITU709 if stored.matrix in UNTAGGED_MATRIX and is_hd(stored) else None
        channels = len(pixels.removesuffix("24"))
        with decoding(self.source.path):
            rgb = self._reformatter.reformat(
                frame, width, height, pixels, src_colorspace=matrix, interpolation=Interpolation.BICUBIC
            )
            plane = rgb.planes[0]  # its lines are padded
            strides = (plane.line_size, channels, 1)
            return np.ndarray((rgb.height, rgb.width, channels), np.uint8, buffer=memoryview(plane), strides=strides)

    def missing(self) -> int:
        return len(self._empty)

    def frames(self) -> np.ndarray:
        assert self._frames is not None and not self._empty
        return self._frames


def stored_frame(source: Source, frame: VideoFrame) -> StoredFrame:
    with decoding(source.path):
        layout = frame.format
        has_alpha = layout.name == _PALETTE or any(component.is_alpha for component in layout.components)
        facts = (frame.height, frame.width, layout.name, has_alpha)
        colours = (frame.colorspace, frame.color_range, frame.color_trc)
        # Not frame.side_data, which the frame keeps: the two hold each other, and the pixels, until a collection.
        side_data: Any = SideDataContainer(frame)  # iterates over its values, unlike a mapping
        matrix = next((data for data in side_data if data.type is SideDataType.DISPLAYMATRIX), None)
        entries = None if matrix is None else np.frombuffer(bytes(matrix), np.int32)[:9].tolist()
    return StoredFrame(*facts, *colours, Turn() if entries is None else _turn_of(entries))


def _turn_of(matrix: list[int]) -> Turn:
    """The nearest turn by quarters, mirrored or not, to a display matrix (rows a b u, c d v, x y w)."""
    a, b, _, c, d = matrix[:5]
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return Turn(flip_rows=d < 0, flip_columns=a < 0)
    return Turn(transpose=True, flip_rows=b < 0, flip_columns=c < 0)


def is_hd(stored: StoredFrame) -> bool:
    """Whether players take colours without a tag for BT.709."""
    is_yuv = stored.pixels.startswith(("yuv", "nv", "p0", "p2", "p4", "y2", "uyvy", "vuy", "xv"))
    return is_yuv and (stored.width >= _HD_WIDTH or stored.height > _SD_HEIGHT)


def is_limited_grey(stored: StoredFrame, codec: str) -> bool:
    """swscale takes all grey for full range."""
    if not stored.pixels.startswith("gray"):
        return False
    return stored.range == _LIMITED_RANGE or (stored.range == _UNTAGGED_RANGE and codec in _LIMITED_GREY)
