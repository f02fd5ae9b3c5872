"""Sizes of Open-Sora 1.1, 1.2 and 1.3: tables of (height, width) by ratio, which no rule of rounding gives.

Resolutions with a ``p`` or ``k`` have 17 ratios, the others, which are PixArt's, 40. A ratio is height over width and
is called by two digits behind the point (1.1 and 1.2 leave trailing zeros out where there are 40). Clips take the size
whose *name* is nearest to theirs. Sizes are any even or odd numbers; what autoencoder and patches do with them is
theirs. In 1.3 ``360p_16d`` has those of 360p, cut to multiples of 16. ``256x384`` is a single size, height first, as
data sets of 1.0 have it.
"""

import re
from functools import lru_cache
from typing import Literal, TypeAlias, get_args

from opensora.utils.sizes import MAX_RATIO

Version: TypeAlias = Literal["1.0", "1.1", "1.2", "1.3"]
Size: TypeAlias = tuple[int, int]  # (height, width)
RULES: dict[str, Version] = {f"open_sora_{version.replace('.', '_')}": version for version in get_args(Version)}
# data.bucket_rule -> whose sizes it has

# Height to width as people write it -> the name of the ratio.
RATIO_NAMES: dict[str, str] = {
    **{"3:8": "0.38", "9:21": "0.43", "12:25": "0.48", "1:2": "0.50", "9:17": "0.53", "27:50": "0.54"},
    **{"9:16": "0.56", "5:8": "0.62", "2:3": "0.67", "3:4": "0.75", "1:1": "1.00", "4:3": "1.33"},
    **{"3:2": "1.50", "16:9": "1.78", "17:9": "1.89", "2:1": "2.00", "50:27": "2.08"},
}
FRAME_COUNTS: dict[str, int] = {
    **{"1x": 51, "2x": 102, "4x": 204, "8x": 408, "16x": 816},
    **{"2s": 51, "4s": 102, "8s": 204, "16s": 408, "32s": 816},
}
_OF_17 = {  # in the order of RATIO_NAMES
    "144p": "117x312 125x291 133x277 135x270 139x262 141x260 144x256 151x241 156x234 166x221 192x192 221x165 235x156"
    " 256x144 263x139 271x135 277x132",
    "240p": "196x522 210x490 222x462 226x452 232x438 236x436 240x426 252x404 262x393 276x368 320x320 370x278 392x262"
    " 426x240 440x232 452x226 462x222",
    "360p": "294x784 314x732 332x692 340x680 350x662 352x652 360x640 380x608 392x588 416x554 480x480 554x416 588x392"
    " 640x360 660x350 678x340 692x332",
    "480p": "392x1046 420x980 444x925 452x904 466x880 470x870 480x854 506x810 522x784 554x738 640x640 740x555 784x522"
    " 854x480 880x466 906x454 924x444",
    "720p": "588x1568 628x1466 666x1388 678x1356 698x1318 706x1306 720x1280 758x1212 784x1176 832x1110 960x960 1108x832"
    " 1176x784 1280x720 1320x698 1358x680 1386x666",
    "1080p": "882x2352 942x2198 998x2080 1018x2036 1048x1980 1058x1958 1080x1920 1138x1820 1176x1764 1248x1664"
    " 1440x1440 1662x1246 1764x1176 1920x1080 1980x1048 2036x1018 2078x998",
    "2k": "1176x3136 1256x2930 1330x2770 1358x2716 1398x2640 1412x2612 1440x2560 1518x2428 1568x2352 1662x2216"
    " 1920x1920 2218x1664 2352x1568 2560x1440 2638x1396 2716x1358 2772x1330",
    "4k": "1764x4704 1886x4400 1996x4158 2036x4072 2096x3960 2118x3918 2160x3840 2276x3642 2352x3528 2494x3326"
    " 2880x2880 3326x2494 3528x2352 3840x2160 3958x2096 4072x2036 4156x1994",
}
_OF_40 = {  # ratio=size; 512, 1024 and 2048 have twice, four and eight times those of 256
    "256": "0.25=128x512 0.26=128x496 0.27=128x480 0.28=128x464 0.32=144x448 0.33=144x432 0.35=144x416 0.40=160x400"
    " 0.42=160x384 0.48=176x368 0.50=176x352 0.52=176x336 0.57=192x336 0.60=192x320 0.68=208x304 0.72=208x288"
    " 0.78=224x288 0.82=224x272 0.88=240x272 0.94=240x256 1.00=256x256 1.07=256x240 1.13=272x240 1.21=272x224"
    " 1.29=288x224 1.38=288x208 1.46=304x208 1.67=320x192 1.75=336x192 2.00=352x176 2.09=368x176 2.40=384x160"
    " 2.50=400x160 2.89=416x144 3.00=432x144 3.11=448x144 3.62=464x128 3.75=480x128 3.88=496x128 4.00=512x128",
    "2880": "0.25=1408x5760 0.26=1408x5568 0.27=1408x5376 0.28=1408x5184 0.32=1600x4992 0.33=1600x4800 0.34=1600x4672"
    " 0.40=1792x4480 0.42=1792x4288 0.47=1920x4096 0.49=1920x3904 0.51=1920x3776 0.55=2112x3840 0.59=2112x3584"
    " 0.68=2304x3392 0.72=2304x3200 0.78=2496x3200 0.83=2496x3008 0.89=2688x3008 0.93=2688x2880 1.00=2880x2880"
    " 1.07=2880x2688 1.12=3008x2688 1.21=3008x2496 1.28=3200x2496 1.39=3200x2304 1.47=3392x2304 1.70=3584x2112"
    " 1.82=3840x2112 2.03=3904x1920 2.13=4096x1920 2.39=4288x1792 2.50=4480x1792 2.92=4672x1600 3.00=4800x1600"
    " 3.12=4992x1600 3.68=5184x1408 3.82=5376x1408 3.95=5568x1408 4.00=5760x1408",
}
_MULTIPLES = {"256": ("256", 1), "512": ("256", 2), "1024": ("256", 4), "2048": ("256", 8), "2880": ("2880", 1)}
_SINCE_1_2 = ("2k", "2048", "2880")
_SWAPPED = {"4k": ("0.56", "0.62")}  # in the list, whose order decides between equally near ratios
_CUT, _CUT_TO = "_16d", 16
_ONE_SIZE = re.compile(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})")


