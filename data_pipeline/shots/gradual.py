"""A second opinion: transitions that take a while, which no two neighbouring frames tell.

Every stretch of a third of a second to two seconds is asked three questions. Do its ends show something else, wherever
the view has moved and however the light has changed? Does the picture stay as it is before and after? And is what lies
between made of both ends: a mix of them (a dissolve), one of them at each place (a wipe), or nothing (a fade)? Motion,
a passer-by or a camera that swings give other answers to one of them at least. The numbers were set on the tuning half
of the labelled clips: ``python -m benchmarks.shots``.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from data_pipeline.shots.thumbs import Thumbs, likeness
from data_pipeline.shots.transitions import Transition

_LENGTHS_S = (0.35, 0.5, 0.7, 1.0, 1.4, 2.0)  # of the stretches
_LEAST = 3  # thumbnails that a stretch moves on by
_MOMENTS = (0.2, 0.35, 0.5, 0.65, 0.8)  # of a stretch, at which it is compared with its ends
_CHUNK = 1024  # thumbnails at once: 20 MiB

_OTHER_LEVEL = 20.0  # grey levels, the mean difference of both ends
_OTHER_PLACE, _OTHER_PLACES = 20.0, 0.65  # grey levels besides the light's, and the share of places that differ by them
_BRIGHT = 80.0  # of a stretch whose brighter places are darker, those two count in proportion
_CORRELATED = 0.6  # ends above show the same
_ALIKE = 0.77  # the same where the view may have moved
_RETURNED, _RETURN_S = 0.9, 0.7  # likeness of two moments of one shot, that far before and after
_STEADY = 1.0  # of the ends' difference: what the picture changes by before and after
_ABRUPT = 0.6  # of all change: what one step makes of it; above it is a cut
_MIXED, _EITHER = 0.35, 0.25  # of the ends' difference: how far from a mix, from one of both at each place
_UNDONE = 0.08  # of all places: those that go back from the second shot to the first between two moments
_WAY = 2.2  # times the ends' difference: what a wipe changes by in all
_PROGRESS = 0.3  # of the way from one end to the other, made within the stretch
_FLAT, _TEXTURED = 6.0, 12.0  # grey levels of variation: of a faded picture, and of shots
_LEFT = 0.15  # of its most: how much a picture differs from an end that it has left


def gradual_transitions(thumbs: Thumbs, cuts: Sequence[int]) -> list[Transition]:
    """In order of time.

    Args:
        cuts: first frames of shots, which no stretch reaches over.
    """
    edges = [0, *np.searchsorted(thumbs.frames, np.asarray(cuts, dtype=np.int64)).tolist(), len(thumbs)]
    found = list[Transition]()
    for first, end in pairwise(edges):
        part = thumbs.part(first, end)
        for start, stop in _chosen(part, sorted(_stretches(part))):
            found.append(_placed(part, start, stop))
    return found


def _chosen(thumbs: Thumbs, stretches: list[tuple[float, int, int]]) -> Iterator[tuple[int, int]]:
    """The best stretch (the last one) of those that overlap, if its ends do not show the same."""
    taken: list[tuple[int, int]] = []
    for _, start, stop in reversed(stretches):
        if any(start < end and first < stop for first, end in taken):
            continue
        if likeness(thumbs.pictures[start], thumbs.pictures[stop]) < _ALIKE and not _returns(thumbs, start, stop):
            taken.append((start, stop))
    yield from sorted(taken)


def _returns(thumbs: Thumbs, start: int, stop: int) -> bool:
    """Whether some moment after it shows what one before it showed: somebody went past."""
    first = int(np.searchsorted(thumbs.seconds, thumbs.seconds[start] - _RETURN_S))
    last = int(np.searchsorted(thumbs.seconds, thumbs.seconds[stop] + _RETURN_S, side="right"))
    before, after = range(first, start + 1, 2), range(stop, last, 2)
    return any(likeness(thumbs.pictures[a], thumbs.pictures[b]) > _RETURNED for a in before for b in after)


def _placed(thumbs: Thumbs, start: int, stop: int) -> Transition:
    """From where the first shot is left to where the second is reached."""
    pictures = thumbs.pictures[start : stop + 1].astype(np.float32)
    from_a = np.abs(pictures - pictures[0]).mean(axis=(1, 2, 3))
    from_b = np.abs(pictures - pictures[-1]).mean(axis=(1, 2, 3))
    left = int(np.argmax(from_a > _LEFT * from_a.max()))
    reached = len(from_b) - int(np.argmax(from_b[::-1] > _LEFT * from_b.max()))
    first, end = start + max(0, left - 1), min(stop, start + reached)
    return Transition("gradual", int(thumbs.frames[first]) + 1, int(thumbs.frames[end]))


def _stretches(thumbs: Thumbs) -> Iterator[tuple[float, int, int]]:
    """(how much speaks for it, first thumbnail, last) of all that could be a transition."""
    for begin in range(0, len(thumbs), _CHUNK):
        far = int(np.searchsorted(thumbs.seconds, thumbs.seconds[min(begin + _CHUNK, len(thumbs)) - 1] + 4.0))
        early = int(np.searchsorted(thumbs.seconds, thumbs.seconds[begin] - 2.0))
        part = thumbs.part(early, far)
        views = _Views(part)
        for length in _LENGTHS_S:
            i = np.arange(begin - early, min(begin + _CHUNK, len(thumbs)) - early)
            j = np.searchsorted(part.seconds, part.seconds[i] + length - 1e-6)
            there = (j < len(part)) & (j - i >= _LEAST)
            i, j = i[there], j[there]
            if len(i):
                weight = views.weight(i, j)
                good = weight > 0
                yield from zip(
                    weight[good].tolist(), (i[good] + early).tolist(), (j[good] + early).tolist(), strict=True
                )


class _Views:
    """Thumbnails as numbers; i and j below are (m,) indices of the first and last one of m stretches."""

    def __init__(self, thumbs: Thumbs) -> None:
        n = len(thumbs)
        places = thumbs.pictures.reshape(n, -1, 3).astype(np.float32)  # (n, places, 3)
        self.flat = places.reshape(n, -1)
        self.unlit = places - np.median(places, axis=1, keepdims=True)
        self.centred = (places - places.mean(axis=1, keepdims=True)).reshape(n, -1)
        self.energy = (self.centred**2).mean(axis=1)
        self.dim = np.clip(np.quantile(self.flat, 0.95, axis=1) / _BRIGHT, 0.2, 1.0)
        self.steps = np.concatenate([[0.0], np.abs(np.diff(self.flat, axis=0)).mean(axis=1)])
        self.way = np.cumsum(self.steps)

    def distance(self, i: np.ndarray, j: np.ndarray) -> np.ndarray:
        return np.asarray(np.abs(self.flat[i] - self.flat[j]).mean(axis=1))

    def weight(self, i: np.ndarray, j: np.ndarray) -> np.ndarray:
        """(m,), 0 where it is no transition."""
        weight = np.zeros(len(i))
        likely = np.flatnonzero(self.distance(i, j) > _OTHER_LEVEL * np.maximum(self.dim[i], self.dim[j]))
        likely = likely[self._are_other(i[likely], j[likely]) & self._are_steady(i[likely], j[likely])]
        if len(likely):
            weight[likely] = self._between(i[likely], j[likely])
        return weight

    def _are_other(self, i: np.ndarray, j: np.ndarray) -> np.ndarray:
        """Whether the ends show something else."""
        contrast = np.sqrt((self.energy[j] + 1.0) / (self.energy[i] + 1.0))
        contrast = np.where((contrast > 0.5) & (contrast < 2.0), contrast, 1.0)[:, None, None]
        unlit = np.abs(self.unlit[i] * contrast - self.unlit[j]).max(axis=2)
        places = np.minimum(unlit, np.abs(self.flat[i] - self.flat[j]).reshape(*unlit.shape, 3).max(axis=2))
        product = (self.centred[i] * self.centred[j]).mean(axis=1)
        correlation = product / np.sqrt(self.energy[i] * self.energy[j] + 1e-3)
        other = (places > _OTHER_PLACE * np.maximum(self.dim[i], self.dim[j])[:, None]).mean(axis=1)
        less, more = np.minimum(self.energy[i], self.energy[j]), np.maximum(self.energy[i], self.energy[j])
        is_empty = (less < _FLAT**2) & (more > _TEXTURED**2)  # one of them is black, or white
        return np.asarray(is_empty | (other > _OTHER_PLACES) & (correlation < _CORRELATED))

    def _are_steady(self, i: np.ndarray, j: np.ndarray) -> np.ndarray:
        """Whether little happens before and after, and no step is all of it."""
        reach = np.minimum(j - i, 6)
        most = _STEADY * self.distance(i, j)
        before = self.distance(np.maximum(i - reach, 0), i)
        after = self.distance(j, np.minimum(j + reach, len(self.flat) - 1))
        largest = np.array([self.steps[a + 1 : b + 1].max() for a, b in zip(i, j, strict=True)])
        return np.asarray((before < most) & (after < most) & (largest < _ABRUPT * (self.way[j] - self.way[i])))

    def _between(self, i: np.ndarray, j: np.ndarray) -> np.ndarray:
        """The ends' difference, less what lies between is explained by both; 0 where it is not."""
        a, b, apart = self.flat[i], self.flat[j], self.distance(i, j)
        mixed, either, faded = np.zeros(len(i)), np.zeros(len(i)), np.full(len(i), np.inf)
        shares, arrived = [], []
        for moment in _MOMENTS:
            between = np.clip(np.round(i + (j - i) * moment).astype(int), i + 1, j - 1)
            seen = self.flat[between]
            share = ((seen - a) * (b - a)).sum(axis=1) / (((b - a) ** 2).sum(axis=1) + 1.0)
            shares.append(np.clip(share, 0.0, 1.0))
            mix = a + shares[-1][:, None] * (b - a)
            mixed = np.maximum(mixed, np.abs(seen - mix).mean(axis=1) / apart)
            arrived.append(np.abs(seen - b) < np.abs(seen - a))
            either = np.maximum(either, np.minimum(np.abs(seen - a), np.abs(seen - b)).mean(axis=1) / apart)
            faded = np.minimum(faded, self.energy[between])
        onwards = (np.diff(shares, axis=0).min(axis=0) > -0.05) & (shares[-1] - shares[0] > _PROGRESS)
        undone = np.max([(before & ~after).mean(axis=1) for before, after in pairwise(arrived)], axis=0)
        is_wipe = onwards & (either < _EITHER) & (undone < _UNDONE) & (self.way[j] - self.way[i] < _WAY * apart)
        is_mix = onwards & (mixed < _MIXED) & (either > _EITHER)
        is_fade = (faded < _FLAT**2) & (np.minimum(self.energy[i], self.energy[j]) > _TEXTURED**2)
        rest = np.where(is_fade, 0.0, np.where(is_wipe, either, mixed))
        return np.where(is_fade | is_wipe | is_mix, apart * (1.0 - rest), 0.0)
