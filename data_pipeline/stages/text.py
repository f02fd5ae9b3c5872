"""text: what was written on a clip after it was filmed, by what can be read of it, and marks that never move.

Only clips that are kept so far and no duplicates are looked at, a few frames of each; one frame is read at first, and
more if there is text in it. Where the camera stands, nobody can tell by what stays whether it is a mark or the scene:
such clips have no ``logo_share``, and no filter rejects them for it unless it is told to.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import pyarrow as pa

from data_pipeline.limits import SourceLimits
from data_pipeline.matching.box import Bars
from data_pipeline.media.scan import Frame
from data_pipeline.media.stills import stills
from data_pipeline.overlays.logo import SIDE, logo_share
from data_pipeline.overlays.reading import TextReader, Words
from data_pipeline.quality.camera import STATIC
from data_pipeline.rows import Row
from data_pipeline.stages.base import Resources, Unit
from data_pipeline.stages.prints import bars_of
from opensora.utils.limits import Limits

_LOOKED_AT = 8  # frames of a clip, for marks that never move
_READ = (4, 1, 7)  # which of these are read, the first one always
_LETTERS_KEPT = 200  # of what was read


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """What counts as text."""

    method: Literal["ocr", "none"] = "ocr"
    score: float = 0.8  # of what was read, at least; below it are patterns that look like letters
    letters: int = 2  # the same, its length: hands and crossings are taken for a single one
    side: int = 736  # pixels of the longer side; more read smaller text, and take longer
    logo: bool = True  # whether marks that never move are looked for

    LIMITS: ClassVar[Limits] = {
        "score": (1.0, "no score is above"),
        "letters": (1000, "no line has more"),
        "side": (2000, "it is scaled down beyond"),
    }

    def __post_init__(self) -> None:
        if self.method not in ("ocr", "none"):
            raise ValueError(f"method={self.method!r}: must be ocr or none")
        if self.score < 0:
            raise ValueError(f"score={self.score}: must be a share, from 0 to 1")
        if self.letters < 1:
            raise ValueError(f"letters={self.letters}: must be an integer >= 1")
        if self.side < 64:
            raise ValueError(f"side={self.side}: must be an integer >= 64")


class TextStage:
    """One row per clip. All columns of clips that are not looked at are null."""

    name: ClassVar[str] = "text"
    version: ClassVar[int] = 2
    reads: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "frames": ("pts", "time_base", "damaged_packets", "damaged_frames"),
        "shots": ("clip_id", "first", "last"),  # its id stands for the bytes that it is read from
        "measure": ("bar_top", "bar_bottom", "bar_left", "bar_right", "camera_motion"),
        "screen": ("keep",),
        "duplicates": ("duplicate_of",),
    }
    resources: ClassVar[Resources] = Resources(models=True)
    per_clip: ClassVar[bool] = True
    columns: ClassVar[pa.Schema] = pa.schema(
        [
            ("text_share", pa.float64()),  # of the picture inside its bars, mean of the frames that were read
            ("text", pa.string()),  # what was read, lines apart by " / "; empty: nothing
            (
                "logo_share",
                pa.float64(),
            ),  # the same, in boxes of marks that never move; null: the camera stands, or little moves
        ]
    )

    def __init__(self, config: TextConfig, limits: SourceLimits) -> None:
        self.config, self._limits = config, limits
        self._reader: TextReader | None = None

    def run(self, unit: Unit) -> list[Row]:
        """See ``Stage``."""
        clips = unit.rows["shots"]
        known = unit.before or [None] * len(clips)
        rows: list[Row] = [row or {} for row in known]
        asked = self.config.logo or self.config.method != "none"
        wanted = [number for number in self._wanted(unit) if asked and known[number] is None]
        frames = self._frames(unit, [_spread(clips[number]) for number in wanted])
        for number, pictures in zip(wanted, frames, strict=True):
            rows[number] = self._row(pictures, unit.rows["measure"][number])
        return rows

    def _wanted(self, unit: Unit) -> list[int]:
        kept = [row["keep"] for row in unit.rows["screen"]]
        copies = unit.rows["duplicates"] or [{"duplicate_of": None}] * len(kept)  # of a source without prints: none
        alone = [row["duplicate_of"] is None for row in copies]
        return [number for number, both in enumerate(zip(kept, alone, strict=True)) if all(both)]

    def _frames(self, unit: Unit, numbers: Sequence[Sequence[int]]) -> Iterator[list["_Pictures"]]:
        """Of one clip after the other."""
        if not numbers:
            return
        every = stills(unit.file, unit.row("frames"), [n for some in numbers for n in some], self._limits.time_s)
        for some in numbers:
            yield [_Pictures(next(every), self.config.side) for _ in some]

    def _row(self, pictures: Sequence["_Pictures"], measured: Row) -> Row:
        row, bars = Row(), bars_of(measured)
        if self.config.logo:
            grey = np.stack([_inside(each.grey, bars) for each in pictures])
            row["logo_share"] = logo_share(grey) if measured.get("camera_motion") != STATIC else None
        if self.config.method == "ocr":
            row |= self._text([_inside(each.bgr, bars) for each in pictures])
        return row

    def _text(self, pictures: Sequence[np.ndarray]) -> Row:
        found = list[list[Words]]()
        for number in dict.fromkeys(min(each, len(pictures) - 1) for each in _READ):
            found.append(self._words(pictures[number]))
            if not found[0]:
                break
        lines = dict.fromkeys(words.text for some in found for words in some)
        share = float(np.mean([min(1.0, sum(words.share for words in some)) for some in found]))
        return {"text_share": share, "text": " / ".join(lines)[:_LETTERS_KEPT]}

    def _words(self, picture: np.ndarray) -> list[Words]:
        if self._reader is None:
            self._reader = TextReader(self.config.side)
        cfg = self.config
        return [
            each for each in self._reader.read(picture) if each.score >= cfg.score and len(each.text) >= cfg.letters
        ]


class _Pictures:
    """What is kept of a frame."""

    def __init__(self, frame: Frame, side: int) -> None:
        self.bgr, self.grey = frame.bgr(side).copy(), frame.grey(SIDE).copy()


def _spread(clip: Row) -> list[int]:
    """Numbers of frames in the middle of equal parts of a clip."""
    first, count = clip["first"], clip["last"] - clip["first"]
    parts = min(_LOOKED_AT, count)
    return [first + (2 * part + 1) * count // (2 * parts) for part in range(parts)]


def _inside(picture: np.ndarray, bars: Bars) -> np.ndarray:
    """The picture between its bars, and a little less: what is left of a bar has an edge that never moves."""
    height, width = picture.shape[:2]
    top, bottom, left, right = bars
    rows = slice(_ceil(top * height), height - _ceil(bottom * height))
    columns = slice(_ceil(left * width), width - _ceil(right * width))
    return picture[rows, columns]


def _ceil(pixels: float) -> int:
    return int(np.ceil(pixels)) + 1 if pixels else 0
