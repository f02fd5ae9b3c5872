"""Resolution names, aspect ratios, and the size of a frame that has about this area and this ratio.

``Npx`` is an area of N^2 pixels, ``Np`` one of N^2 * 16/9. Training's table of sizes (``datasets/buckets/aspect.py``)
and sampling both start from ``frame_size``.
"""

import math
import re
from collections.abc import Callable

# (w, h) of the ratios a resolution offers; each also lies on its side.
RATIOS: dict[str, tuple[float, float]] = {
    "2.39:1": (2.39, 1.0),
    "2:1": (2.0, 1.0),
    "16:9": (16.0, 9.0),
    "1.85:1": (1.85, 1.0),
    "9:16": (9.0, 16.0),
    "5:8": (5.0, 8.0),
    "3:2": (3.0, 2.0),
    "4:3": (4.0, 3.0),
    "1:1": (1.0, 1.0),
}
MAX_RATIO = 32  # of the long side to the short one: beyond, the short one is below a token at any usual area

Rule = Callable[[int, float, float, int], tuple[int, int]]  # (area, w, h, multiple) -> (height, width)
_RESOLUTION = re.compile(r"([1-9][0-9]{0,4})(px|p)")
_RATIO = re.compile(r"([0-9]{1,6}(?:\.[0-9]{1,6})?):([0-9]{1,6}(?:\.[0-9]{1,6})?)")


def area_of(resolution: str) -> int:
    """Nominal pixels per frame of ``Npx`` or ``Np``.

    Raises:
        ValueError: not a resolution.
    """
    found = _RESOLUTION.fullmatch(resolution)
    if not found:
        raise ValueError("must be a number of at most 5 digits and px or p, as 256px or 480p")
    side = int(found[1])
    return side**2 if found[2] == "px" else int(side**2 * 16 / 9)


def ratio_of(aspect_ratio: str) -> tuple[float, float]:
    """(w, h) of ``w:h``.

    Raises:
        ValueError: not two numbers > 0, or one more than ``MAX_RATIO`` times the other.
    """
    found = _RATIO.fullmatch(aspect_ratio)
    width, height = (float(found[1]), float(found[2])) if found else (0.0, 0.0)
    if not width or not height:
        raise ValueError(f"must be width:height, as {', '.join(RATIOS)}")
    if max(width, height) > MAX_RATIO * min(width, height):
        raise ValueError(f"must be a ratio from 1:{MAX_RATIO} to {MAX_RATIO}:1")
    return width, height


def rounded_down(area: int, ratio_w: float, ratio_h: float, multiple: int) -> tuple[int, int]:
    """(height, width), multiples of ``multiple`` of about this area; the width is rounded down, then the height."""
    width = max(multiple, int(math.sqrt(area * ratio_w / ratio_h) // multiple) * multiple)
    height = max(multiple, int(area / width // multiple) * multiple)
    return height, width


def frame_size(area: int, aspect_ratio: str, multiple: int, rule: Rule = rounded_down) -> tuple[int, int]:
    """(height, width) of a ratio w:h. One that is taller than wide has the transposed size of the same ratio on its
    side, unless ``RATIOS`` lists it as it is: rounding starts with the longer side.

    Raises:
        ValueError: as ``ratio_of``.
    """
    ratio_w, ratio_h = RATIOS.get(aspect_ratio) or ratio_of(aspect_ratio)
    transposed = ":".join(reversed(aspect_ratio.split(":")))
    lies_on_its_side = aspect_ratio not in RATIOS and (transposed in RATIOS or ratio_w < ratio_h)
    if lies_on_its_side:
        width, height = rule(area, ratio_h, ratio_w, multiple)
        return height, width
    return rule(area, ratio_w, ratio_h, multiple)
