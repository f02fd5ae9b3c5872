"""Decides from pixels what a clip shows: the colour, the shape and the direction of its one object.

Shares nothing with the renderer: names and reference values are stated here on their own, and the decision is made by
geometry, so that a generated clip can be judged. Each frame is compared with the clip's border colour; the largest
connected region that differs is the object. Colour is its hue, shape is how it fills the ninths of its bounding box,
direction is the slope of its centroid over time.

    python -m data_pipeline.shapes.judge samples/video_32x32 --table shapes/prompts_heldout.csv
"""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from opensora.datasets.decode.api import DecodeError, probe, read_frames
from opensora.utils.command_line.arguments import Parser, place
from opensora.utils.command_line.command import call
from opensora.utils.errors import UserError
from opensora.utils.files.user_files import absence, read_csv

UNSURE = "unsure"
ASPECTS = ("colour", "shape", "direction")

# Hue in degrees, and the distance up to which a name is given.
HUES = {"red": 0.0, "yellow": 57.0, "green": 128.0, "cyan": 183.0, "blue": 230.0, "magenta": 303.0}
HUE_TOLERANCE = 26.0
LEAST_CHROMA = 40.0  # max - min of (R, G, B), 0 to 255: below, the object has no colour

# How much of each ninth of the bounding box (rows from the top) the ideal shape fills. Circle: a disc in its box;
# triangle: apex at the top; cross: arms a third wide.
NINTHS = {
    "circle": (0.49, 0.98, 0.49, 0.98, 1.0, 0.98, 0.49, 0.98, 0.49),
    "square": (1.0,) * 9,
    "triangle": (0.0, 0.50, 0.0, 0.25, 1.0, 0.25, 0.75, 1.0, 0.75),
    "cross": (0.0, 1.0, 0.0, 1.0, 1.0, 1.0, 0.0, 1.0, 0.0),
}
FARTHEST_SHAPE = 0.9  # distance to the nearest ideal beyond which no shape is named

