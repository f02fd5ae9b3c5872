"""Draws captioned clips of one shape: what is in a clip is a function of (seed, index), nothing else."""

from collections import Counter
from dataclasses import asdict, dataclass
from itertools import product

import numpy as np

from opensora.utils.rng import derive_key, numpy_generator

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (225, 30, 30),
    "green": (30, 185, 45),
    "blue": (40, 70, 235),
    "yellow": (240, 225, 35),
    "magenta": (225, 40, 215),
    "cyan": (35, 215, 225),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "black": (12, 12, 12),
    "gray": (128, 128, 128),
    "white": (244, 244, 244),
}
SHAPES = ("circle", "square", "triangle", "cross")
DIRECTIONS: dict[str, tuple[int, int]] = {  # (x, y) per unit of travel, y pointing down
    "left": (-1, 0),
    "right": (1, 0),
    "up": (0, -1),
    "down": (0, 1),
    "still": (0, 0),
}
HELD_OUT_SHARE = 0.1
RADIUS = (0.20, 0.24)  # half of the shape's extent, as a share of the shorter side
TRAVEL = (0.28, 0.40)  # distance from first to last frame, as a share of the shorter side
MARGIN = 1.5  # pixels between the shape and the edge; the outermost pixels show background only


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How large a shape is, how far it moves and where, as shares of the shorter side of the frame.

    Ranges are drawn from evenly.
    """

    radius: tuple[float, float] = RADIUS
    travel: tuple[float, float] = TRAVEL
    off_centre: float = 1.0  # of the room beside the shape: 0 keeps its way in the middle, 1 lets it be anywhere


ANYWHERE = Layout()
Combination = tuple[str, str, str]  # (colour, shape, direction)


@dataclass(frozen=True, kw_only=True)
class ClipSpec:
    """Everything a clip shows; lengths in pixels, positions of the shape's centre."""

    colour: str
    shape: str
    direction: str
    background: str
    frames: int
    height: int
    width: int
    radius: float
    x: float
    y: float
    travel: float

    @property
    def caption(self) -> str:
        """One sentence; a still (one frame) says nothing about motion."""
        motion = "" if self.frames == 1 else "stays still " if self.direction == "still" else f"moves {self.direction} "
        return f"a {self.colour} {self.shape} {motion}on a {self.background} background"

    @property
    def truth(self) -> dict[str, str]:
        """The ground-truth columns of the clip table."""
        values = asdict(self)
        return {name: values[name] for name in ("colour", "shape", "direction", "background")}


def combinations() -> list[Combination]:
    """All (colour, shape, direction), in table order."""
    return list(product(COLOURS, SHAPES, DIRECTIONS))


def held_out_combinations() -> list[Combination]:
    """The 10 % of the combinations that training never sees: the same for every seed.

    Taken in key order, skipping a combination whose colour, shape or direction already has its even share, so that
    every value is asked for and every value stays in training.
    """
    wanted = round(HELD_OUT_SHARE * len(combinations()))
    most = [-(-wanted // len(axis)) for axis in (COLOURS, SHAPES, DIRECTIONS)]
    taken: list[Combination] = []
    counts: list[Counter[str]] = [Counter(), Counter(), Counter()]
    for combination in sorted(combinations(), key=lambda c: derive_key("shapes", "held out", *c)):
        if len(taken) < wanted and all(counts[i][value] < most[i] for i, value in enumerate(combination)):
            taken.append(combination)
            for count, value in zip(counts, combination, strict=True):
                count[value] += 1
    assert len(taken) == wanted
    return sorted(taken)


def training_combinations() -> list[Combination]:
    """The other 90 %."""
    held_out = set(held_out_combinations())
    return [combination for combination in combinations() if combination not in held_out]


def draw_spec(
    seed: int,
    purpose: str,
    index: int,
    allowed: list[Combination],
    sizes: list[tuple[int, int]],
    durations: list[int],
    layout: Layout = ANYWHERE,
) -> ClipSpec:
    """The clip number ``index``. Combinations take turns (a fresh order per round); the rest is drawn.

    ``sizes`` are (height, width). Every draw keeps the whole shape inside the frame in all frames, which ``layout``
    must leave room for.
    """
    round_number, turn = divmod(index, len(allowed))
    order = numpy_generator(seed, "shapes", purpose, "order", round_number).permutation(len(allowed))
    colour, shape, direction = allowed[order[turn]]
    rng = numpy_generator(seed, "shapes", purpose, index)
    height, width = sizes[rng.integers(len(sizes))]
    frames = durations[rng.integers(len(durations))]
    background = list(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))]
    shorter = min(height, width)
    radius = rng.uniform(*layout.radius) * shorter
    travel = rng.uniform(*layout.travel) * shorter if direction != "still" else 0.0
    step_x, step_y = DIRECTIONS[direction]
    return ClipSpec(
        colour=colour,
        shape=shape,
        direction=direction,
        background=background,
        frames=frames,
        height=height,
        width=width,
        radius=radius,
        x=_start(rng, width, radius, step_x * travel, layout.off_centre),
        y=_start(rng, height, radius, step_y * travel, layout.off_centre),
        travel=travel,
    )


def _start(rng: np.random.Generator, size: int, radius: float, shift: float, off_centre: float) -> float:
    """A centre such that the shape is inside [0, size] both at the start and after ``shift``.

    Of the room there is, the share ``off_centre`` around the middle is used.
    """
    low = radius + MARGIN + max(0.0, -shift)
    high = size - radius - MARGIN - max(0.0, shift)
    unused = (1 - off_centre) * (high - low) / 2
    return float(rng.uniform(low + unused, high - unused))


def render(spec: ClipSpec) -> np.ndarray:
    """(T, H, W, 3) uint8, anti-aliased, at constant speed."""
    step_x, step_y = DIRECTIONS[spec.direction]
    background = np.array(BACKGROUNDS[spec.background], dtype=np.float64)
    colour = np.array(COLOURS[spec.colour], dtype=np.float64)
    pixel_y, pixel_x = np.mgrid[: spec.height, : spec.width] + 0.5
    clip = np.empty((spec.frames, spec.height, spec.width, 3), dtype=np.uint8)
    for index in range(spec.frames):
        moved = spec.travel * index / max(1, spec.frames - 1)
        dx, dy = pixel_x - spec.x - step_x * moved, pixel_y - spec.y - step_y * moved
        cover = np.clip(0.5 - _signed_distance(spec.shape, dx, dy, spec.radius), 0, 1)[..., None]
        clip[index] = np.rint(background + cover * (colour - background))
    return clip


def _signed_distance(shape: str, dx: np.ndarray, dy: np.ndarray, radius: float) -> np.ndarray:
    """Distance to the outline in pixels, negative inside; every shape has the extent 2 * radius."""
    if shape == "circle":
        return np.hypot(dx, dy) - radius
    if shape == "square":
        return np.maximum(np.abs(dx), np.abs(dy)) - radius
    if shape == "triangle":  # apex at the top, base at the bottom; the slanted edges run 1 across to 2 down
        return np.maximum(dy - radius, (2 * np.abs(dx) - dy - radius) / np.sqrt(5))
    if shape == "cross":  # a plus sign with arms a third of the extent wide
        upright = np.maximum(np.abs(dx) - radius / 3, np.abs(dy) - radius)
        level = np.maximum(np.abs(dx) - radius, np.abs(dy) - radius / 3)
        return np.minimum(upright, level)
    raise ValueError(f"shape={shape}: must be one of {', '.join(SHAPES)}")
