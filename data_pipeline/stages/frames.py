"""frames: the one decode. Every frame is decoded once, small, and every measurement looks at it."""

from collections.abc import Mapping
from typing import Any, ClassVar

import pyarrow as pa

from data_pipeline.analysis.base import Analyser, Video
from data_pipeline.limits import SourceLimits
from data_pipeline.media.scan import ScanReport, scan
from data_pipeline.rows import Row
from data_pipeline.stages.base import Resources, Unit

_OWN = pa.schema(
    [
        ("time_base", pa.string()),  # seconds of a unit of pts, as a fraction
        ("pts", pa.list_(pa.int64())),  # of every frame that could be decoded, in order
        ("height", pa.int32()),  # as shown
        ("width", pa.int32()),
        ("damaged_packets", pa.int32()),
        ("damaged_frames", pa.int32()),
        ("damaged_at", pa.list_(pa.int32())),  # index of each such frame, or of the next one behind such a packet
        ("size_changes", pa.int32()),
    ]
)


class FramesStage:
    """One row per video: a list in each column that has a value per frame."""

    name: ClassVar[str] = "frames"
    reads: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "probe": ("sha256", "num_frames", "fps", "height", "width"),
    }

    def __init__(self, analysers: tuple[Analyser, ...], limits: SourceLimits) -> None:
        self._analysers, self._limits = analysers, limits
        self.columns = pa.schema([*_OWN, *(field for analyser in analysers for field in analyser.columns)])
        self.resources = Resources(
            gpus=max((getattr(each, "gpus", 0.0) for each in analysers), default=0.0),
            models=any(hasattr(each, "gpus") for each in analysers),  # a network
        )
        self.version = 1
        self.config: Any = {each.name: {"version": each.version, "config": each.config} for each in analysers}

    def run(self, unit: Unit) -> list[Row]:
        """See ``Stage``."""
        probed, report = unit.row("probe"), ScanReport()
        video = Video(file=unit.file, **{name: probed[name] for name in ("num_frames", "fps", "height", "width")})
        measurements = [analyser.start(video) for analyser in self._analysers]
        pts = []
        for frame in scan(unit.file, report, frames=self._limits.frames, timeout_s=self._limits.time_s):
            pts.append(frame.pts)
            for measurement in measurements:
                measurement.see(frame)
        row: Row = {"pts": pts, "time_base": str(report.time_base), "height": report.height, "width": report.width}
        row |= {name: getattr(report, name) for name in ("damaged_packets", "damaged_frames", "size_changes")}
        row["damaged_at"] = report.damaged_at
        for measurement in measurements:
            row |= measurement.columns()
        return [row]
