"""Pairs of clips that may show the same footage, by their hashes alone, in about n log n steps.

All hashes are sorted four times, each time with other 16 bits of the 64 in front, and each is compared with the few
behind it: two that differ in a few bits are neighbours in one of these orders unless a difference stands in front in
each. One frame of a clip that finds a partner is enough, and there are eight and more. That a hash is common (the same
title, the same empty room) costs no more than that it is rare.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from data_pipeline.analysis.hashes import distances, mirrored_hash
from data_pipeline.matching.box import CROPS

WHOLE, MIRRORED = 0, len(CROPS) + 1  # what a clip is compared as; between them a number in CROPS, from 1
_KINDS = len(CROPS) + 2
_REACH = 10  # bits of two hashes that may be of one moment
_WIDE = 16  # the same before offsets are refined
_BLOCK = 100_000  # pairs that are compared at once
_NEIGHBOURS = 8
_STEP_MS = 125  # offsets in time that are told apart
_SHIFTS_MS = (0, -42, 42, -84, 84)  # about these
_FEW_MS = 250  # between hashes of one clip that are entered
_TRIED = 6  # offsets of a pair, those that most frames speak for
_KEPT = 4  # ways to lay two clips over one another that are worth confirming
_NEAREST_MS = 250  # further away there is no frame to compare with


@dataclass
class Prints:
    """Hashes of n clips, those of one clip together and in order of time."""

    first: np.ndarray  # (n + 1,) int64: where those of each clip begin
    ms: np.ndarray  # (all,) int64
    bits: np.ndarray  # (all,) uint64
    asked: np.ndarray  # (n, 8) int64: numbers in these two; -1: none
    crops: np.ndarray  # (n, 8, 5) uint64: of the same frames
    length_ms: np.ndarray  # (n,) int64: of the clips

    def __post_init__(self) -> None:
        self.clip = np.repeat(np.arange(len(self.first) - 1), np.diff(self.first))  # (all,)
        self._time = self.clip * _FAR + self.ms

    def nearest(self, clip: np.ndarray, ms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(the number of the hash of a clip that is nearest to a time, whether there is one near it)."""
        wanted = clip * _FAR + ms
        behind = np.clip(np.searchsorted(self._time, wanted), 0, len(self._time) - 1)
        before = np.maximum(behind - 1, 0)
        found = np.where(abs(self._time[before] - wanted) <= abs(self._time[behind] - wanted), before, behind)
        return found, abs(self._time[found] - wanted) <= _NEAREST_MS


_FAR = 1 << 34  # ms, half a year: times of another clip are never near


class Candidates(NamedTuple):
    """m pairs, the likeliest first."""

    clip: np.ndarray  # (m,): as what ``kind`` says
    other: np.ndarray  # (m,): whole
    kind: np.ndarray  # (m,)
    offset_ms: np.ndarray  # (m,): what is at t in ``clip`` is at t + offset in ``other``
    distance: np.ndarray  # (m,) float64: the mean of up to 8 frames

    def at(self, rows: np.ndarray | slice) -> "Candidates":
        """Some of them."""
        return Candidates(*(column[rows] for column in self))

    def within(self, reach: float) -> "Candidates":
        """Those that are no further apart."""
        return self.at(np.flatnonzero(self.distance <= reach))


def find_candidates(prints: Prints, *, overlap: float) -> Candidates:
    """Pairs of which most of the eight frames of one have a like one in the other, at one offset.

    Args:
        overlap: the least share of the longer clip that both must show.
    """
    votes = [_votes(prints, *pairs) for pairs in _neighbours(*_entries(prints))]
    clip, other, kind, offset, count = _counted(votes, len(prints.length_ms))
    strong = np.arange(len(clip))
    strong = strong[_rank((kind == MIRRORED, other, clip), (-count,), strong) < _TRIED]
    voted = Candidates(clip, other, kind, offset, np.zeros(len(clip))).at(strong)
    near = _measured(prints, voted, overlap).within(_WIDE)
    # hashes of a clip in which little moves say little about time, and most copies begin where the original does
    shifted = [near._replace(offset_ms=near.offset_ms + shift) for shift in _SHIFTS_MS]
    shifted.append(near._replace(offset_ms=0 * near.offset_ms))
    every = Candidates(*(np.concatenate(columns) for columns in zip(*shifted, strict=True)))
    return _best(prints, _measured(prints, every, overlap).within(_REACH))