LEAST_CONTRAST = 45.0  # largest colour distance from the background, 0 to 441: below, there is no object
LEAST_AREA, MOST_AREA = 0.015, 0.5  # of the frame
STILL_TRAVEL = 0.13  # of the shorter side: less motion than this is none
UNSURE_BAND = 0.03  # around STILL_TRAVEL
OVERSAMPLING = 4  # the mask is taken at this multiple of the resolution


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a clip shows; ``"unsure"`` where the pixels do not say. Confidences are 0 (a guess) to 1."""

    colour: str
    shape: str
    direction: str
    colour_confidence: float = 0.0
    shape_confidence: float = 0.0
    direction_confidence: float = 0.0


def judge_clip(frames: np.ndarray) -> Verdict:
    """The verdict on (T, H, W, 3) uint8; one frame is a still, whose direction is "still"."""
    pixels = frames.astype(np.float32)
    distance = np.linalg.norm(pixels - _background(pixels), axis=-1)  # (T, H, W)
    peaks = np.array([np.percentile(d, 99) for d in distance])
    level = 0.5 * np.median(peaks)
    if 2 * level < LEAST_CONTRAST:
        return Verdict(colour=UNSURE, shape=UNSURE, direction=UNSURE)
    found = [_find_object(d, level) for d in distance]
    colour, colour_confidence = _name_colour(pixels, distance, found, level)
    shape, shape_confidence = _name_shape(found)
    direction, direction_confidence = _name_direction(found, min(frames.shape[1:3]))
    return Verdict(
        colour=colour,
        shape=shape,
        direction=direction,
        colour_confidence=colour_confidence,
        shape_confidence=shape_confidence,
        direction_confidence=direction_confidence,
    )


def _background(pixels: np.ndarray) -> np.ndarray:
    """Median colour of the outermost pixels of all frames."""
    edges = (pixels[:, 0], pixels[:, -1], pixels[:, :, 0], pixels[:, :, -1])
    return np.median(np.concatenate([edge.reshape(-1, 3) for edge in edges]), axis=0)


def _find_object(distance: np.ndarray, level: float) -> np.ndarray | None:
    """The oversampled mask (4H, 4W) of the largest region above ``level``, or None if it is no object."""
    height, width = distance.shape
    enlarged = Image.fromarray(distance.astype(np.float32)).resize(
        (width * OVERSAMPLING, height * OVERSAMPLING), Image.Resampling.BILINEAR
    )
    mask = _largest_region(np.asarray(enlarged) > level)
    share = mask.mean()
    return mask if LEAST_AREA <= share <= MOST_AREA else None


def _largest_region(mask: np.ndarray) -> np.ndarray:
    """The largest 4-connected region of a boolean image."""
    left = mask.copy()
    best = np.zeros_like(mask)
    while left.sum() > best.sum():
        region = _flood(left, np.unravel_index(np.argmax(left), left.shape))
        left &= ~region
        if region.sum() > best.sum():
            best = region
    return best


def _flood(mask: np.ndarray, start: tuple[np.intp, ...]) -> np.ndarray:
    """All pixels of ``mask`` reachable from ``start``."""
    region = np.zeros_like(mask)
    region[start] = True
    size = 0
    while region.sum() > size:
        size = region.sum()
        for _ in range(8):
            grown = region.copy()
            grown[1:] |= region[:-1]
            grown[:-1] |= region[1:]
            grown[:, 1:] |= region[:, :-1]
            grown[:, :-1] |= region[:, 1:]
            region = grown & mask
    return region


def _name_colour(
    pixels: np.ndarray, distance: np.ndarray, found: list[np.ndarray | None], level: float
) -> tuple[str, float]:
    """The hue of the object's inside, where it differs most from the background."""
    inside = []
    for frame, d, mask in zip(pixels, distance, found, strict=True):
        if mask is not None:
            small = mask[OVERSAMPLING // 2 :: OVERSAMPLING, OVERSAMPLING // 2 :: OVERSAMPLING]
            inside.append(frame[small & (d >= min(1.5 * level, np.median(d[small])))])
    if not inside:
        return UNSURE, 0.0
    red, green, blue = np.median(np.concatenate(inside), axis=0)
    if max(red, green, blue) - min(red, green, blue) < LEAST_CHROMA:
        return UNSURE, 0.0
    hue = np.degrees(np.arctan2(np.sqrt(3) * (green - blue), 2 * red - green - blue)) % 360
    gaps = {name: abs((hue - reference + 180) % 360 - 180) for name, reference in HUES.items()}
    best, second = sorted(gaps, key=gaps.__getitem__)[:2]
    if gaps[best] > HUE_TOLERANCE:
        return UNSURE, 0.0
    return best, float(1 - gaps[best] / gaps[second])


def _name_shape(found: list[np.ndarray | None]) -> tuple[str, float]:
    """The ideal shape whose ninths are nearest to the median ones of all frames."""
    features = [_ninths(mask) for mask in found if mask is not None]
    if not features:
        return UNSURE, 0.0
    feature = np.median(features, axis=0)
    gaps = {name: float(np.linalg.norm(feature - np.array(ideal))) for name, ideal in NINTHS.items()}
    best, second = sorted(gaps, key=gaps.__getitem__)[:2]
    if gaps[best] > FARTHEST_SHAPE:
        return UNSURE, 0.0
    return best, 1 - gaps[best] / gaps[second]


def _ninths(mask: np.ndarray) -> np.ndarray:
    """Filled share of the 3 x 3 parts of the mask's bounding box, row by row."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    box = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].astype(np.float32)
    # 48 samples a side divide evenly into thirds whatever the box's size.
    grid = np.asarray(Image.fromarray(box).resize((48, 48), Image.Resampling.BILINEAR))
    return grid.reshape(3, 16, 3, 16).mean(axis=(1, 3)).flatten()


def _name_direction(found: list[np.ndarray | None], shorter: int) -> tuple[str, float]:
    """Where the centroid goes from the first to the last frame, by a straight-line fit."""
    if len(found) == 1:
        return ("still", 1.0) if found[0] is not None else (UNSURE, 0.0)
    times = np.array([time for time, mask in enumerate(found) if mask is not None])
    if len(times) < max(2, 0.6 * len(found)):
        return UNSURE, 0.0
    centres = np.array([np.argwhere(mask).mean(axis=0) for mask in found if mask is not None]) / OVERSAMPLING
    travel_y, travel_x = np.polyfit(times, centres, 1)[0] * (len(found) - 1) / shorter
    travel = float(np.hypot(travel_x, travel_y))
    confidence = min(1.0, abs(travel - STILL_TRAVEL) / STILL_TRAVEL)
    if abs(travel - STILL_TRAVEL) < UNSURE_BAND:
        return UNSURE, confidence
    if travel < STILL_TRAVEL:
        return "still", confidence
    main, other = max(abs(travel_x), abs(travel_y)), min(abs(travel_x), abs(travel_y))
    if other > 0.7 * main:
        return UNSURE, 0.0
    if abs(travel_x) > abs(travel_y):
        return ("right" if travel_x > 0 else "left"), confidence * (1 - other / main)
    return ("down" if travel_y > 0 else "up"), confidence * (1 - other / main)


@dataclass(frozen=True, kw_only=True)
class Score:
    """How many of ``clips`` show what was asked for; ``all_three`` counts clips where everything is right."""

    clips: int
    right: dict[str, int]
    unsure: dict[str, int]
    all_three: int

    def accuracy(self, aspect: str) -> float:
        """Share of clips judged right; an unsure verdict counts as wrong."""
        return self.right[aspect] / max(1, self.clips)


def score(verdicts: Sequence[Verdict], truths: Sequence[dict[str, str]]) -> Score:
    """Compare verdicts with rows that hold ``colour``, ``shape`` and ``direction``."""
    hits = [[getattr(v, aspect) == t[aspect] for aspect in ASPECTS] for v, t in zip(verdicts, truths, strict=True)]
    return Score(
        clips=len(verdicts),
        right={aspect: sum(hit[i] for hit in hits) for i, aspect in enumerate(ASPECTS)},
        unsure={aspect: sum(getattr(v, aspect) == UNSURE for v in verdicts) for aspect in ASPECTS},
        all_three=sum(all(hit) for hit in hits),
    )


def format_score(result: Score) -> str:
    """A table for people: one line per aspect."""
    lines = [f"{'aspect':<10} {'right':>6} {'unsure':>7} {'clips':>6} {'accuracy':>9}"]
    for aspect in ASPECTS:
        lines.append(
            f"{aspect:<10} {result.right[aspect]:>6} {result.unsure[aspect]:>7} {result.clips:>6} "
            f"{result.accuracy(aspect):>9.1%}"
        )
    share = result.all_three / max(1, result.clips)
    lines.append(f"{'all three':<10} {result.all_three:>6} {'':>7} {result.clips:>6} {share:>9.1%}")
    return "\n".join(lines)


def read_truths(table: Path) -> dict[str, dict[str, str]]:
    """Sample name (column ``name``, else the stem of ``path``) -> the table's row.

    Raises:
        UserError: no such file, or a column is missing.
    """
    if reason := absence(table, "file"):
        raise UserError(f"--table {table}: {reason}")
    rows = [row for _, row in read_csv(table, (), f"--table {table}")]
    if not rows:
        raise UserError(f"--table {table}: the table is empty")
    missing = [aspect for aspect in ASPECTS if aspect not in rows[0]]
    if missing or not {"name", "path"} & set(rows[0]):
        raise UserError(f"--table {table}: needs the columns {', '.join(ASPECTS)} and name or path")
    return {row["name"] if "name" in row else Path(row["path"]).stem: row for row in rows}


def match_files(folder: Path, truths: dict[str, dict[str, str]]) -> list[tuple[Path, dict[str, str]]]:
    """Files of ``folder`` (any depth) that a row names: the stem is the name, or the name and a sample number."""
    pairs = []
    for path in sorted(folder.rglob("*")):
        if path.suffix not in (".mp4", ".png"):
            continue
        name = path.stem if path.stem in truths else re.sub(r"_\d+$", "", path.stem)
        if name in truths:
            pairs.append((path, truths[name]))
    if not pairs:
        raise UserError(f"{folder}: no .mp4 or .png file has the name of a table row, such as {next(iter(truths))}")
    return pairs


def read_clip(path: Path) -> np.ndarray:
    """(T, H, W, 3) uint8 of a video, or (1, H, W, 3) of a picture.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        return read_frames(str(path), 0, probe(str(path)).num_frames)
    except DecodeError as error:
        raise UserError(f"{error}: remove the file, or write it again") from error


def main(argv: Sequence[str] | None = None) -> int:
    """Judge a folder of samples against the table that asked for them, and print the score."""
    return call(_judge, argv)


def _judge(argv: list[str]) -> None:
    parser = Parser(prog="python -m data_pipeline.shapes.judge", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=place)
    parser.add_argument("--table", type=place, required=True, help="csv with name or path, colour, shape, direction")
    parser.add_argument("--each", action="store_true", help="print a line per file")
    args = parser.parse_args(argv)
    pairs = match_files(args.folder, read_truths(args.table))
    verdicts = [judge_clip(read_clip(path)) for path, _ in pairs]
    if args.each:
        for (path, truth), verdict in zip(pairs, verdicts, strict=True):
            asked = " ".join(truth[aspect] for aspect in ASPECTS)
            print(f"{path.name:<48} asked: {asked:<24} seen: {verdict.colour} {verdict.shape} {verdict.direction}")
    print(format_score(score(verdicts, [truth for _, truth in pairs])))


if __name__ == "__main__":
    sys.exit(main())
