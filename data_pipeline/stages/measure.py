"""measure: what each clip is like, from what the one decode left: light, freezes, bars, sharpness, damage, motion."""

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from data_pipeline.analysis.luma import BAR_LEVELS, SIDES
from data_pipeline.limits import SourceLimits
from data_pipeline.quality.bars import find_bars
from data_pipeline.quality.camera import Pairs, describe_motion
from data_pipeline.quality.freezes import frozen_s, still_frames
from data_pipeline.rows import Row
from data_pipeline.stages.base import Resources, Unit
from opensora.utils.limits import SECONDS, Limits


@dataclass(frozen=True, kw_only=True)
class MeasureConfig:
    """What counts as what. Which clips are kept is a matter of the filters."""

    black_luma: float = 28.0  # a picture is black where 98 % of it is at most as bright; 0-255
    frozen_s: float = 0.75  # a picture that does not change for as long is frozen
    frozen_change: float = 0.1  # the mean difference of a frame from the one before that is no change; 0-255
    frozen_peak: int = 4  # the largest difference that is none
    bar_luma: int = 24  # lines of a bar are darker
    bar_share: float = 0.9  # of a clip's pictures that have a bar, at least
    static_speed: float = 0.5  # % of the longer side a second: a camera that is slower stands still
    shake: float = 3.0  # the same unit: one that trembles more, and nearly as fast as it glides, shakes
    mixed_share: float = 0.5  # of the largest part of a camera's motion: where a second is larger, it is mixed

    LIMITS: ClassVar[Limits] = {
        "black_luma": (255, "white"),
        "frozen_s": SECONDS,
        "frozen_change": (255, "white after black"),
        "frozen_peak": (255, "white after black"),
        "bar_luma": (max(BAR_LEVELS), "the largest that is measured"),
        "bar_share": (1.0, "a share"),
        "static_speed": (1000.0, "ten pictures a second"),
        "shake": (1000.0, "ten pictures a second"),
        "mixed_share": (1.0, "a share"),
    }

    def __post_init__(self) -> None:
        for name in ("black_luma", "frozen_change", "frozen_peak", "static_speed", "shake"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be a number, 0 or more")
        for name in ("frozen_s", "bar_share", "mixed_share"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be a number above 0")
        if self.bar_luma not in BAR_LEVELS:
            raise ValueError(f"bar_luma={self.bar_luma}: must be one of {', '.join(map(str, BAR_LEVELS))}")


class MeasureStage:
    """One row per clip. Speeds are in % of the picture's longer side a second: neither size nor rate matters."""

    name: ClassVar[str] = "measure"
    version: ClassVar[int] = 1
    reads: Mapping[str, tuple[str, ...]] = {
        "frames": (
            *("pts", "time_base", "height", "width", "damaged_at"),
            *("luma_mean", "luma_change", "luma_peak", "luma_frame", "luma_bright", "luma_sharpness", "luma_dark"),
            "luma_dim",
            *("motion_frame", "motion_next", "motion_mean", "motion_right", "motion_down", "motion_larger"),
            *("motion_clockwise", "motion_rest", "motion_agree"),
        ),
        "shots": ("first", "last", "end_pts"),
    }
    resources: ClassVar[Resources] = Resources()
    columns: ClassVar[pa.Schema] = pa.schema(
        [
            ("luma", pa.float64()),  # mean over all pixels and frames, 0-255
            ("black_share", pa.float64()),  # of the pictures sampled
            ("frozen_share", pa.float64()),  # of the time
            ("sharpness", pa.float64()),  # median of the variance of the Laplacian at 640 pixels, inside black bars
            ("bar_top", pa.float64()),  # share of the height
            ("bar_bottom", pa.float64()),
            ("bar_left", pa.float64()),  # share of the width
            ("bar_right", pa.float64()),
            ("picture_share", pa.float64()),  # of the area, without bars
            ("damaged", pa.bool_()),  # packets or frames within it that the decoder refused or marked
            ("motion_score", pa.float64()),  # how fast a pixel moves, mean over pixels and moments, % a second
            ("camera_motion", pa.string()),  # see data_pipeline.quality.camera.NAMES; null: no texture to tell by
            ("camera_speed", pa.float64()),  # the part that is steady, % a second
            ("shake", pa.float64()),  # the part that changes from moment to moment, % a second
            ("foreground_motion", pa.float64()),  # as motion_score, of what the camera's motion does not explain
        ]
    )

    def __init__(self, config: MeasureConfig, limits: SourceLimits) -> None:
        self.config = config

    def run(self, unit: Unit) -> list[Row]:
        """See ``Stage``."""
        frames = unit.row("frames")
        return [self._clip(frames, clip) for clip in unit.rows["shots"]]

    def _clip(self, frames: Row, clip: Row) -> Row:
        first, last = clip["first"], clip["last"]
        damage = frames["damaged_at"]
        row = {
            "luma": float(np.mean(frames["luma_mean"][first:last], dtype=np.float64)),
            "frozen_share": self._frozen_share(frames, clip),
            "damaged": bool(((damage >= first) & (damage < last)).any()),
        }
        row |= self._of_samples(frames, (frames["luma_frame"] >= first) & (frames["luma_frame"] < last))
        return row | self._motion(frames, first, last, row["picture_share"])

    def _frozen_share(self, frames: Row, clip: Row) -> float:
        first, last, cfg = clip["first"], clip["last"], self.config
        pts = np.append(np.maximum.accumulate(frames["pts"])[first:last], clip["end_pts"])
        times = (pts - pts[0]) * float(Fraction(frames["time_base"]))
        change, peak = (frames[name][first:last] for name in ("luma_change", "luma_peak"))
        still = still_frames(change, peak, cfg.frozen_change, cfg.frozen_peak)
        return frozen_s(times, still, cfg.frozen_s) / times[-1] if times[-1] > 0 else 0.0

    def _of_samples(self, frames: Row, inside: np.ndarray) -> dict[str, Any]:
        """A clip that is shorter than the distance of two samples may have none: then nothing is known, but no bar."""
        shape, level = (-1, len(SIDES), len(BAR_LEVELS)), BAR_LEVELS.index(self.config.bar_luma)
        dark, dim = (frames[name].reshape(shape)[:, :, level] for name in ("luma_dark", "luma_dim"))
        top, bottom, left, right = find_bars(dark, dim, inside, self.config.bar_share)
        found: dict[str, Any] = {"bar_top": top, "bar_bottom": bottom, "bar_left": left, "bar_right": right}
        found["picture_share"] = (1 - top - bottom) * (1 - left - right)
        if inside.any():
            found["black_share"] = float(np.mean(frames["luma_bright"][inside] <= self.config.black_luma))
            found["sharpness"] = float(np.median(frames["luma_sharpness"][inside]))
        return found

    def _motion(self, frames: Row, first: int, last: int, picture_share: float) -> dict[str, Any]:
        inside = (frames["motion_frame"] >= first) & (frames["motion_next"] < last)
        if not inside.any():
            return {}
        pairs = Pairs.of(frames, inside)
        cfg = self.config
        found = describe_motion(pairs, static=cfg.static_speed, shake=cfg.shake, mixed=cfg.mixed_share)
        within_bars = 100 / max(picture_share, 0.01)  # bars do not move
        moves = {"motion_score": "motion_mean", "foreground_motion": "motion_rest"}
        return found | {
            name: float(np.mean(frames[column][inside], dtype=np.float64)) * within_bars
            for name, column in moves.items()
        }