def resolutions(version: Version) -> tuple[str, ...]:
    """Those that a version has a table for, smallest first."""
    if version == "1.0":
        return ()
    names = [name for name in (*_OF_17, *_MULTIPLES) if version != "1.1" or name not in _SINCE_1_2]
    return tuple(sorted(names, key=lambda name: area_1x(version, name)))


@lru_cache(maxsize=256)
def sizes_1x(version: Version, resolution: str) -> dict[str, Size]:
    """Name of a ratio -> size, in the order in which they are tried.

    Raises:
        ValueError: no such resolution in this version.
    """
    if version == "1.0":
        return _one_size(resolution)
    plain = resolution.removesuffix(_CUT) if version == "1.3" else resolution
    if plain in _OF_17 and (version != "1.1" or plain not in _SINCE_1_2):
        found = dict(zip(RATIO_NAMES.values(), map(_size, _OF_17[plain].split()), strict=True))
        found = {name: found[name] for name in _in_order(plain)}
    elif plain in _MULTIPLES and (version != "1.1" or plain not in _SINCE_1_2):
        found = _of_40(plain, version)
    else:
        raise ValueError(f"{resolution}: not a resolution of Open-Sora {version}; {_advice(version)}")
    if plain != resolution:
        return {
            name: (height // _CUT_TO * _CUT_TO, width // _CUT_TO * _CUT_TO) for name, (height, width) in found.items()
        }
    return found


@lru_cache(maxsize=256)
def area_1x(version: Version, resolution: str) -> int:
    """Nominal pixels of a frame: those of its 9:16, or of its square. Of a single size 0: it takes clips of any area.

    Raises:
        ValueError: no such resolution in this version.
    """
    found = sizes_1x(version, resolution.removesuffix(_CUT) if version == "1.3" else resolution)
    if version == "1.0":
        return 0
    height, width = found["0.56"] if "0.56" in found else next(size for size in found.values() if size[0] == size[1])
    return height * width


def clip_size_1x(version: Version, resolution: str, ratio: str) -> Size:
    """The size of sampled clips of a resolution and a ratio, height to width as in ``RATIO_NAMES``.

    Raises:
        ValueError: no such resolution, or it has no such ratio.
    """
    found = sizes_1x(version, resolution)
    if ratio not in RATIO_NAMES:
        raise ValueError(f"no ratio {ratio!r} (height to width); must be one of {', '.join(RATIO_NAMES)}")
    wanted = float(RATIO_NAMES[ratio])
    size = next((size for name, size in found.items() if float(name) == wanted), None)
    if size is None:
        has = [name for name, key in RATIO_NAMES.items() if float(key) in map(float, found)]
        raise ValueError(f"{resolution} has no size of {ratio}; must be one of {', '.join(has)}")
    return size


def nearest_ratio(sizes: dict[str, Size], height: int, width: int) -> str:
    """The name nearest to height over width, the first of equally near ones."""
    return min(sizes, key=lambda name: abs(float(name) - height / width))


def _one_size(resolution: str) -> dict[str, Size]:
    match = _ONE_SIZE.fullmatch(resolution)
    if match is None:
        raise ValueError(f"{resolution}: must be a size, height first, as 256x256 or 360x640")
    height, width = int(match[1]), int(match[2])
    if max(height, width) > MAX_RATIO * min(height, width):
        raise ValueError(f"{resolution}: must have a ratio from 1:{MAX_RATIO} to {MAX_RATIO}:1")
    return {f"{height / width:.2f}": (height, width)}


def _of_40(resolution: str, version: Version) -> dict[str, Size]:
    table, factor = _MULTIPLES[resolution]
    found: dict[str, Size] = {}
    for entry in _OF_40[table].split():
        name, _, size = entry.partition("=")
        height, width = _size(size)
        found[name if version == "1.3" else str(float(name))] = (height * factor, width * factor)
    return found


def _size(text: str) -> Size:
    height, _, width = text.partition("x")
    return int(height), int(width)


def _in_order(resolution: str) -> list[str]:
    """Names of the 17 ratios as they are listed: ascending, but for two of them."""
    names = list(RATIO_NAMES.values())
    if resolution in _SWAPPED:
        i, j = map(names.index, _SWAPPED[resolution])
        names[i], names[j] = names[j], names[i]
    return names


def _advice(version: Version) -> str:
    names = ", ".join(resolutions(version))
    return f"must be one of {names}" + (f", or one of these with {_CUT}" if version == "1.3" else "")
