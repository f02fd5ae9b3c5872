"""What the blocks of a GIF say of its pictures: how long each is shown, and whether its data are there to the end."""

from typing import NamedTuple

_IMAGE, _EXTENSION, _TRAILER = 0x2C, 0x21, 0x3B
_TIMES = 0xF9  # the extension that says how long the next picture is shown
_SIGNATURES = (b"GIF87a", b"GIF89a")


class Picture(NamedTuple):
    """One picture of a GIF."""

    seconds: float  # it is shown; 0: nothing is said
    is_whole: bool  # its data are there to the end


def pictures_in(data: bytes) -> list[Picture]:
    """The pictures of a GIF, or of a piece of one that begins at a block."""
    at = _after_palette(data, 13, data[10]) if data[:6] in _SIGNATURES and len(data) > 10 else 0
    pictures, seconds = [], 0.0
    while at < len(data) and data[at] != _TRAILER:
        if data[at] == _EXTENSION:
            if data[at + 1 : at + 2] == bytes([_TIMES]):
                seconds = int.from_bytes(data[at + 4 : at + 6], "little") / 100
            at, _ = _after_blocks(data, at + 2)
        elif data[at] == _IMAGE:
            flags = data[at + 9] if at + 9 < len(data) else 0
            at, is_whole = _after_blocks(data, _after_palette(data, at + 10, flags) + 1)
            pictures.append(Picture(seconds, is_whole))
            seconds = 0.0
        else:
            at += 1
    return pictures


def _after_palette(data: bytes, at: int, flags: int) -> int:
    return at + (3 * 2 ** ((flags & 7) + 1) if flags & 0x80 else 0)


def _after_blocks(data: bytes, at: int) -> tuple[int, bool]:
    """(behind the blocks that begin here, whether the empty one that ends them is there)."""
    while at < len(data) and data[at]:
        at += 1 + data[at]
    return at + 1, at < len(data)
