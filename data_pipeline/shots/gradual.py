"""A second opinion: transitions that take a while, which no two neighbouring frames tell.

Stretches of a third of a second to two seconds are asked: do the ends show something else, wherever the view has moved
and however the light has changed? Does the picture stay as it is before and after? And is what lies between made of
both ends: a mix of them (a dissolve), one of them at each place (a wipe), or nothing (a fade)? What ``views`` measures
of that is weighed by a sum for dissolves and one for wipes. Their weights were fitted to clips drawn like the tuning
half of the labelled ones, of other numbers and with none of the other half's footage: ``benchmarks.shots_fit`` makes
them, and ``benchmarks.shots`` tells what they are worth on the other half.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from data_pipeline.shots.thumbs import Thumbs, likeness
from data_pipeline.shots.transitions import Transition
from data_pipeline.shots.views import MEASURES, Ends, Views

LENGTHS_S = (0.35, 0.5, 0.7, 1.0, 1.4, 2.0)  # of the stretches
LEAST = 3  # thumbnails that a stretch moves on by
_CHUNK = 1024  # thumbnails at once: some 20 MiB
_CHUNK_S = 2.5  # that are looked at beside them

# Weights of what is measured, in the order of MEASURES, and what is added to their sum.
DISSOLVE = ((-8.27, 14.54, 12.96, -1.01, -1.21, 5.98, -10.80, -5.14, 0.13, -2.27, 1.05), -5.05)
WIPE = ((8.79, -25.35, 14.98, -4.04, -0.74, 3.00, -4.83, -8.52, 0.81, -1.33, -1.19), 1.39)
_SURE = 0.0  # what a sum must be above
_FADE = 8.0  # what counts for a fade: more than either half of it
_WAIT = 0.1  # what is taken off for every thumbnail: of two, the shorter stretch is placed better
_ALIKE, _STEP, _KEPT = (MEASURES.index(name) for name in ("alike", "step", "kept"))
_CERTAIN = 10.0  # above, nobody who went past is looked for

# What is not weighed at all.
_APART = 6.0  # grey levels that ends differ by at least
_STEADY, _ABRUPT = 1.5, 0.65  # of ``steadiness`` and ``abruptness``, the most
_BACK, _PROGRESS = -0.08, 0.25  # of ``progress``, the least
_MIXED, _EITHER, _EITHER_OF_MIXED = 0.5, 0.35, 0.9  # the most; a wipe is nearer to either than to a mix
_MOST_KEPT = 0.45  # of ``kept``
_GONE = 0.35  # the same of a fade to black, or from it
_FADE_APART, _FADE_ALIKE = 12.0, 0.17  # of ends with a fade between
_FADE_STEP = 0.3  # of all change, in one step: more is a flash

_RETURNED, _RETURN_S = 0.9, 0.7  # likeness of two moments of one shot, that far before and after
_LEFT = 0.15  # of its most: how much a picture differs from an end that it has left


def gradual_transitions(thumbs: Thumbs, cuts: Sequence[int]) -> list[Transition]:
    """In order of time.

    Args:
        thumbs: without flashes.
        cuts: first frames of shots, which no stretch reaches over.
    """
    edges = [0, *np.searchsorted(thumbs.frames, np.asarray(cuts, dtype=np.int64)).tolist(), len(thumbs)]
    found = list[Transition]()
    for first, end in pairwise(edges):
        part = thumbs.part(first, end)
        for start, stop in _chosen(part, sorted(_stretches(part))):
            found.append(_placed(part, start, stop))
    return found


def _chosen(thumbs: Thumbs, stretches: list[tuple[float, int, int]]) -> list[tuple[int, int]]:
    """The best stretch (the last one) of those that overlap, if nothing comes back after it."""
    taken: list[tuple[int, int]] = []
    for sure, start, stop in reversed(stretches):
        if any(start < end and first < stop for first, end in taken):
            continue
        if sure > _CERTAIN or not _returns(thumbs, start, stop):
            taken.append((start, stop))
    return sorted(taken)


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
    """(how sure it is, first thumbnail, last) of all that could be a transition."""
    for begin in range(0, len(thumbs), _CHUNK):
        end = min(begin + _CHUNK, len(thumbs))
        early = int(np.searchsorted(thumbs.seconds, thumbs.seconds[begin] - _CHUNK_S))
        late = int(np.searchsorted(thumbs.seconds, thumbs.seconds[end - 1] + 2 * _CHUNK_S))
        views = Views(thumbs.part(early, late))
        for ends in all_ends(views, begin - early, end - early):
            sure = sureness(views, ends)
            for which in np.flatnonzero(sure > 0).tolist():
                yield float(sure[which]), int(ends.i[which]) + early, int(ends.j[which]) + early


def all_ends(views: Views, first: int, end: int) -> Iterator[Ends]:
    """Of each length, the stretches that begin with thumbnails [first, end)."""
    seconds = views.thumbs.seconds
    for length in LENGTHS_S:
        i = np.arange(first, end)
        j = np.searchsorted(seconds, seconds[i] + length - 1e-6)
        there = (j < len(seconds)) & (j - i >= LEAST)
        yield Ends(i[there], j[there])


def sureness(views: Views, ends: Ends) -> np.ndarray:
    """(m,) how much speaks for a transition; 0 where it is none."""
    sure = np.zeros(len(ends))
    likely = possible(views, ends)
    if not len(likely):
        return sure
    asked = ends.only(likely)
    measured = views.measure(asked)
    dissolves, wipes = are_kinds(views, asked, measured)
    gone = views.come_or_go(asked) & (measured[:, MEASURES.index("mixed")] < _GONE)
    fades = views.fades(asked) & (views.apart(asked) > _FADE_APART)
    fades &= measured[:, _STEP] < _FADE_STEP
    still = np.flatnonzero((dissolves | wipes) & (_weighed(measured, wipes) > _SURE) | fades)
    measured[still, _ALIKE] = views.alike(asked.only(still))  # it counts against a transition, never for one
    weighed = _weighed(measured, wipes)
    found = np.where((dissolves | wipes) & (weighed > _SURE) & (measured[:, _KEPT] < _MOST_KEPT), weighed, 0.0)
    fades &= measured[:, _ALIKE] < _FADE_ALIKE
    found = np.where(gone | fades, np.maximum(found, _FADE), found)
    sure[likely] = np.where(found > 0, np.maximum(found - _WAIT * (asked.j - asked.i), 1e-3), 0.0)
    return sure


def possible(views: Views, ends: Ends) -> np.ndarray:
    """Indices of the stretches whose ends differ, that are steady before and after, and do not change in one step."""
    likely = np.flatnonzero(views.apart(ends) > _APART)
    for asked, most in ((views.steadiness, _STEADY), (views.abruptness, _ABRUPT)):
        likely = likely[asked(ends.only(likely)) < most] if len(likely) else likely
    return likely


def are_kinds(views: Views, ends: Ends, measured: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(m,) each: what could be a dissolve, and what could be a wipe; it goes on from one end to the other."""
    mixed, either = (measured[:, MEASURES.index(name)] for name in ("mixed", "either"))
    back, all_of_it = views.progress(ends)
    onwards = (back > _BACK) & (all_of_it > _PROGRESS)
    wipes = onwards & (either < np.minimum(_EITHER, _EITHER_OF_MIXED * mixed))
    return onwards & (mixed < _MIXED) & ~wipes, wipes


def _weighed(measured: np.ndarray, wipes: np.ndarray) -> np.ndarray:
    """(m,) the sum of its kind."""
    as_wipe, as_dissolve = (measured @ np.array(weights) + bias for weights, bias in (WIPE, DISSOLVE))
    return np.asarray(np.where(wipes, as_wipe, as_dissolve))
