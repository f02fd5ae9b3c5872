"""A pipeline for tests of its last stages: what is measured of a clip is made up, by the number of the clip."""

from collections.abc import Mapping
from fractions import Fraction
from typing import Any, ClassVar

import pyarrow as pa

from data_pipeline.config import PipelineConfig
from data_pipeline.limits import SourceLimits
from data_pipeline.rows import Row, from_bytes
from data_pipeline.stages.base import GlobalStage, Resources, Stage, Unit
from data_pipeline.stages.captions import CaptionsStage
from data_pipeline.stages.cut import CutStage
from data_pipeline.stages.frames import FramesStage
from data_pipeline.stages.probe import ProbeStage
from data_pipeline.worker import Failed, _answer
from opensora.utils.errors import UserError

CLIP_FRAMES = 12
LEAST = 1.0  # that a clip has to move


class Pieces:
    """In place of shots: every CLIP_FRAMES frames are a clip."""

    name: ClassVar[str] = "shots"
    version: ClassVar[int] = 1
    reads: Mapping[str, tuple[str, ...]] = {"probe": ("sha256",), "frames": ("pts", "time_base")}
    resources: ClassVar[Resources] = Resources()
    config: Any = None
    columns: ClassVar[pa.Schema] = pa.schema(
        [
            ("clip_id", pa.string()),
            ("clip", pa.int32()),
            ("first", pa.int32()),
            ("last", pa.int32()),
            ("start_pts", pa.int64()),
            ("end_pts", pa.int64()),
            ("time_base", pa.string()),
            ("start_s", pa.float64()),
            ("end_s", pa.float64()),
            ("fps", pa.float64()),
            ("num_frames", pa.int32()),
        ]
    )

    def run(self, unit: Unit) -> list[Row]:
        """See ``Stage``."""
        frames, sha256 = unit.row("frames"), unit.row("probe")["sha256"]
        pts, base = frames["pts"].tolist(), Fraction(frames["time_base"])
        step = pts[1] - pts[0]
        rows: list[Row] = []
        for clip, first in enumerate(range(0, len(pts) - CLIP_FRAMES + 1, CLIP_FRAMES)):
            last = first + CLIP_FRAMES
            end = pts[last] if last < len(pts) else pts[-1] + step
            row = {"clip_id": f"{sha256[:12]}{clip:04x}", "clip": clip, "first": first, "last": last}
            row |= {"start_pts": pts[first], "end_pts": end, "time_base": str(base), "num_frames": CLIP_FRAMES}
            row |= {"start_s": float((pts[first] - pts[0]) * base), "end_s": float((end - pts[0]) * base)}
            rows.append(row | {"fps": float(1 / (step * base))})
        return rows


class MadeUp:
    """In place of measure: motion is the number of the clip."""

    name: ClassVar[str] = "measure"
    version: ClassVar[int] = 1
    reads: Mapping[str, tuple[str, ...]] = {"shots": ("clip",)}
    resources: ClassVar[Resources] = Resources()
    config: Any = None
    columns: ClassVar[pa.Schema] = pa.schema(
        [
            ("luma", pa.float64()),
            ("camera_motion", pa.string()),
            ("motion_score", pa.float64()),
            ("flow", pa.list_(pa.float64())),  # as stages hand on to others
            *((f"bar_{side}", pa.float64()) for side in ("top", "bottom", "left", "right")),
        ]
    )

    def run(self, unit: Unit) -> list[Row]:
        """See ``Stage``."""
        bars = {f"bar_{side}": 0.0 for side in ("top", "bottom", "left", "right")}
        names = ("static", "pan left", "zoom in")
        return [
            {
                "luma": 100.0,
                "camera_motion": names[row["clip"] % 3],
                "motion_score": float(row["clip"]),
                "flow": [0.5, 1.5],
            }
            | bars
            for row in unit.rows["shots"]
        ]


class Least:
    """In place of filters: a clip has to move more than ``least``."""

    name: ClassVar[str] = "filter"
    version: ClassVar[int] = 1
    reads: Mapping[str, tuple[str, ...]] = {"measure": ("motion_score",)}
    resources: ClassVar[Resources] = Resources()
    columns: ClassVar[pa.Schema] = pa.schema(
        [("keep", pa.bool_()), ("reason", pa.string()), ("rejected_by", pa.list_(pa.string()))]
    )

    def __init__(self, least: float) -> None:
        self.config: Any = {"least": least}

    def run(self, unit: Unit) -> list[Row]:
        """See ``Stage``."""
        least, rows = self.config["least"], []
        for row in unit.rows["measure"]:
            keep = row["motion_score"] >= least
            reason = None if keep else f"still: motion_score={row['motion_score']:g}, must be >= {least:g}"
            rows.append({"keep": keep, "reason": reason, "rejected_by": [] if keep else ["still"]})
        return rows


class Here:
    """In place of a worker process: the stages run in this one."""

    def __init__(self, stages: Mapping[str, Stage], limits: SourceLimits) -> None:
        self._stages, self._limits = stages, limits

    def run(self, stage: str, unit: Unit) -> pa.Table:
        """See ``Worker``."""
        kind, value = _answer(self._stages[stage], unit, self._limits)
        if kind == "rows":
            return from_bytes(value)
        raise Failed(*value) if kind == "failed" else UserError(value)

    def close(self) -> None:
        """There is nothing to end."""


def stages_of(cfg: PipelineConfig) -> dict[str, Stage | GlobalStage]:
    """In place of ``make_stages``."""
    stages: list[Any] = [
        ProbeStage(cfg.probe, cfg.limits),
        FramesStage((), cfg.limits),
        Pieces(),
        MadeUp(),
        Least(LEAST),
    ]
    stages += [CutStage(cfg.cut, cfg.limits, cfg.out), CaptionsStage(cfg.captions, cfg.limits, cfg.out, cfg.source)]
    return {stage.name: stage for stage in stages}
