"""Thumbnails of some frames of a video, and whether two of them show the same."""

from dataclasses import dataclass

import cv2
import numpy as np

_FLAT = 3.0  # grey levels by which a picture without content varies
_REST = 0.25  # of height and width that a view may have moved by, to each side
_EMPTY, _NEARLY = 2.0, 4.0  # the same of a faded picture, and of one on the way there
_FLASH, _FLASH_OVER = 10.0, 0.35  # grey levels that a flash is off by, and what of it may be between its neighbours


@dataclass(frozen=True)
class Thumbs:
    """Of one video, or of a part."""

    frames: np.ndarray  # (n,) int: which frames they are of, rising
    seconds: np.ndarray  # (n,) when these are shown
    pictures: np.ndarray  # (n, height, width, 3) uint8

    def __len__(self) -> int:
        return len(self.frames)

    def part(self, first: int, end: int) -> "Thumbs":
        """Thumbnails [first, end)."""
        return Thumbs(self.frames[first:end], self.seconds[first:end], self.pictures[first:end])

    def are_empty(self, first: int, end: int) -> bool:
        """Whether frames [first, end) are black, or of another one colour, but for some at their edges."""
        within = self.pictures[(self.frames >= first) & (self.frames < end)].astype(np.float32)
        if not len(within):
            return False
        varied = within.reshape(len(within), -1, 3).std(axis=1).max(axis=1)
        return bool(varied.min() < _EMPTY and np.median(varied) < _NEARLY)

    def without_flashes(self) -> "Thumbs":
        """Up to three that differ from those before and after, which are alike, look like the one before."""
        flat = self.pictures.reshape(len(self), -1).astype(np.float32)
        seen = self.pictures.copy()
        for length in (1, 2, 3):
            for reach in range(length):  # how far into the flash
                middle = np.arange(1 + reach, len(self) - length + reach)
                before, after = middle - 1 - reach, middle + length - reach
                beside = np.abs(flat[before] - flat[after]).mean(axis=1)
                least = np.minimum(*(np.abs(flat[middle] - flat[other]).mean(axis=1) for other in (before, after)))
                is_flash = (least > _FLASH) & (beside < _FLASH_OVER * least)
                seen[middle[is_flash]] = self.pictures[before[is_flash]]
        return Thumbs(self.frames, self.seconds, seen)


def likeness(a: np.ndarray, b: np.ndarray) -> float:
    """1 where both show the same, also where the view has moved or the light has changed; about 0 for other scenes.

    The middle of one is looked for in the other: the best normalised correlation. It is -1 where both are flat, or one.
    """
    return max(_found_in(a, b), _found_in(b, a))


def _found_in(a: np.ndarray, b: np.ndarray) -> float:
    top, left = round(a.shape[0] * _REST), round(a.shape[1] * _REST)
    middle = a[top : a.shape[0] - top, left : a.shape[1] - left]
    if middle.std(axis=(0, 1)).max() < _FLAT:
        return -1.0
    found = cv2.matchTemplate(b, middle, cv2.TM_CCOEFF_NORMED)
    found = found[np.isfinite(found) & (np.abs(found) < 1.001)]  # of a flat part it is a number by zero
    return float(found.max()) if found.size else -1.0
