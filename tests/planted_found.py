"""What the stages of the data pipeline say of a clip in which something is planted (tests/planted.py)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from data_pipeline.analysis.luma import LumaAnalyser, LumaConfig
from data_pipeline.analysis.motion import MotionAnalyser, MotionConfig
from data_pipeline.limits import SourceLimits
from data_pipeline.rows import Row, to_rows, to_table
from data_pipeline.stages.base import Stage, Unit
from data_pipeline.stages.filter import DEFAULT_FILTERS
from data_pipeline.stages.frames import FramesStage
from data_pipeline.stages.measure import MeasureConfig, MeasureStage
from data_pipeline.stages.probe import ProbeConfig, ProbeStage
from opensora.utils.files.video_writer import write_video
from tests.planted import PlantedClip

# What is found -> by which columns of a clip. What another stage finds is one more line, and that stage in ``STAGES``.
FOUND: Mapping[str, Callable[[Row], bool]] = {
    "letterbox": lambda row: row["bar_top"] + row["bar_bottom"] > 0.02,
    "pillarbox": lambda row: row["bar_left"] + row["bar_right"] > 0.02,
    "black": lambda row: row["black_share"] > 0.1,
    "frozen": lambda row: row["frozen_share"] > 0.1,
    "blurred": lambda row: DEFAULT_FILTERS["blurred"].objection(row["sharpness"]) is not None,
}
ANALYSERS = (LumaAnalyser(LumaConfig()), MotionAnalyser(MotionConfig()))
_LIMITS = SourceLimits()
STAGES: Sequence[Stage] = (
    ProbeStage(ProbeConfig(), _LIMITS),
    FramesStage(ANALYSERS, _LIMITS),
    MeasureStage(MeasureConfig(), _LIMITS),
)


def measured(clip: PlantedClip, folder: Path) -> Row:
    """The columns of a clip, which is one shot, as the stages write them."""
    path = folder / "clip.mp4"
    write_video(path, clip.frames, clip.fps, crf=clip.crf)
    return measured_file(path)


def measured_file(path: Path) -> Row:
    """The same of a video that is one shot."""
    unit = Unit(source=path.name, file=str(path))
    rows: dict[str, list[Row]] = {}
    for stage in STAGES:
        rows[stage.name] = to_rows(to_table(stage.run(replace(unit, rows=rows)), stage.columns))
        if stage.name == "frames":
            rows["shots"] = [whole(rows["frames"][0])]
    return {name: value for stage in STAGES[2:] for name, value in rows[stage.name][0].items()}


def whole(frames: Row) -> Row:
    """All of a video as one shot."""
    pts = frames["pts"]
    return {"first": 0, "last": len(pts), "end_pts": int(2 * pts[-1] - pts[-2]) if len(pts) > 1 else int(pts[0]) + 1}
