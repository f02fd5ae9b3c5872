"""cut: the clips that are kept, each once, at its final size: the only step that encodes."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa

from data_pipeline.limits import SourceLimits
from data_pipeline.media.clip_file import FileFacts, close_with_digest
from data_pipeline.media.encode import LEAST_SIDE, Bars, Converter, Framing, VideoFrame, framing, write_clip
from data_pipeline.media.ranges import RangeReader
from data_pipeline.media.rates import ConstantRate, at_constant_rate
from data_pipeline.media.storage import checked_clip, clip_path
from data_pipeline.outputs import digest_of
from data_pipeline.rows import Row
from data_pipeline.stages.base import Resources, SourceError, Unit
from opensora.datasets.decode.common import DecodeError, TooSlow
from opensora.utils.files.user_files import written_whole
from opensora.utils.limits import Limits

_SIDES = ("top", "bottom", "left", "right")
Preset = Literal[
    "ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow", "placebo"
]


@dataclass(frozen=True, kw_only=True)
class CutConfig:
    """What the files of clips are like."""

    short_side: int = 720  # of a clip, at most; smaller ones stay as they are
    fps: float = 30.0  # at most; of 60 frames a second every second one is taken
    crop_bars: bool = True  # black bars are cut away
    crf: int = 18  # libx264's quality: 18 is visually lossless, larger is smaller
    preset: Preset = "veryfast"  # of libx264: slower ones make smaller files
    container: Literal["files", "tar"] = "files"  # tar: clips of a shard together, which file systems bear better
    tar_mib: int = 1024  # of an archive, about

    LIMITS: ClassVar[Limits] = {
        "short_side": (8192, "no model is trained on more"),
        "fps": (240, "no model is trained on more"),
        "crf": (51, "libx264 knows no more"),
        "tar_mib": (2**20, "that is a terabyte"),
    }

    def __post_init__(self) -> None:
        if self.short_side < LEAST_SIDE or self.short_side % 2:
            raise ValueError(f"short_side={self.short_side}: must be an even integer >= {LEAST_SIDE}")
        if not self.fps >= 1:
            raise ValueError(f"fps={self.fps}: must be a number >= 1")
        if self.crf < 0:
            raise ValueError(f"crf={self.crf}: must be an integer from 0 to 51")
        if self.tar_mib < 1:
            raise ValueError(f"tar_mib={self.tar_mib}: must be an integer >= 1")


class CutStage:
    """One row per clip; of those that are not kept all columns are null. A source fails if none can be made."""

    name: ClassVar[str] = "cut"
    version: ClassVar[int] = 1
    reads: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "frames": ("time_base", "pts", "height", "width", "damaged_packets", "damaged_frames"),
        "shots": ("clip_id", "first", "last", "end_pts"),
        "measure": ("bar_top", "bar_bottom", "bar_left", "bar_right"),
        "filter": ("keep",),
    }
    resources: ClassVar[Resources] = Resources()
    retry_column: ClassVar[str] = "cut_error"
    columns: ClassVar[pa.Schema] = pa.schema(
        [
            ("path", pa.string()),  # of the clip's own file, relative to the folder of the run
            ("num_frames", pa.int32()),
            ("height", pa.int32()),
            ("width", pa.int32()),
            ("fps", pa.float64()),
            ("bytes", pa.int64()),
            ("sha256", pa.string()),
            ("cut_error", pa.string()),  # why there is no clip although it is to be kept
        ]
    )

    def __init__(self, config: CutConfig, limits: SourceLimits, out: str) -> None:
        """``out``: the folder of the run."""
        # What is not of the clips themselves must not make them anew.
        self.config = replace(config, container="files", tar_mib=CutConfig.tar_mib)
        self._limits, self._out = limits, Path(out).absolute()

    def run(self, unit: Unit) -> list[Row]:
        """See ``Stage``."""
        frames = unit.row("frames")
        damaged = bool(frames["damaged_packets"] or frames["damaged_frames"])
        rows: list[Row] = []
        failed: list[Exception] = []
        with RangeReader(unit.file, frames["pts"], damaged=damaged, timeout_s=self._limits.time_s) as reader:
            for shot, found, kept in zip(*(unit.rows[name] for name in ("shots", "measure", "filter")), strict=True):
                try:
                    rows.append(self._clip(reader, frames, shot, found) if kept["keep"] else {})
                except TooSlow:
                    raise
                except (DecodeError, SourceError) as error:
                    reader.close()
                    failed.append(error)
                    rows.append({"cut_error": error.cause if isinstance(error, DecodeError) else str(error)})
        if failed and not any(row.get("path") for row in rows):
            raise failed[0]
        return rows

    def _clip(self, reader: RangeReader, frames: Row, shot: Row, measured: Row) -> Row:
        first, last = shot["first"], shot["last"]
        base = Fraction(frames["time_base"])
        shown = at_constant_rate(frames["pts"][first:last], base, shot["end_pts"], self.config.fps)
        framed = self._framing(frames, measured)
        path = clip_path(f"{shot['clip_id']}-{self._settings(framed, shown)}.mp4")
        facts = checked_clip(self._out, path) or self._make(reader, path, first + shown.frames, framed, shown.rate)
        size = {"height": framed.rows, "width": framed.columns, "num_frames": len(shown.frames)}
        return {"path": path, "fps": float(shown.rate), "bytes": facts.bytes, "sha256": facts.sha256, **size}

    def _framing(self, frames: Row, measured: Row) -> Framing:
        bars = Bars(**{side: measured[f"bar_{side}"] or 0.0 for side in _SIDES}) if self.config.crop_bars else Bars()
        found = framing(frames["height"], frames["width"], bars, self.config.short_side)
        if found is None:
            raise SourceError(
                f"a picture of less than {LEAST_SIDE} pixels ({frames['width']}x{frames['height']} with bars)",
                kind="too small",
            )
        return found

    def _settings(self, framed: Framing, shown: ConstantRate) -> str:
        """8 hex digits of all that makes one clip of a range another file."""
        about = [self.version, self.config.crf, self.config.preset, asdict(framed), str(shown.rate)]
        return digest_of(about)[:8]

    def _make(self, reader: RangeReader, path: str, numbers: np.ndarray, framed: Framing, rate: Fraction) -> FileFacts:
        with written_whole(self._out / path) as aside:
            with aside.open("wb") as file:
                pictures = _pictures(reader, numbers, framed)
                write_clip(file, pictures, framed, rate, crf=self.config.crf, preset=self.config.preset)
            return close_with_digest(aside)


def _pictures(reader: RangeReader, numbers: np.ndarray, framed: Framing) -> Iterator[VideoFrame]:
    """The frames of these numbers, some more than once, as those of a clip."""
    counts = dict(zip(*np.unique(numbers, return_counts=True), strict=True))
    first, last = int(numbers[0]), int(numbers[-1]) + 1
    convert: Converter | None = None
    for number, frame in enumerate(reader.frames(first, last), start=first):
        if number in counts:
            assert reader.about is not None
            convert = convert or Converter(reader.source, reader.about, framed)
            picture = convert(frame)
            yield from _times(picture, int(counts[number]))


def _times(picture: VideoFrame, count: int) -> Iterable[Any]:
    return (picture for _ in range(count))