def _measured(prints: Prints, pairs: Candidates, overlap: float) -> Candidates:
    """With their distances; infinite where they share too little."""
    blocks = np.array_split(np.arange(len(pairs.clip)), len(pairs.clip) // _BLOCK + 1)
    distance = [_mean_distance(prints, pairs.at(block)) for block in blocks]
    shared = _overlap(prints, pairs) >= overlap
    return pairs._replace(distance=np.where(shared, np.concatenate(distance), np.inf))


def _entries(prints: Prints) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(bits, clip, ms, kind) of all that is sorted: whole pictures a few times a second, others of the eight frames."""
    few = np.ones(len(prints.ms), bool)
    few[1:] = (prints.clip[1:] != prints.clip[:-1]) | (prints.ms[1:] // _FEW_MS != prints.ms[:-1] // _FEW_MS)
    clip, slot = np.nonzero(prints.asked >= 0)
    asked = prints.asked[clip, slot]
    bits = [prints.bits[few], *prints.crops[clip, slot].T, mirrored_hash(prints.bits[asked])]
    ms = [prints.ms[few], *[prints.ms[asked]] * (_KINDS - 1)]
    clips = [prints.clip[few], *[clip] * (_KINDS - 1)]
    kind = np.repeat(np.arange(_KINDS), [len(part) for part in bits])
    columns = np.concatenate(bits), np.concatenate(clips), np.concatenate(ms), kind
    order = np.lexsort((columns[2], columns[3], columns[1], columns[0]))
    columns = tuple(column[order] for column in columns)  # type: ignore[assignment]
    again = np.zeros(len(order), bool)  # a clip that stands still has one hash for all of its frames
    again[1:] = np.logical_and.reduce([columns[i][1:] == columns[i][:-1] for i in (0, 1, 3)])
    return tuple(column[~again] for column in columns)  # type: ignore[return-value]


def _neighbours(bits: np.ndarray, *columns: np.ndarray) -> Iterator[tuple[np.ndarray, ...]]:
    """(clip, ms, kind) of one and of another entry that are alike, in each of four orders."""
    clip, _, kind = columns
    for turn in range(0, 64, 16):
        turned = bits if turn == 0 else (bits << np.uint64(turn)) | (bits >> np.uint64(64 - turn))
        order = np.argsort(turned, kind="stable")
        for step in range(1, min(_NEIGHBOURS, len(order) - 1) + 1):
            one, two = order[:-step], order[step:]
            alike = (distances(bits[one], bits[two]) <= _REACH) & (clip[one] != clip[two])
            alike &= (kind[one] == WHOLE) | (kind[two] == WHOLE)
            one, two = one[alike], two[alike]
            yield (*(column[one] for column in columns), *(column[two] for column in columns))


def _votes(prints: Prints, *pair: np.ndarray) -> np.ndarray:
    """One number for each pair of entries: clips, kind and offset, with the clip that is not whole in front; of two
    whole ones, and of two of which either may be the mirrored one, that with the smaller number."""
    clip, ms, kind, other, other_ms, other_kind = pair
    swap = (other_kind != WHOLE) & (other_kind != MIRRORED)
    either = ((kind == WHOLE) | (kind == MIRRORED)) & ~swap
    swap |= either & (other < clip)
    clip, other = np.where(swap, other, clip), np.where(swap, clip, other)
    ms, other_ms = np.where(swap, other_ms, ms), np.where(swap, ms, other_ms)
    step = np.rint((other_ms - ms) / _STEP_MS).astype(np.int64) + _OFFSETS // 2
    number = (clip * len(prints.length_ms) + other) * _KINDS + np.maximum(kind, other_kind)
    return number * _OFFSETS + np.clip(step, 0, _OFFSETS - 1)


_OFFSETS = 1 << 16  # more than an hour each way


def _counted(votes: list[np.ndarray], clips: int) -> tuple[np.ndarray, ...]:
    """(clip, other, kind, offset in ms, how many votes) of all that are different."""
    code, count = np.unique(np.concatenate(votes) if votes else np.empty(0, np.int64), return_counts=True)
    pair, step = np.divmod(code, _OFFSETS)
    pair, kind = np.divmod(pair, _KINDS)
    clip, other = np.divmod(pair, max(clips, 1))
    return clip, other, kind, (step - _OFFSETS // 2) * _STEP_MS, count


def matched(prints: Prints, pairs: Candidates) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """((m, 8) hashes of ``clip``, (m, 8) those of ``other`` at the same moments, (m, 8) whether both are there)."""
    asked = prints.asked[pairs.clip]
    other = np.broadcast_to(pairs.other[:, None], asked.shape)
    partner, near = prints.nearest(other, prints.ms[asked] + pairs.offset_ms[:, None])
    return asked, partner, near & (asked >= 0)


def _mean_distance(prints: Prints, pairs: Candidates) -> np.ndarray:
    """(m,) of the frames that both have; infinite where that are less than half of them."""
    asked, partner, both = matched(prints, pairs)
    whole = prints.bits[asked]
    as_what = np.where((pairs.kind == MIRRORED)[:, None], mirrored_hash(whole), whole)
    crops = (pairs.kind != WHOLE) & (pairs.kind != MIRRORED)
    as_what[crops] = prints.crops[pairs.clip[crops], :, pairs.kind[crops] - 1]
    total = (distances(as_what, prints.bits[partner]) * both).sum(axis=1)
    enough = both.sum(axis=1) * 2 >= np.maximum((asked >= 0).sum(axis=1), 1)
    return np.where(enough, total / np.maximum(both.sum(axis=1), 1), np.inf)


def _overlap(prints: Prints, pairs: Candidates) -> np.ndarray:
    one, two = prints.length_ms[pairs.clip], prints.length_ms[pairs.other]
    shown = np.minimum(one, two - pairs.offset_ms) - np.maximum(0, -pairs.offset_ms)
    share: np.ndarray = shown / np.maximum(np.maximum(one, two), 1)
    return share


def _best(prints: Prints, found: Candidates) -> Candidates:
    """The best few ways of each two clips, mirrored or not, and in order; none whose frames are those of a better one.
    That with the least offset is one of them."""
    low, high = np.minimum(found.clip, found.other), np.maximum(found.clip, found.other)
    mirrored, late = found.kind == MIRRORED, abs(found.offset_ms)
    partner = matched(prints, found)[1]
    frames = (partner * np.arange(1, 2 * partner.shape[1], 2) ** 7).sum(axis=1) * _KINDS + found.kind
    every = np.arange(len(low))
    new = every[_rank((frames, high, low), (found.distance, late), every) == 0]
    by_distance = _rank((mirrored, high, low), (found.distance, late), new)
    by_offset = _rank((mirrored, high, low), (late, found.distance), new)
    kept = new[(by_distance < _KEPT) | (by_offset == 0)]
    order = np.lexsort([key[kept] for key in (late, found.kind, high, low, mirrored, found.distance)])
    return found.at(kept[order])


def _rank(group: Sequence[np.ndarray], by: Sequence[np.ndarray], of: np.ndarray) -> np.ndarray:
    """Which place each of these rows has in its group, from 0, in order of ``by``, the first of which counts most."""
    keys = [key[of] for key in group]
    order = np.lexsort([*(key[of] for key in reversed(by)), *keys])
    begins = np.ones(len(order), bool)
    begins[1:] = np.logical_or.reduce([key[order[1:]] != key[order[:-1]] for key in keys])
    first = np.flatnonzero(begins)
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order)) - np.repeat(first, np.diff(np.append(first, len(order))))
    return rank
