"""What resolution names mean under each ``data.bucket_rule``: an area, and the sizes that clips are trained at."""

from opensora.datasets.buckets import aspect
from opensora.datasets.buckets.sizes_1x import RULES, area_1x, sizes_1x


def area_of(resolution: str, rule: str) -> int:
    """Nominal pixels per frame.

    Raises:
        ValueError: not a resolution of this rule.
    """
    return area_1x(RULES[rule], resolution) if rule in RULES else aspect.area_of(resolution)


def training_sizes(resolution: str, rule: str, multiple: int) -> tuple[tuple[int, int], ...]:
    """Distinct (height, width), widest first. Those of Open-Sora 1.x are what they are, others are multiples.

    Args:
        multiple: pixels that one token spans on a side.

    Raises:
        ValueError: not a resolution of this rule.
    """
    if rule not in RULES:
        return aspect.training_sizes(resolution, multiple)
    sizes = set(sizes_1x(RULES[rule], resolution).values())
    return tuple(sorted(sizes, key=lambda size: (-size[1] / size[0], size)))
