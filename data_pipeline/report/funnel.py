"""How many clips and hours are left behind each filter."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from data_pipeline.report.clips import Clips
from data_pipeline.stages.filter import FilterRule


@dataclass(frozen=True)
class Amount:
    """Clips, and how long they are together."""

    clips: int
    seconds: float


@dataclass(frozen=True)
class Step:
    """One filter."""

    name: str
    rule: FilterRule | None  # None: a later stage that had nothing for the clip, such as a caption
    left: Amount  # behind it
    dropped: Amount  # here, which all filters before it let pass
    rejects: Amount  # of all clips, whatever others say
    alone: Amount  # that no other filter rejects: what would come back without it


def amount(clips: Clips, chosen: np.ndarray) -> Amount:
    """Of the clips for which ``chosen`` (n,) is true."""
    return Amount(int(chosen.sum()), float(clips.seconds[chosen].sum()))


def funnel(clips: Clips) -> list[Step]:
    """The filters in the order in which they were asked."""
    left, found = np.ones(len(clips), dtype=bool), []
    for name in clips.rejecting:
        rule = clips.filters.get(name)
        first, rejected = clips.first[name], clips.rejected[name]
        left = left & ~first
        amounts = (left, first, rejected, rejected & (clips.rejections == 1))
        found.append(Step(name, rule, *(amount(clips, chosen) for chosen in amounts)))
    return found


def in_words(rule: FilterRule | None) -> str:
    """A rule as a person would say it: duration_s >= 2."""
    if rule is None:
        return "of a later stage"
    parts = []
    if rule.min is not None and rule.max is not None:
        parts.append(f"{rule.min:g} <= {rule.column} <= {rule.max:g}")
    elif rule.min is not None:
        parts.append(f"{rule.column} >= {rule.min:g}")
    elif rule.max is not None:
        parts.append(f"{rule.column} <= {rule.max:g}")
    parts += _of_values(rule)
    if rule.present == "reject":
        parts.append(f"no {rule.column}")
    if rule.missing == "reject":
        parts.append(f"{rule.column} is there")
    return ", ".join(parts)


def _of_values(rule: FilterRule) -> list[str]:
    def words(values: tuple[str | bool, ...]) -> str:
        return " or ".join(str(value).lower() if isinstance(value, bool) else value for value in values)

    parts = []
    if rule.allow is not None:
        parts.append(f"{rule.column} is {words(rule.allow)}")
    if rule.forbid:
        parts.append(f"{rule.column} is not {words(rule.forbid)}")
    return parts


SIZES = (
    (0, "below 240p"),
    (240, "240p"),
    (360, "360p"),
    (480, "480p"),
    (720, "720p"),
    (1080, "1080p"),
    (2160, "2160p"),
)
LENGTHS = ((0, "< 2 s"), (2, "2-4 s"), (4, "4-8 s"), (8, "8-16 s"), (16, "16-32 s"), (32, ">= 32 s"))
SHAPES = ((0.0, "tall"), (0.7, "square"), (1.2, "4:3"), (1.55, "16:9"), (1.9, "wide"))  # width over height, from


def grid(clips: Clips) -> Mapping[tuple[str, str], np.ndarray]:
    """(shape, size) -> (LENGTHS,) how many kept clips; only what there is, in order."""
    tall, wide = clips.final("height"), clips.final("width")
    size, shape = _class_of(np.minimum(tall, wide), SIZES), _class_of(wide / tall, SHAPES)
    long = _class_of(clips.seconds, LENGTHS)
    found = {}
    for a, (_, name) in enumerate(SHAPES):
        for b, (_, height) in enumerate(SIZES):
            chosen = clips.keep & (shape == a) & (size == b)
            if chosen.any():
                found[name, height] = np.bincount(long[chosen], minlength=len(LENGTHS))
    return found


def _class_of(values: np.ndarray, classes: tuple[tuple[float, str], ...]) -> np.ndarray:
    """(n,) which class each is in; what is unknown is in the first."""
    return np.maximum(np.searchsorted([least for least, _ in classes], np.nan_to_num(values), side="right") - 1, 0)
