"""Candidates compared on their thumbnails, of which only those are read that are looked at.

First on the few frames that they were found by, for their pictures; what passes is compared on all frames, for what
moves in them.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_pipeline.analysis.hashes import SIDE, WHOLE_SIDE, thumbnails
from data_pipeline.matching.align import Likeness, likeness
from data_pipeline.matching.box import CROPS
from data_pipeline.matching.candidates import MIRRORED, WHOLE, Candidates, Prints, matched
from data_pipeline.matching.clip_list import ClipList
from data_pipeline.matching.motion import motion_within, unexplained_motion
from data_pipeline.stages.base import RowsOf

_MOST_FRAMES = 64  # of a clip, spread over it, that its motion is compared on
_HALF = 0.6  # of an interval, and a little: frames are not taken at even times


class _Thumbnails:
    """Some frames in memory: 1 KB of each."""

    def __init__(self, clips: ClipList, prints: Prints, hashes: np.ndarray, rows_of: RowsOf) -> None:
        """``hashes``: numbers in ``prints``, in any order. They are in order of their clips, and those in order of
        their sources: each source has a run of them."""
        self._wanted = np.unique(hashes)
        self._thumb = np.zeros((len(self._wanted), SIDE, SIDE), np.uint8)
        names, sample = np.array(clips.sources(), object), clips.samples()[self._wanted]
        of_wanted = names[prints.clip[self._wanted]]
        edges = [0, *(np.flatnonzero(of_wanted[1:] != of_wanted[:-1]) + 1), len(of_wanted)]
        runs = {of_wanted[begin]: slice(begin, end) for begin, end in itertools.pairwise(edges) if begin < end}
        for source, rows in rows_of("frames", ("hash_thumb",), runs.keys()):
            run = runs[source]
            self._thumb[run] = thumbnails(rows["hash_thumb"][0].as_py())[sample[run]]

    def of(self, hashes: np.ndarray) -> np.ndarray:
        """(n, 32, 32) uint8."""
        found: np.ndarray = self._thumb[np.searchsorted(self._wanted, hashes)]
        return found


class PictureComparison:
    """Some pairs, by the frames that they were found by: 16 KB of each."""

    def __init__(self, clips: ClipList, prints: Prints, pairs: Candidates, rows_of: RowsOf) -> None:
        self._pairs, self._bars = pairs, clips.bars()
        self._asked, self._partner, self._both = matched(prints, pairs)
        hashes = np.concatenate([self._asked[self._both], self._partner[self._both]])
        self._thumb = _Thumbnails(clips, prints, hashes, rows_of)

    def likeness(self, number: int) -> Likeness | None:
        """Of a pair; None: they do not lie over one another."""
        both, kind = self._both[number], self._pairs.kind[number]
        one, two = (self._thumb.of(side[number, both]) for side in (self._asked, self._partner))
        bars, other_bars = (self._bars[clip] for clip in (self._pairs.clip[number], self._pairs.other[number]))
        if kind == MIRRORED:
            one, bars = one[:, :, ::-1], (bars[0], bars[1], bars[3], bars[2])
        shown = (WHOLE_SIDE, WHOLE_SIDE) if kind in (WHOLE, MIRRORED) else CROPS[kind - 1]
        return likeness(one, two, (bars, other_bars), shown)


@dataclass(frozen=True)
class Motion:
    """What moves in both of a pair."""

    unexplained: float | None  # see ``unexplained_motion``, of the moments that both show
    within: float  # the share of each clip's motion that is in these moments, the lesser of the two


class _Moments:
    """Of a pair, the frames that are compared, as numbers of their hashes."""

    def __init__(self, prints: Prints, clip: int, other: int, offset_ms: int) -> None:
        self.one, self.two = _spread(prints, clip), _spread(prints, other)
        self.nearest, self.shared = _partners(prints, self.one, other, offset_ms)
        self.shared_two = _partners(prints, self.two, clip, -offset_ms)[1]
        wanted = prints.ms[self.one] + offset_ms
        late = wanted > prints.ms[self.nearest]
        inside = (prints.first[other], prints.first[other + 1] - 1)
        self.next = np.clip(self.nearest + np.where(late, 1, -1), *inside)  # on the other side of the moment
        step = prints.ms[self.next] - prints.ms[self.nearest]
        share = (wanted - prints.ms[self.nearest]) / np.where(step == 0, 1, step)
        self.share = np.where(step == 0, 0, np.clip(share, 0, 1))  # of the way from one to the other

    def hashes(self) -> np.ndarray:
        """All of them."""
        return np.concatenate([self.one, self.two, self.nearest, self.next])


def _spread(prints: Prints, clip: int) -> np.ndarray:
    first, end = prints.first[clip], prints.first[clip + 1]
    found: np.ndarray = np.linspace(first, end - 1, min(_MOST_FRAMES, end - first)).round().astype(np.int64)
    return found


def _partners(prints: Prints, hashes: np.ndarray, other: int, offset_ms: int) -> tuple[np.ndarray, np.ndarray]:
    """(the nearest frame of the other clip, whether it shows this moment: it is no further than half an interval)."""
    wanted = prints.ms[hashes] + offset_ms
    nearest, near = prints.nearest(np.full(len(hashes), other), wanted)
    of_other = prints.ms[prints.first[other] : prints.first[other + 1]]
    interval = float(np.median(np.diff(of_other))) if len(of_other) > 1 else 0.0
    return nearest, near & (abs(prints.ms[nearest] - wanted) <= _HALF * interval + 1)


class MotionComparison:
    """Some pairs that lie over one another, by all of their frames: up to 256 KB of each."""

    def __init__(
        self, clips: ClipList, prints: Prints, pairs: Candidates, alike: Sequence[Likeness], rows_of: RowsOf
    ) -> None:
        self._kind, self._alike = pairs.kind, alike
        places = zip(pairs.clip.tolist(), pairs.other.tolist(), pairs.offset_ms.tolist(), strict=True)
        self._moments = [_Moments(prints, *place) for place in places]
        hashes = np.concatenate([np.empty(0, np.int64), *(each.hashes() for each in self._moments)])
        self._thumb = _Thumbnails(clips, prints, hashes, rows_of)

    def motion(self, number: int) -> Motion:
        """Of a pair."""
        moments, mirrored = self._moments[number], self._kind[number] == MIRRORED
        one = self._thumb.of(moments.one)[:, :, :: -1 if mirrored else 1]
        share = moments.share[:, None, None].astype(np.float32)
        partner = (1 - share) * self._thumb.of(moments.nearest) + share * self._thumb.of(moments.next)
        first, second = self._alike[number].lay(one, partner)
        shared, two = moments.shared, self._alike[number].lay(one[:1], self._thumb.of(moments.two))[1]
        within = min(motion_within(first, shared), motion_within(two, moments.shared_two))
        return Motion(unexplained_motion(first[shared], second[shared]), within)
