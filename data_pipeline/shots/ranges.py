"""The clips between transitions: which frames, and their exact times."""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np

from data_pipeline.shots.transitions import Transition


@dataclass(frozen=True)
class Range:
    """Frames [first, last), and what they lie between: start, cut, gradual, divided, end."""

    first: int
    last: int
    transition_in: str
    transition_out: str


@dataclass(frozen=True)
class Times:
    """When the frames of a video are shown."""

    pts: np.ndarray  # (n,) int64, of every frame in order
    base: Fraction  # seconds of a unit

    def at(self, index: int) -> int:
        """When a frame begins; n is the end of the last one, which is shown as long as frames usually are."""
        if index < len(self.pts):
            return int(self.pts[index])
        return int(self.pts[-1]) + max(1, int(np.median(np.diff(self.pts))) if len(self.pts) > 1 else 1)

    def seconds(self, first: int, last: int) -> Fraction:
        """How long frames [first, last) are shown."""
        return (self.at(last) - self.at(first)) * self.base


def ranges_between(transitions: Sequence[Transition], frames: int, margin: int) -> list[Range]:
    """What is left of ``frames`` beside the transitions, which are in order, and ``margin`` frames around each that is
    gradual."""
    found, first, before = [], 0, "start"
    for each in transitions:
        beside = margin if each.kind == "gradual" else 0
        found.append(Range(first, min(each.first - beside, frames), before, each.kind))
        first, before = max(first, each.end + beside), each.kind
    found.append(Range(first, frames, before, "end"))
    return [each for each in found if each.last > each.first]


def divided(each: Range, times: Times, most_s: float | None) -> Iterator[Range]:
    """A range that is longer than ``most_s`` in the fewest equal parts that are not."""
    length = float(times.seconds(each.first, each.last))
    parts = 1 if most_s is None else max(1, math.ceil(length / most_s - 1e-9))
    edges = [each.first + round((each.last - each.first) * part / parts) for part in range(parts + 1)]
    for part in range(parts):
        before = each.transition_in if part == 0 else "divided"
        after = each.transition_out if part == parts - 1 else "divided"
        yield replace(each, first=edges[part], last=edges[part + 1], transition_in=before, transition_out=after)


def clip_row(each: Range, number: int, times: Times, sha256: str) -> dict[str, Any]:
    """Columns of one clip: see ``ShotsStage``."""
    start, end, origin = times.at(each.first), times.at(each.last), times.at(0)
    return {
        "clip_id": clip_id(sha256, start * times.base, end * times.base),
        "clip": number,
        "first": each.first,
        "last": each.last,
        "start_pts": start,
        "end_pts": end,
        "time_base": str(times.base),
        "start_s": float((start - origin) * times.base),
        "end_s": float((end - origin) * times.base),
        "fps": float((each.last - each.first) / ((end - start) * times.base)),
        "num_frames": each.last - each.first,
        "transition_in": each.transition_in,
        "transition_out": each.transition_out,
    }


def clip_id(sha256: str, start: Fraction, end: Fraction) -> str:
    """16 hex digits: alike for the same frames of the same file, wherever it lies and whatever found them.

    Args:
        start, end: seconds on the file's own clock.
    """
    return hashlib.blake2b(f"{sha256} {start} {end}".encode(), digest_size=8).hexdigest()
