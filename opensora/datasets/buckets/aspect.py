"""Resolution names and the table of sizes behind each.

A name is ``Npx`` (area N^2, "256px") or ``Np`` (area N^2 * 16/9, "480p"), with an optional suffix:
``_ar16:9`` keeps one ratio (w:h), ``_max`` keeps the size of the largest area: of equal ones the first in the order of
``RATIOS``, then of their transposes.
Sizes are multiples of D, the pixels one token spans in space (autoencoder stride * patch).
"""

import re
from functools import lru_cache

from opensora.utils.sizes import RATIOS, Rule, frame_size, rounded_down
from opensora.utils.sizes import area_of as plain_area_of

_NAME = re.compile(r"(?P<plain>[1-9][0-9]{0,4}(?:px|p))(?:_(?P<suffix>max|ar.+))?")


@lru_cache(maxsize=256)
def area_of(resolution: str) -> int:
    """Nominal pixels per frame of a resolution name.

    Raises:
        ValueError: not a resolution name.
    """
    return plain_area_of(_parse(resolution)[0])


@lru_cache(maxsize=256)
def training_sizes(resolution: str, multiple: int) -> tuple[tuple[int, int], ...]:
    """Distinct (height, width) a resolution offers for training, widest first; multiples of ``multiple``.

    Each ratio starts from its rounded-down size and moves one multiple up or down in either direction when that
    comes closer to the area.

    Raises:
        ValueError: not a resolution name, a ratio it does not have, or an area below one token.
    """
    area = area_of(resolution)
    if area < multiple * multiple:
        raise ValueError(
            f"{resolution}: smaller than one token of {multiple}x{multiple} pixels, use a larger resolution"
        )
    suffix = _parse(resolution)[1]
    if suffix.startswith("ar"):
        sizes = [_of_ratio(resolution, suffix[2:], multiple, _closest_to_area)]
    else:
        listed = [_closest_to_area(area, *ratio, multiple) for ratio in RATIOS.values()]
        sizes = listed + [(width, height) for height, width in listed]
    if suffix == "max":
        sizes = [max(sizes, key=lambda size: size[0] * size[1])]  # the first of equal ones
    return tuple(sorted(set(sizes), key=lambda size: (-size[1] / size[0], size)))


def named_sizes(resolution: str, multiple: int) -> dict[str, tuple[int, int]]:
    """Ratio (w:h) -> (height, width) of a resolution as Open-Sora 2 lists them; errors as of ``training_sizes``.

    A listed ratio whose size one before it has is left out, with its transpose; a name that is listed and is the
    transpose of another as well has the transposed size. ``_max`` keeps the one of the largest area.
    """
    area, suffix = area_of(resolution), _parse(resolution)[1]
    if suffix.startswith("ar"):
        return {suffix[2:]: _of_ratio(resolution, suffix[2:], multiple, _closest_to_area)}
    listed: dict[str, tuple[int, int]] = {}
    transposed: dict[str, tuple[int, int]] = {}
    for name, ratio in RATIOS.items():
        height, width = _closest_to_area(area, *ratio, multiple)
        if (height, width) not in listed.values():
            listed[name] = (height, width)
            transposed[":".join(reversed(name.split(":")))] = (width, height)
    listed |= transposed
    if suffix == "max":
        largest = max(listed, key=lambda name: listed[name][0] * listed[name][1])
        return {largest: listed[largest]}
    return listed


def _parse(resolution: str) -> tuple[str, str]:
    """(resolution without its suffix, suffix)."""
    match = _NAME.fullmatch(resolution)
    if match is None:
        raise ValueError(f"{resolution}: not a resolution, write for example 256px, 720p, 256px_ar16:9 or 768px_max")
    return match["plain"], match["suffix"] or ""


def _of_ratio(resolution: str, name: str, multiple: int, rule: Rule) -> tuple[int, int]:
    """The size of a named ratio; the transpose of a listed ratio has the transposed size."""
    if name not in RATIOS and ":".join(reversed(name.split(":"))) not in RATIOS:
        raise ValueError(f"{resolution}: no ratio {name!r}, must be one of {', '.join(RATIOS)} and their transposes")
    return frame_size(area_of(resolution), name, multiple, rule)


def _closest_to_area(area: int, ratio_w: float, ratio_h: float, multiple: int) -> tuple[int, int]:
    height, width = rounded_down(area, ratio_w, ratio_h, multiple)
    steps = ((0, 0), (multiple, 0), (-multiple, 0), (0, multiple), (0, -multiple))
    around = [(height + dh, width + dw) for dh, dw in steps if height + dh > 0 and width + dw > 0]
    return min(around, key=lambda size: abs(size[0] * size[1] - area))
