"""Where in a clip the training window lies, in time and in the picture. Every draw is keyed by the sample."""

import math
from typing import NamedTuple

import numpy as np

from opensora.datasets.buckets.bucket import frame_interval, sampled_fps
from opensora.datasets.buckets.sizes_1x import RULES as RULES_1X
from opensora.datasets.config import DataConfig
from opensora.datasets.plan.counter_rng import integer


class Frames(NamedTuple):
    """Which frames of a clip are read, as ``read_frames`` takes them."""

    start: int
    interval: int  # every so many of them, or
    span: int | None  # spread evenly over so many


def sampled_frames(
    cfg: DataConfig, num_frames: int, fps: float, frames: int, *, seed: int, epoch: int, sample_id: int
) -> Frames:
    """Those of this sample and epoch, of a clip of ``num_frames``; ``frames`` of them are asked for."""
    key = {"seed": seed, "epoch": epoch, "sample_id": sample_id}
    if cfg.bucket_rule not in RULES_1X:
        interval = int(frame_interval(np.array([fps]))[0])
        return Frames(window_start(num_frames, frames, interval, **key), interval, None)
    span = min(frames * cfg.interval, num_frames)
    return Frames(window_start(num_frames, span, 1, **key), 1, span)


def told_fps(cfg: DataConfig, fps: float) -> float:
    """Frames per second of the sampled clip; 0 where unknown. In Open-Sora 1.x those of the clip, divided by the
    interval and rounded down, however far apart its frames are."""
    if cfg.bucket_rule not in RULES_1X:
        return sampled_fps(fps)
    return 0.0 if math.isnan(fps) else float(fps // cfg.interval)


def crop_origin(height: int, width: int, target_height: int, target_width: int) -> tuple[int, int]:
    """(top, left) of a centred crop."""
    return (height - target_height) // 2, (width - target_width) // 2


def random_crop_origin(
    height: int, width: int, target_height: int, target_width: int, *, seed: int, epoch: int, sample_id: int
) -> tuple[int, int]:
    """(top, left) of a crop drawn for this sample and epoch."""
    top = integer(sample_id, height - target_height + 1, seed, epoch, "crop top")
    left = integer(sample_id, width - target_width + 1, seed, epoch, "crop left")
    return top, left


def window_start(num_frames: int, frames: int, interval: int, *, seed: int, epoch: int, sample_id: int) -> int:
    """First frame of the window drawn for this sample and epoch, such that all its frames lie in the clip."""
    span = (frames - 1) * interval + 1
    return integer(sample_id, max(1, num_frames - span + 1), seed, epoch, "window")
