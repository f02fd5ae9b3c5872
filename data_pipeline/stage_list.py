"""The stages in the order in which they run: the cheap ones first, so that later ones see fewer clips."""

from data_pipeline.analysis.base import Analyser
from data_pipeline.analysis.content import ContentAnalyser
from data_pipeline.analysis.hashes import HashAnalyser
from data_pipeline.analysis.luma import LumaAnalyser
from data_pipeline.analysis.motion import MotionAnalyser
from data_pipeline.analysis.pictures import Pictures
from data_pipeline.analysis.transnet import TransnetAnalyser
from data_pipeline.config import PipelineConfig
from data_pipeline.stages.base import GlobalStage, Stage
from data_pipeline.stages.captions import CaptionsStage
from data_pipeline.stages.cut import CutStage
from data_pipeline.stages.duplicates import DuplicatesStage
from data_pipeline.stages.filter import make_filter, make_screen
from data_pipeline.stages.frames import FramesStage
from data_pipeline.stages.measure import MeasureStage
from data_pipeline.stages.prints import PrintsStage
from data_pipeline.stages.probe import ProbeStage
from data_pipeline.stages.scores import ScoresStage
from data_pipeline.stages.shots import ShotsStage
from data_pipeline.stages.text import TextStage

GLOBAL: tuple[str, ...] = ("duplicates",)  # those that look at all sources together


def make_stages(cfg: PipelineConfig) -> dict[str, Stage | GlobalStage]:
    """Name -> stage, in order.

    Raises:
        UserError: a filter asks for a column that no stage writes.
    """
    stages: list[Stage | GlobalStage] = [
        ProbeStage(cfg.probe, cfg.limits),
        FramesStage(_analysers(cfg), cfg.limits),
        ShotsStage(cfg.shots, cfg.limits),
        MeasureStage(cfg.measure, cfg.limits),
    ]
    stages.append(screen := make_screen(cfg.filters, stages))
    stages.append(PrintsStage(cfg.prints, cfg.limits))
    stages.append(DuplicatesStage(cfg.duplicates, cfg.limits))
    stages.append(TextStage(cfg.text, cfg.limits))
    if cfg.scores:
        stages.append(ScoresStage(cfg.scores, cfg.limits, stages))
    stages.append(make_filter(cfg.filters, screen, stages))
    stages.append(CutStage(cfg.cut, cfg.limits, cfg.out))
    stages.append(CaptionsStage(cfg.captions, cfg.limits, cfg.out, cfg.source))
    return {stage.name: stage for stage in stages}


def _analysers(cfg: PipelineConfig) -> tuple[Analyser, ...]:
    """All that looks at frames while they are decoded."""
    return (
        ContentAnalyser(cfg.content),
        *((TransnetAnalyser(cfg.transnet),) if cfg.shots.detector == "transnetv2" else ()),
        HashAnalyser(cfg.hash),
        LumaAnalyser(cfg.luma),
        MotionAnalyser(cfg.motion),
        Pictures(cfg.pictures),
    )
