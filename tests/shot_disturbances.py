"""What happens inside a shot and is no transition: flashes, shakes, whip pans, exposure, titles, passers-by.

All take (rng, frames, start, fps) with frames (n, HEIGHT, WIDTH, 3) uint8 RGB, and return such frames.
"""

import cv2
import numpy as np

HEIGHT, WIDTH = 180, 320  # of labelled clips


def disturbed_shot(rng: np.random.Generator, frames: np.ndarray, fps: float) -> tuple[np.ndarray, str]:
    """Something happens in the middle third of a shot."""
    what = str(rng.choice(["flash", "flashes", "shake", "exposure", "title", "whip", "passer"]))
    start = len(frames) // 3 + int(rng.integers(0, max(1, len(frames) // 6)))
    change = {
        "flash": _flash,
        "flashes": _flashes,
        "shake": _shake,
        "exposure": _exposure,
        "title": _title,
        "whip": _whip,
        "passer": _passer,
    }[what]
    return change(rng, frames.copy(), start, fps), what


def _flash(rng: np.random.Generator, frames: np.ndarray, start: int, fps: float) -> np.ndarray:
    """A photographer's: bright at once, gone in 1-4 frames."""
    length = int(rng.integers(1, 5))
    strength = rng.uniform(0.5, 1.0) * np.linspace(1, 0.4, length)
    for frame, share in zip(frames[start : start + length], strength, strict=False):
        frame[:] = np.round(frame + (255.0 - frame) * share)
    return frames


def _flashes(rng: np.random.Generator, frames: np.ndarray, start: int, fps: float) -> np.ndarray:
    for _ in range(3):
        frames = _flash(rng, frames, start, fps)
        start += int(rng.integers(4, 12))
    return frames


def _shake(rng: np.random.Generator, frames: np.ndarray, start: int, fps: float) -> np.ndarray:
    """Jerks of up to 8 % of the frame for half a second to a second."""
    length = round(rng.uniform(0.4, 1.0) * fps)
    for frame in frames[start : start + length]:
        x, y = rng.uniform(-0.08, 0.08, 2) * WIDTH
        matrix = np.array([[1.0, 0, x], [0, 1.0, y]])
        frame[:] = cv2.warpAffine(frame, matrix, (WIDTH, HEIGHT), borderMode=cv2.BORDER_REFLECT)
    return frames


def _exposure(rng: np.random.Generator, frames: np.ndarray, start: int, fps: float) -> np.ndarray:
    """A camera that adapts to the light: to 0.55-1.6 of it in half a second, and stays so."""
    gain = rng.uniform(0.55, 0.8) if rng.random() < 0.5 else rng.uniform(1.2, 1.6)
    length = round(rng.uniform(0.2, 0.8) * fps)
    gains = np.interp(np.arange(len(frames)), [start, start + length], [1.0, gain])
    return np.clip(frames * gains[:, None, None, None], 0, 255).astype(np.uint8)


def _title(rng: np.random.Generator, frames: np.ndarray, start: int, fps: float) -> np.ndarray:
    """Words over the picture that fade in and stay."""
    words = np.zeros((HEIGHT, WIDTH), np.uint8)
    for line, text in enumerate(("THE LONG", "WAY HOME")[: rng.integers(1, 3)]):
        cv2.putText(words, text, (20, 80 + 50 * line), cv2.FONT_HERSHEY_SIMPLEX, rng.uniform(1.0, 1.8), 255, 5)
    share = np.interp(np.arange(len(frames)), [start, start + 0.4 * fps], [0.0, 1.0])
    weight = share[:, None, None, None] * (words / 255.0)[None, :, :, None]
    return np.round(frames * (1 - weight) + 255.0 * weight).astype(np.uint8)


def _whip(rng: np.random.Generator, frames: np.ndarray, start: int, fps: float) -> np.ndarray:
    """The camera swings aside by a third of the frame within a fifth of a second, and stays there."""
    length = round(rng.uniform(0.15, 0.3) * fps)
    angle = rng.uniform(0, 2 * np.pi)
    far = rng.uniform(0.2, 0.35) * np.array([WIDTH * np.cos(angle), HEIGHT * np.sin(angle)])
    share = np.interp(np.arange(len(frames)), [start, start + length], [0.0, 1.0])
    for frame, part in zip(frames, share, strict=True):
        matrix = np.array([[1.0, 0, far[0] * part], [0, 1.0, far[1] * part]])
        frame[:] = cv2.warpAffine(frame, matrix, (WIDTH, HEIGHT), borderMode=cv2.BORDER_REFLECT)
    return frames


def _passer(rng: np.random.Generator, frames: np.ndarray, start: int, fps: float) -> np.ndarray:
    """Somebody walks past close to the camera: a dark shape of half the width, for half a second."""
    length = round(rng.uniform(0.4, 0.8) * fps)
    wide, colour = int(rng.uniform(0.3, 0.6) * WIDTH), rng.integers(0, 90, 3)
    for number, frame in enumerate(frames[start : start + length]):
        left = round(-wide + (WIDTH + wide) * (number + 1) / (length + 1))
        frame[HEIGHT // 8 :, max(0, left) : max(0, left + wide)] = colour
    return frames
