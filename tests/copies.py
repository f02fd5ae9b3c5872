"""Copies of real footage as people make them, and what the stages before ``duplicates`` say of a pile of files."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa

from data_pipeline.analysis.hashes import HashAnalyser, HashConfig
from data_pipeline.analysis.luma import LumaAnalyser, LumaConfig
from data_pipeline.analysis.motion import MotionAnalyser, MotionConfig
from data_pipeline.limits import SourceLimits
from data_pipeline.media.scan import ScanReport, scan
from data_pipeline.rows import Row, to_rows, to_table
from data_pipeline.stages.base import Stage, Unit
from data_pipeline.stages.duplicates import DuplicatesStage
from data_pipeline.stages.frames import FramesStage
from data_pipeline.stages.measure import MeasureConfig, MeasureStage
from data_pipeline.stages.prints import PrintsConfig, PrintsStage
from data_pipeline.stages.probe import ProbeConfig, ProbeStage
from data_pipeline.stages.shots import ShotsConfig, ShotsStage

SIDE, FRAMES = 480, 96  # of the footage that copies are made of: pixels of the longer side, the most frames


def _scaled(frames: np.ndarray, scale: float) -> np.ndarray:
    height, width = (2 * round(side * scale / 2) for side in frames.shape[1:3])
    return np.stack([cv2.resize(frame, (width, height), interpolation=cv2.INTER_AREA) for frame in frames])


def _boxed(frames: np.ndarray, down: float, across: float) -> np.ndarray:
    rows, columns = round(frames.shape[1] * down), round(frames.shape[2] * across)
    return np.pad(frames, ((0, 0), (rows, rows), (columns, columns), (0, 0)))


def _cropped(frames: np.ndarray, share: float, place: float) -> np.ndarray:
    """``place``: 0 at the upper left, 0.5 in the middle."""
    height, width = (round(side * (1 - share)) for side in frames.shape[1:3])
    top, left = round((frames.shape[1] - height) * place), round((frames.shape[2] - width) * place)
    return frames[:, top : top + height, left : left + width]


def _brighter(frames: np.ndarray) -> np.ndarray:
    curve = np.rint(255 * (np.arange(256) / 255) ** 0.7).astype(np.uint8)  # black stays black, also that of bars
    brighter: np.ndarray = curve[frames]
    return brighter


def _later(frames: np.ndarray) -> np.ndarray:
    """By 7 frames; of short footage by as many as leave what both must show."""
    return frames[min(7, len(frames) // 8) :]


@dataclass(frozen=True)
class Change:
    """What is done to footage."""

    make: Callable[[np.ndarray], np.ndarray]
    crf: int = 23
    kind: str = "near"  # of duplicate that it must be found as


CHANGES: Mapping[str, Change] = {
    "encoded anew": Change(lambda frames: frames),
    "encoded badly": Change(lambda frames: frames, crf=36),
    "half the size": Change(lambda frames: _scaled(frames, 0.5)),
    "letterboxed": Change(lambda frames: _boxed(frames, 0.15, 0)),
    "pillarboxed": Change(lambda frames: _boxed(frames, 0, 0.2)),
    "cropped by 5 %": Change(lambda frames: _cropped(frames, 0.05, 0.5)),
    "cropped at a corner": Change(lambda frames: _cropped(frames, 0.05, 0.0)),
    "cropped by 10 %": Change(lambda frames: _cropped(frames, 0.1, 0.5)),
    "brighter": Change(_brighter),
    "3 frames later": Change(lambda frames: frames[3:]),
    "7 frames later, smaller": Change(lambda frames: _scaled(_later(frames), 0.5)),
    "mirrored": Change(lambda frames: frames[:, :, ::-1], kind="mirrored"),
    "mirrored, badly": Change(lambda frames: _scaled(frames[:, :, ::-1], 0.5), crf=32, kind="mirrored"),
}


def footage(path: Path, first: int, end: int) -> tuple[np.ndarray, float]:
    """((n, h, w, 3) RGB, frames a second) of a range of a real clip."""
    found, times = list[np.ndarray](), list[float]()
    for frame in scan(str(path), ScanReport(), frames=end + 1, timeout_s=600):
        if first <= frame.index < min(end, first + FRAMES):
            found.append(frame.bgr(SIDE)[..., ::-1].copy())
            times.append(frame.time_s)
        if frame.index + 1 >= min(end, first + FRAMES):
            break
    return np.stack(found), (len(times) - 1) / (times[-1] - times[0])


_LIMITS = SourceLimits()
_ANALYSERS = (LumaAnalyser(LumaConfig()), MotionAnalyser(MotionConfig()), HashAnalyser(HashConfig()))
STAGES: tuple[Stage, ...] = (
    ProbeStage(ProbeConfig(), _LIMITS),
    FramesStage(_ANALYSERS, _LIMITS),
    ShotsStage(ShotsConfig(detector="none", min_s=0.0), _LIMITS),
    MeasureStage(MeasureConfig(), _LIMITS),
    PrintsStage(PrintsConfig(), _LIMITS),
)


@dataclass
class Pile:
    """Files, each of them one clip unless ``pieces`` cuts it."""

    rows: dict[str, dict[str, list[Row]]] = field(default_factory=dict)  # source -> stage -> its rows

    def add(self, name: str, path: Path, *, pieces: int = 1) -> None:
        """``pieces``: equal parts of it that are clips."""
        shots = ShotsStage(ShotsConfig(detector="none", min_s=0.0), _LIMITS)
        unit, rows = Unit(source=name, file=str(path)), dict[str, list[Row]]()
        for stage in STAGES:
            made = stage.run(replace(unit, rows=rows))
            if stage.name == shots.name and pieces > 1:
                made = _cut(made[0], rows["frames"][0]["pts"], pieces)
            rows[stage.name] = to_rows(to_table(made, stage.columns))
        rows["screen"] = [{"keep": True} for _ in rows["shots"]]
        self.rows[name] = rows

    def tables(self, names: Iterable[str]) -> dict[str, pa.Table]:
        """What ``DuplicatesStage`` reads, of these sources."""
        schemas = {stage.name: stage.columns for stage in STAGES} | {"screen": pa.schema([("keep", pa.bool_())])}
        found = {}
        for stage, columns in DuplicatesStage.reads.items():
            if columns:
                rows = [(name, row) for name in sorted(names) for row in self.rows[name][stage]]
                schema = pa.schema([schemas[stage].field(column) for column in columns])
                table = to_table([{column: row[column] for column in columns} for _, row in rows], schema)
                found[stage] = table.add_column(0, "source", pa.array([name for name, _ in rows], pa.string()))
        return found

    def rows_of(self, stage: str, columns: Iterable[str], sources: Iterable[str]) -> Iterator[tuple[str, pa.Table]]:
        """See ``RowsOf``."""
        for name in sources:
            schema = pa.schema([STAGES[1].columns.field(column) for column in columns])
            yield (
                name,
                to_table([{column: row[column] for column in columns} for row in self.rows[name][stage]], schema),
            )


def _cut(shot: Row, pts: np.ndarray, pieces: int) -> list[Row]:
    edges = np.linspace(0, len(pts), pieces + 1).astype(int)
    seconds = np.append(
        (pts - pts[0]) * ((shot["end_s"] - shot["start_s"]) / (shot["end_pts"] - pts[0])), shot["end_s"]
    )
    ends = np.append(pts, shot["end_pts"])
    return [
        shot
        | {"clip_id": f"{shot['clip_id']}-{number}", "clip": number, "first": int(first), "last": int(last)}
        | {"start_s": float(seconds[first]), "end_s": float(seconds[last]), "num_frames": int(last - first)}
        | {"start_pts": int(ends[first]), "end_pts": int(ends[last])}
        for number, (first, last) in enumerate(itertools.pairwise(edges))
    ]
