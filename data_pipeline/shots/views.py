"""What tells a transition that takes a while from all else: measurements of stretches between two thumbnails."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_pipeline.shots.thumbs import Thumbs, likeness

MEASURES = (
    "mixed",
    "either",
    "undone",
    "beside",
    "detour",
    "other",
    "alike",
    "step",
    "apart",
    "veiled",
    "kept",
)
_MOMENTS = (0.2, 0.35, 0.5, 0.65, 0.8)  # of a stretch, at which it is compared with its ends
_REACH = 6  # thumbnails at most, that are looked at before and after a stretch
_CHANCE = 0.6  # likeness of soft pictures of other things
_PLACE, _PLACE_CONTRAST = 20.0, 0.5  # grey levels by which a place differs, or this share of the contrast, the smaller
_GAIN = 2.0  # that exposure may change by
_SAME, _SAME_CONTRAST = 8.0, 0.25  # grey levels within which a place is the same, or this share of the contrast
_DARK, _BRIGHT = 25.0, 230.0  # grey levels beyond which that says nothing
_NOISE = 6.0  # grey levels
_EMPTY, _TEXTURED = 2.0, 8.0  # grey levels of variation: of black or another one colour, and of a shot
_FLAT, _FADED = 6.0, 0.3  # the same of a picture that has faded, in grey levels and of the shots' own


@dataclass(frozen=True)
class Ends:
    """Of m stretches: the thumbnails at their ends, (m,) indices each."""

    i: np.ndarray
    j: np.ndarray

    def __len__(self) -> int:
        return len(self.i)

    def only(self, which: np.ndarray) -> "Ends":
        """Those of a mask or of indices."""
        return Ends(self.i[which], self.j[which])


class Views:
    """Thumbnails of a part of a video, as numbers."""

    def __init__(self, thumbs: Thumbs) -> None:
        self.thumbs = thumbs
        n, height, width, _ = thumbs.pictures.shape
        places = thumbs.pictures.reshape(n, height * width, 3).astype(np.float32)
        light = np.median(places.mean(axis=2), axis=1)
        centred = places - places.mean(axis=1, keepdims=True)
        self.flat = places.reshape(n, -1)
        self.unlit = places - light[:, None, None]
        self.light = light
        self.soft = places.reshape(n, height // 2, 2, width // 2, 2, 3).mean(axis=(2, 4)).reshape(n, -1)
        self.energy = (centred**2).mean(axis=(1, 2))
        self.steps = np.concatenate([[0.0], np.abs(np.diff(self.flat, axis=0)).mean(axis=1)])
        self.way = np.cumsum(self.steps)

    def apart(self, ends: Ends) -> np.ndarray:
        """(m,) mean difference of both ends, in grey levels."""
        return np.asarray(np.abs(self.flat[ends.i] - self.flat[ends.j]).mean(axis=1))

    def steadiness(self, ends: Ends) -> np.ndarray:
        """(m,) what the picture changes by before or after, of the ends' difference."""
        reach = np.minimum(ends.j - ends.i, _REACH)
        before = self.apart(Ends(np.maximum(ends.i - reach, 0), ends.i))
        after = self.apart(Ends(ends.j, np.minimum(ends.j + reach, len(self.flat) - 1)))
        return np.asarray(np.maximum(before, after) / self.apart(ends))

    def abruptness(self, ends: Ends) -> np.ndarray:
        """(m,) of all change within: what the largest step makes of it."""
        largest = [self.steps[first + 1 : last + 1].max() for first, last in zip(ends.i, ends.j, strict=True)]
        return np.array(largest) / np.maximum(self.way[ends.j] - self.way[ends.i], 1e-3)

    def progress(self, ends: Ends) -> tuple[np.ndarray, np.ndarray]:
        """(m,) the least step from one moment to the next, on the way from one end (0) to the other (1), and all of
        them."""
        shares = [self._share(ends, between) for between in self._moments(ends)]
        return np.diff(shares, axis=0).min(axis=0), shares[-1] - shares[0]

    def measure(self, ends: Ends) -> np.ndarray:
        """(m, len(MEASURES)), of which ``alike`` is left 0, as it takes the longest:

        mixed: how far the moments between are from a mix of both ends, of the ends' difference
        either: how far each of their places is from one of both
        undone: share of the places that go back from the second to the first between two moments
        beside: see ``steadiness``
        detour: change within, beyond the ends' difference, of that
        other: share of the places that differ between the ends, other than by exposure
        alike: likeness of the ends above chance
        step: see ``abruptness``
        apart: the ends' difference, of their contrast
        veiled: share of the places that became brighter, or stayed, or darker: all of them where words fade in
        kept: share of the places that are the same, but for dark and bright ones
        """
        mixed, either, undone = self._between(ends)
        way = self.way[ends.j] - self.way[ends.i]
        detour = np.minimum(way / self.apart(ends) - 1.0, 3.0)
        difference, contrast = self._places(ends), self._contrast(ends)
        apart = np.minimum(difference.mean(axis=1) / contrast, 2.0)
        found = (mixed, either, undone, self.steadiness(ends), detour, self._other(ends), np.zeros(len(ends)))
        return np.stack([*found, self.abruptness(ends), apart, *self._remains(ends)], axis=1)

    def alike(self, ends: Ends) -> np.ndarray:
        """(m,) likeness of both ends above what soft pictures have by chance."""
        pictures = self.thumbs.pictures
        found = [likeness(pictures[a], pictures[b]) for a, b in zip(ends.i, ends.j, strict=True)]
        return np.maximum(np.array(found, dtype=float) - _CHANCE, 0.0)

    def fades(self, ends: Ends) -> np.ndarray:
        """(m,) whether the picture vanishes between them."""
        least = np.min([self.energy[between] for between in self._moments(ends)], axis=0)
        shot = np.minimum(self.energy[ends.i], self.energy[ends.j])
        return np.asarray(least < np.minimum(_FLAT**2, _FADED**2 * shot))

    def come_or_go(self, ends: Ends) -> np.ndarray:
        """(m,) whether one end is empty: black, or of another one colour."""
        less, more = np.sort([self.energy[ends.i], self.energy[ends.j]], axis=0)
        return np.asarray((less < _EMPTY**2) & (more > _TEXTURED**2))

    def _moments(self, ends: Ends) -> Sequence[np.ndarray]:
        span = ends.j - ends.i
        return [np.clip(np.round(ends.i + span * at).astype(int), ends.i + 1, ends.j - 1) for at in _MOMENTS]

    def _share(self, ends: Ends, between: np.ndarray) -> np.ndarray:
        """(m,) how much of the second end is in a moment, if it is a mix."""
        a, way = self.flat[ends.i], self.flat[ends.j] - self.flat[ends.i]
        share = ((self.flat[between] - a) * way).sum(axis=1) / ((way**2).sum(axis=1) + 1.0)
        return np.asarray(np.clip(share, 0.0, 1.0))

    def _between(self, ends: Ends) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(mixed, either, undone) of ``measure``. Mixes are compared at half the size, where motion counts less."""
        a, b, apart = self.flat[ends.i], self.flat[ends.j], self.apart(ends)
        soft_a, soft_b = self.soft[ends.i], self.soft[ends.j]
        soft_apart = np.maximum(np.abs(soft_a - soft_b).mean(axis=1), 0.5)
        mixed, either, undone = np.zeros((3, len(ends)))
        before: np.ndarray | None = None
        for between in self._moments(ends):
            mix = soft_a + self._share(ends, between)[:, None] * (soft_b - soft_a)
            mixed = np.maximum(mixed, np.abs(self.soft[between] - mix).mean(axis=1) / soft_apart)
            to_a, to_b = (np.abs(self.flat[between] - end) for end in (a, b))
            either = np.maximum(either, np.minimum(to_a, to_b).mean(axis=1) / apart)
            arrived = to_b < to_a
            undone = undone if before is None else np.maximum(undone, (before & ~arrived).mean(axis=1))
            before = arrived
        return mixed, either, undone

    def _remains(self, ends: Ends) -> tuple[np.ndarray, np.ndarray]:
        """(veiled, kept) of ``measure``."""
        change = (self.flat[ends.j] - self.flat[ends.i]).reshape(len(ends), self.unlit.shape[1], 3)
        up, down = ((side.min(axis=2) > -_NOISE).mean(axis=1) for side in (change, -change))
        level = self.flat[ends.i].reshape(change.shape).mean(axis=2)
        limit = np.minimum(_SAME, _SAME_CONTRAST * self._contrast(ends))[:, None]
        kept = (np.abs(change).max(axis=2) < limit) & (level > _DARK) & (level < _BRIGHT)
        return np.maximum(up, down), kept.mean(axis=1)

    def _places(self, ends: Ends) -> np.ndarray:
        """(m, places) difference of both ends."""
        difference = np.abs(self.flat[ends.i] - self.flat[ends.j])
        return np.asarray(difference.reshape(len(ends), self.unlit.shape[1], 3).max(axis=2))

    def _contrast(self, ends: Ends) -> np.ndarray:
        """(m,) grey levels."""
        return np.asarray(np.sqrt(self.energy[ends.i] + self.energy[ends.j] + 1.0))

    def _other(self, ends: Ends) -> np.ndarray:
        """Share of the places that differ as they are, and with level, contrast and exposure made alike."""
        places = self._places(ends)
        contrast = np.sqrt((self.energy[ends.j] + 1.0) / (self.energy[ends.i] + 1.0))
        exposure = (self.light[ends.j] + 1.0) / (self.light[ends.i] + 1.0)
        for gain in (np.ones(len(ends)), contrast, exposure):
            gain = np.where((gain > 1.0 / _GAIN) & (gain < _GAIN), gain, 1.0)[:, None, None]
            places = np.minimum(places, np.abs(self.unlit[ends.i] * gain - self.unlit[ends.j]).max(axis=2))
        limit = np.minimum(_PLACE, _PLACE_CONTRAST * self._contrast(ends))
        return np.asarray((places > limit[:, None]).mean(axis=1))
