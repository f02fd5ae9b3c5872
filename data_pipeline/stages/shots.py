"""shots: the clips of a video. A cut ends one, frames around a gradual transition are in none; nothing is decoded."""

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import numpy as np
import pyarrow as pa

from data_pipeline.analysis.content import thumbs_of
from data_pipeline.limits import SourceLimits
from data_pipeline.rows import Row
from data_pipeline.shots.cuts import adaptive_cuts, content_cuts
from data_pipeline.shots.network import network_transitions
from data_pipeline.shots.opinions import reconciled
from data_pipeline.shots.ranges import Times, clip_row, divided, ranges_between
from data_pipeline.shots.thumbs import Thumbs
from data_pipeline.shots.transitions import Transition, merged
from data_pipeline.stages.base import Resources, Unit
from opensora.utils.limits import SECONDS, Limits

DETECTORS = ("adaptive", "content", "transnetv2", "none")
_LEAST_STEP = 4.0  # the score of a cut between shots that look alike, if the thumbnails bear it out
_PLAIN = ("pts", "time_base", "content_score", "content_frame", "content_thumbs")
_NETWORK = ("pts", "time_base", "transnet_middle", "transnet_within")


@dataclass(frozen=True, kw_only=True)
class ShotsConfig:
    """Where clips begin and end."""

    detector: str = "adaptive"  # adaptive, content: PySceneDetect's; transnetv2; none: a file is one clip
    adaptive_threshold: float = 3.0  # a cut's score over the mean of the frames around it
    content_threshold: float = 27.0  # a cut's score, 0 to 255
    transnet_threshold: float = 0.5  # a transition's probability
    gradual: bool = True  # a second opinion, by thumbnails: dissolves, fades and wipes; flashes and jerks are no cuts
    margin_frames: int = 6  # left out on both sides of a gradual transition
    min_scene_s: float = 0.6  # after a cut, before the detector finds the next one
    merge_s: float = 0.5  # transitions that follow one another faster are one
    min_s: float = 1.0  # shorter clips are left out
    max_s: float | None = None  # longer shots are divided evenly; null: none is

    LIMITS: ClassVar[Limits] = {
        "adaptive_threshold": (255.0, "no ratio is above"),
        "content_threshold": (255.0, "no score is above"),
        "transnet_threshold": (1.0, "it is a probability"),
        "margin_frames": (1000, "clips would be gone"),
        "min_scene_s": SECONDS,
        "merge_s": SECONDS,
        "min_s": SECONDS,
        "max_s": SECONDS,
    }

    def __post_init__(self) -> None:
        if self.detector not in DETECTORS:
            raise ValueError(f"detector={self.detector!r}: must be one of {', '.join(DETECTORS)}")
        for name in ("adaptive_threshold", "content_threshold", "transnet_threshold"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be a number above 0")
        for name in ("min_scene_s", "merge_s", "min_s", "margin_frames"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be 0 or more")
        if self.max_s is not None and not self.max_s >= max(2 * self.min_s, 0.1):
            raise ValueError(
                f"max_s={self.max_s}: must be null, or 0.1 and twice min_s={self.min_s} at least, as halves stay"
            )


class ShotsStage:
    """One row per clip, in order of time; none where no shot is long enough."""

    name: ClassVar[str] = "shots"
    version: ClassVar[int] = 2
    resources: ClassVar[Resources] = Resources()
    columns: ClassVar[pa.Schema] = pa.schema(
        [
            ("clip_id", pa.string()),  # of the file's content and the exact times
            ("clip", pa.int32()),  # number within the source
            ("first", pa.int32()),  # decoded frames [first, last)
            ("last", pa.int32()),
            ("start_pts", pa.int64()),  # in units of time_base
            ("end_pts", pa.int64()),  # when the first frame is shown that is not of it
            ("time_base", pa.string()),
            ("start_s", pa.float64()),  # since the first frame of the file
            ("end_s", pa.float64()),
            ("fps", pa.float64()),  # of this range
            ("num_frames", pa.int32()),
            ("transition_in", pa.string()),  # start, cut, gradual; divided: of a shot above max_s
            ("transition_out", pa.string()),  # the same, and end
        ]
    )

    def __init__(self, config: ShotsConfig, limits: SourceLimits) -> None:
        self.config = config
        frames = {"transnetv2": _NETWORK, "none": _PLAIN[:2]}.get(config.detector, _PLAIN)
        self.reads: Mapping[str, tuple[str, ...]] = {"probe": ("sha256",), "frames": frames}

    def run(self, unit: Unit) -> list[Row]:
        """See ``Stage``."""
        frames, cfg = unit.row("frames"), self.config
        times = Times(frames["pts"], Fraction(frames["time_base"]))
        shots = ranges_between(find_transitions(frames, cfg), len(times.pts), cfg.margin_frames)
        clips = [clip for shot in shots for clip in divided(shot, times, cfg.max_s)]
        clips = [clip for clip in clips if times.seconds(clip.first, clip.last) >= cfg.min_s]
        return [clip_row(clip, number, times, unit.row("probe")["sha256"]) for number, clip in enumerate(clips)]


def find_transitions(frames: Row, cfg: ShotsConfig) -> list[Transition]:
    """In order of time.

    Args:
        frames: the columns of stage ``frames`` that ``ShotsStage`` reads.
    """
    pts, base = np.maximum.accumulate(frames["pts"]), Fraction(frames["time_base"])
    seconds = (pts - pts[0]) * float(base)
    if cfg.detector == "none":
        return []
    if cfg.detector == "transnetv2":
        found = network_transitions(frames["transnet_middle"], frames["transnet_within"], cfg.transnet_threshold)
        return merged(found, seconds, cfg.merge_s)
    cuts = _detected(frames["content_score"], pts, base, cfg)
    if not cfg.gradual:
        return merged([Transition("cut", cut, cut) for cut in cuts], seconds, cfg.merge_s)
    seen = frames["content_frame"]
    thumbs = Thumbs(seen, seconds[seen], thumbs_of(frames["content_thumbs"]))
    steps = adaptive_cuts(
        frames["content_score"], pts, base, threshold=cfg.adaptive_threshold, apart_s=0.0, least=_LEAST_STEP
    )
    return merged(reconciled(cuts, steps, thumbs, seconds, cfg.merge_s), seconds, cfg.merge_s)


def _detected(scores: np.ndarray, pts: np.ndarray, base: Fraction, cfg: ShotsConfig) -> list[int]:
    """First frames of shots, by PySceneDetect."""
    if cfg.detector == "adaptive":
        return adaptive_cuts(scores, pts, base, threshold=cfg.adaptive_threshold, apart_s=cfg.min_scene_s)
    return content_cuts(scores, pts, base, threshold=cfg.content_threshold, apart_s=cfg.min_scene_s)
