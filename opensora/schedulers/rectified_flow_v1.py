"""Rectified flow as in Open-Sora 1.2 and 1.3: straight paths, whose velocity points from the noise to the data.

    t   uniform, logit-normal or whole numbers, in [0, n); n is 1000
    t'  = n r u / (1 + (r - 1) u), u = t / n                 r: by pixels and frames, see ``transform_ratio``
    x_t = (1 - t'/n) x0 + t'/n noise
    v   = x0 - noise                                          the target

Latents that are known stand in x_t as they are, and the caller leaves them out of the loss.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from opensora.schedulers.base import Noised, exact, first_outputs
from opensora.schedulers.timesteps import draw_per_sample, time_shift, uniform_per_sample
from opensora.utils.limits import Limits
from opensora.utils.tokens import Grid

BASE_PIXELS = 512 * 512  # of a clip whose times are not moved, if it has one latent frame
MAX_LOC = 50.0  # the sigmoid is 0 or 1 beyond


@dataclass(frozen=True, kw_only=True)
class RectifiedFlowV1Config:
    """The objective."""

    kind: Literal["rectified_flow_v1"] = "rectified_flow_v1"
    version: Literal["1.2", "1.3"] = "1.2"  # of Open-Sora, whose rule for the latent frames of a clip is used
    num_timesteps: int = 1000  # n
    use_discrete_timesteps: bool = False  # whole numbers
    sample_method: Literal["uniform", "logit-normal"] = "uniform"  # of times that are not whole numbers
    loc: float = 0.0  # of logit-normal
    scale: float = 1.0
    use_timestep_transform: bool = False  # more noise for more pixels and frames
    transform_scale: float = 1.0  # factor of r; 1.2 has it in training alone, 1.3 in sampling videos alone
    scale_temporal: bool = True  # 1.3: r grows with the frames
    uniform_over_threshold: float | None = None  # 1.3: times of videos that lie above it, as a part of n, are drawn
    # anew, all alike between it and n; null: they stay

    LIMITS: ClassVar[Limits] = {
        "num_timesteps": (100_000, "more change nothing that fp32 could show"),
        "loc": (MAX_LOC, "all times would be noise"),
        "scale": (1000.0, "all times would be noise or data"),
        "transform_scale": (1000.0, "all times would be noise"),
    }

    def __post_init__(self) -> None:
        if self.version not in ("1.2", "1.3"):
            raise ValueError(f"version={self.version}: must be 1.2 or 1.3")
        if self.num_timesteps < 1:
            raise ValueError(f"num_timesteps={self.num_timesteps}: must be an integer >= 1")
        if self.sample_method not in ("uniform", "logit-normal"):
            raise ValueError(f"sample_method={self.sample_method}: must be uniform or logit-normal")
        if self.loc < -MAX_LOC:
            raise ValueError(f"loc={self.loc}: must be a number from -{MAX_LOC:g} to {MAX_LOC:g}")
        for name in ("scale", "transform_scale"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be a number > 0")
        if not self.scale_temporal and self.version == "1.2":
            raise ValueError("scale_temporal=false: is for version=1.3")
        threshold = self.uniform_over_threshold
        if threshold is not None and not 0 <= threshold < 1:
            raise ValueError(f"uniform_over_threshold={threshold}: must be a number from 0 to below 1, or null")
        if threshold is not None and self.version == "1.2":
            raise ValueError(f"uniform_over_threshold={threshold}: is for version=1.3; must be null")

    def check_frames(self, frames: int) -> None:
        """That clips of so many frames have other times than 0.

        Raises:
            ValueError: they have not.
        """
        if self.use_timestep_transform and counted_frames(self, frames) == 0:
            raise ValueError(
                f"{frames} frames are {frames}//17*5 = 0 latent ones by the rule of objective.version=1.2, and all "
                "times would be 0; use 1 frame, 17 or more, or objective.use_timestep_transform=false"
            )


def counted_frames(cfg: RectifiedFlowV1Config, frames: int) -> int:
    """The latent frames that ``transform_ratio`` counts: whole groups of 17 frames as 5 in 1.2; in 1.3 every fourth."""
    if frames == 1 or not cfg.scale_temporal:
        return 1
    return frames // 17 * 5 if cfg.version == "1.2" else (frames - 1) // 4


def transform_ratio(cfg: RectifiedFlowV1Config, pixels: tuple[int, int, int], *, sampling: bool) -> float:
    """r = sqrt(height width / 512^2) sqrt(latent frames) scale, of a clip of (frames, height, width) pixels."""
    frames, height, width = pixels
    is_video = frames > 1 and cfg.scale_temporal
    scaled = sampling and is_video if cfg.version == "1.3" else not sampling
    ratio = math.sqrt(height * width / BASE_PIXELS) * math.sqrt(counted_frames(cfg, frames))
    return ratio * (cfg.transform_scale if scaled else 1.0)


def timestep_transform(t: Tensor, ratio: float, num_timesteps: int = 1000) -> Tensor:
    """Times in [0, n] moved to the noise; as they are for a ratio of 1."""
    return time_shift(ratio, t / num_timesteps) * num_timesteps


@dataclass(frozen=True)
class RectifiedFlowV1:
    """See ``Objective``."""

    cfg: RectifiedFlowV1Config
    outputs: ClassVar[int] = 1
    solvers: ClassVar[tuple[str, ...]] = ("euler",)

    @property
    def latest_time(self) -> float:
        """Times are below."""
        return float(self.cfg.num_timesteps)

    @property
    def needs_pixels(self) -> bool:
        """Whether times depend on the size of clips in pixels."""
        return self.cfg.use_timestep_transform

    def times(self, seed: int, step: int, sample_ids: tuple[int, ...], grid: Grid) -> Tensor:
        """t' (B,) fp32 on the CPU."""
        key = (seed, step, sample_ids)
        if self.cfg.sample_method == "logit-normal" and not self.cfg.use_discrete_timesteps:
            drawn = draw_per_sample(*key, "timestep", ())
        else:
            drawn = uniform_per_sample(*key, "timestep")
        return self.redrawn(self.at(drawn, grid), uniform_per_sample(*key, "timestep over threshold"), grid)

    def at(self, drawn: Tensor, grid: Grid) -> Tensor:
        """t' of uniform draws in [0, 1), or of standard normal ones for logit-normal times."""
        cfg = self.cfg
        if cfg.use_discrete_timesteps:
            t = (drawn * cfg.num_timesteps).floor()
        elif cfg.sample_method == "logit-normal":
            t = torch.sigmoid(cfg.loc + cfg.scale * drawn) * cfg.num_timesteps
        else:
            t = drawn * cfg.num_timesteps
        if cfg.use_timestep_transform:
            t = timestep_transform(t, transform_ratio(cfg, _pixels(grid), sampling=False), cfg.num_timesteps)
        return t

    def redrawn(self, t: Tensor, drawn: Tensor, grid: Grid) -> Tensor:
        """Times of videos above the threshold in other places above it, by uniform draws."""
        threshold = self.cfg.uniform_over_threshold
        if threshold is None or grid.latent_frames == 1:
            return t
        above = (threshold + (1 - threshold) * drawn) * self.cfg.num_timesteps
        return torch.where(t > threshold * self.cfg.num_timesteps, above, t)

    def noised(self, x0: Tensor, noise: Tensor, t: Tensor, known: Tensor | None = None) -> Noised:
        """x_t and the velocity."""
        x0, noise = exact(x0), exact(noise)
        at = (t.to(x0) / self.cfg.num_timesteps).view(-1, *[1] * (x0.ndim - 1))
        x = (1 - at) * x0 + at * noise
        if known is not None:
            x = torch.where(known[:, None], x0, x)
        return Noised(x, {"velocity": x0 - noise})

    def loss(self, prediction: Tensor, targets: Mapping[str, Tensor], t: Tensor) -> Tensor:
        """Squared differences of velocities."""
        target = exact(targets["velocity"])
        return (exact(first_outputs(prediction, target)) - target).square()


def sampling_times(
    cfg: RectifiedFlowV1Config, num_steps: int, grid: Grid, *, shift: bool = True, alpha: float | None = None
) -> list[float]:
    """n to 0, as the model reads them.

    Args:
        shift: False for evenly spaced times, whatever the model was trained with.
        alpha: the ratio of the transform; None: as in training.
    """
    n = cfg.num_timesteps
    times = [(1 - step / num_steps) * n for step in range(num_steps)]
    if cfg.use_discrete_timesteps:
        times = [float(round(t)) for t in times]
    if shift and (cfg.use_timestep_transform or alpha is not None):
        ratio = transform_ratio(cfg, _pixels(grid), sampling=True) if alpha is None else alpha
        times = [float(n), *timestep_transform(torch.tensor(times[1:], dtype=torch.float64), ratio, n).tolist()]
    return [*times, 0.0]


def _pixels(grid: Grid) -> tuple[int, int, int]:
    assert grid.pixels is not None, "the times of this flow depend on the size of a clip in pixels"
    return grid.pixels
