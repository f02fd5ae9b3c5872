"""The configuration of a run of the pipeline: ``configs/pipeline/default.yaml`` states all of it."""

import re
from dataclasses import dataclass, field
from typing import Any, ClassVar

from data_pipeline.analysis.content import ContentConfig
from data_pipeline.analysis.hashes import HashConfig
from data_pipeline.analysis.luma import LumaConfig
from data_pipeline.analysis.motion import MotionConfig
from data_pipeline.analysis.pictures import PicturesConfig
from data_pipeline.analysis.transnet import TransnetConfig
from data_pipeline.engines.config import EngineConfig
from data_pipeline.limits import SourceLimits
from data_pipeline.report.config import ReportConfig
from data_pipeline.stages.captions import CaptionsConfig
from data_pipeline.stages.cut import CutConfig
from data_pipeline.stages.duplicates import DuplicatesConfig
from data_pipeline.stages.filter import DEFAULT_FILTERS, FilterRule
from data_pipeline.stages.measure import MeasureConfig
from data_pipeline.stages.prints import PrintsConfig
from data_pipeline.stages.probe import ProbeConfig
from data_pipeline.stages.scores import ScorerConfig
from data_pipeline.stages.shots import ShotsConfig
from data_pipeline.stages.text import TextConfig
from opensora.config.schema import shown
from opensora.utils.limits import Limits


@dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """From raw videos to a clip table."""

    source: str | list[str] = ""  # folder with videos, a file, a glob, a text file of paths, or a list of these
    out: str = ""  # folder of the run: outputs of stages, clips, table, report
    shard_size: int = 64  # sources whose results are one file of a stage; what a cluster's task takes at a time
    limits: SourceLimits = field(default_factory=SourceLimits)
    engine: EngineConfig = field(default_factory=EngineConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    content: ContentConfig = field(default_factory=ContentConfig)
    luma: LumaConfig = field(default_factory=LumaConfig)
    motion: MotionConfig = field(default_factory=MotionConfig)
    hash: HashConfig = field(default_factory=HashConfig)
    transnet: TransnetConfig = field(default_factory=TransnetConfig)
    shots: ShotsConfig = field(default_factory=ShotsConfig)
    measure: MeasureConfig = field(default_factory=MeasureConfig)
    pictures: PicturesConfig = field(default_factory=PicturesConfig)
    prints: PrintsConfig = field(default_factory=PrintsConfig)
    duplicates: DuplicatesConfig = field(default_factory=DuplicatesConfig)
    text: TextConfig = field(default_factory=TextConfig)
    filters: dict[str, FilterRule | None] = field(default_factory=lambda: dict(DEFAULT_FILTERS))
    # asked in this order; one that is null is off
    scores: dict[str, ScorerConfig] = field(default_factory=dict)  # name of the column -> what computes it
    cut: CutConfig = field(default_factory=CutConfig)
    captions: CaptionsConfig = field(default_factory=CaptionsConfig)
    report: ReportConfig = field(default_factory=ReportConfig)

    LIMITS: ClassVar[Limits] = {"shard_size": (100_000, "a shard is one file, and in memory at once")}

    def __post_init__(self) -> None:
        names: Any = [self.source] if isinstance(self.source, str) else self.source
        if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
            raise ValueError(
                f"source={shown(self.source)}: must be a folder, file or glob, or a list of these; write ./ before a "
                "name that YAML takes for something else, such as source=./2024"
            )
        if not names or not all(names):
            raise ValueError("source='': must name the folder that holds the videos; write source=DIR")
        for key, name in (("out", self.out), *(("source", name) for name in names)):
            if name == "~" or name.startswith("~/"):
                raise ValueError(f"{key}={name!r}: ~ is no home folder here; write $HOME{name[1:]}, or the whole path")
        if not self.out:
            raise ValueError("out='': must name the folder of the run; write out=work/first")
        for filter_name in self.filters:
            if not re.fullmatch(r"\w[\w -]*", filter_name):  # it stands in reasons, and in the tables of the report
                raise ValueError(f"filters: {filter_name!r} is no name: must be letters, digits, _, - and spaces")
        if self.shard_size < 1:
            raise ValueError(f"shard_size={self.shard_size}: must be an integer >= 1")
