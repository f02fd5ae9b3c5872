"""Pictures that Pillow has loaded, as a viewer shows them, in 8-bit RGB whatever they are stored as:

* grey of 16 bits by its own range (65535, or what the file's bits can hold, is white);
* grey of 32 bits, integers or floats, whose files do not say what white is: the first of 1, 255 and 65535 that fits
  the values (``_WHITES``), else the least value is black and the largest white; what is no number is black;
* transparency on a background, CMYK and YCbCr by the usual formulas, L*a*b* to sRGB; ICC profiles are not applied;
* turned as EXIF says; EXIF that cannot be read is ignored, with a note.
"""

from collections.abc import Callable

import numpy as np
from PIL import Image

from opensora.datasets.decode.common import Colour, Turn, decoding, in_bands, on_background
from opensora.datasets.table.clip_storage import Source
from opensora.utils.files.untrusted import parsing

_SIXTEEN_BITS = ("I;16", "I;16B", "I;16L", "I;16N")
_WITH_ALPHA = ("LA", "PA", "RGBA", "La", "RGBa")
# White of grey that does not say, and the largest values that point to it: a little may be out of range, and is cut.
_WHITES = ((1.0, 0.0, 1.1), (255.0, 16.0, 280.0), (65535.0, 4096.0, 72000.0))
_BITS_PER_SAMPLE, _PHOTOMETRIC, _ORIENTATION, _SAMPLE_FORMAT = 258, 262, 274, 339  # tags
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


class Unreadable(Exception):
    """Something beside the picture that cannot be read."""


def turn_of(image: Image.Image) -> tuple[Turn, str]:
    """(what EXIF says, a note where it cannot be read). What a damaged tag raises is no reason to lose the picture."""
    try:
        with parsing(Unreadable):
            orientation = image.getexif().get(_ORIENTATION, 1)
    except Unreadable:
        return Turn(), "its EXIF is damaged; the orientation in it is ignored"
    if isinstance(orientation, int) and 1 <= orientation <= 8:
        return _TURNS.get(orientation, Turn()), ""
    return Turn(), "" if orientation in (0, None) else "its EXIF orientation is none of 1 to 8 and is ignored"


def to_rgb(source: Source, image: Image.Image, background: Colour) -> np.ndarray:
    """(H, W, 3) uint8 of a loaded image, whatever its mode."""
    with decoding(source.path):
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
    with decoding(source.path):
        kinds = getattr(image, "tag_v2", {}).get(_SAMPLE_FORMAT, (_UNSIGNED,))
        return image.mode == "I" and image.format == "TIFF" and kinds[0] == _UNSIGNED


def _grey_scale(source: Source, image: Image.Image, stored: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """What makes 8 bits of grey of any number type, black to white."""
    with decoding(source.path):
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
