"""Rectified flow as in Open-Sora 2: straight paths from data (t=0) to noise (t=1), learned as velocities.

    u   ~ sigmoid(N(0, 1)), or uniform in [0, 1)
    t   = alpha u / (1 + (alpha - 1) u)                  more noise for more tokens and frames, see flow_shift
    x_t = (1 - t) x0 + (1 - (1 - s)(1 - t)) x1           x1 ~ N(0, I), s = sigma_min
    v   = (1 - s) x1 - x0                                the target, d x_t / dt

Of experts each is trained at a part of the times: there they have the density that they have without it, so that what
two experts see together is what one model would see.

Everything is fp32 (fp64 for fp64 latents). Latents that are known stand in x_t as they are, and the caller leaves them
out of the loss.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from opensora.schedulers.base import Noised, exact, first_outputs
from opensora.schedulers.timesteps import (
    between,
    draw_per_sample,
    flow_shift,
    logit_normal,
    time_shift,
    uniform_per_sample,
)
from opensora.utils.limits import Limits
from opensora.utils.tokens import Grid


@dataclass(frozen=True, kw_only=True)
class RectifiedFlowConfig:
    """The objective."""

    kind: Literal["rectified_flow"] = "rectified_flow"
    sigma_min: float = 1e-5  # how much noise is left in the data at t=0
    flow_shift: float | None = None  # alpha; null: from tokens per frame and latent frames
    sample_method: Literal["logit-normal", "uniform"] = "logit-normal"  # how u is drawn
    t_min: float = 0.0  # the least time that is drawn; above 0: an expert for high noise
    t_max: float = 1.0  # the greatest; below 1: an expert for low noise

    LIMITS: ClassVar[Limits] = {"flow_shift": (1000.0, "all times would be noise")}

    def __post_init__(self) -> None:
        if not 0 <= self.sigma_min < 1:
            raise ValueError(f"sigma_min={self.sigma_min}: must be a number from 0 to below 1")
        if self.flow_shift is not None and self.flow_shift <= 0:
            raise ValueError(f"flow_shift={self.flow_shift}: must be a number > 0, or null for the formula")
        if self.sample_method not in ("logit-normal", "uniform"):
            raise ValueError(f"sample_method={self.sample_method}: must be logit-normal or uniform")
        if not 0 <= self.t_min < 1:
            raise ValueError(f"t_min={self.t_min}: must be a number from 0 to below 1")
        if not self.t_min < self.t_max <= 1:
            raise ValueError(f"t_max={self.t_max}: must be a number above t_min={self.t_min}, and at most 1")


@dataclass(frozen=True)
class RectifiedFlow:
    """See ``Objective``."""

    cfg: RectifiedFlowConfig
    outputs: ClassVar[int] = 1
    solvers: ClassVar[tuple[str, ...]] = ("euler", "unipc", "dpm++")

    @property
    def time_range(self) -> tuple[float, float]:
        """The least and the greatest time that is drawn."""
        return self.cfg.t_min, self.cfg.t_max

    def times(self, seed: int, step: int, sample_ids: tuple[int, ...], grid: Grid) -> Tensor:
        """t (B,) fp32 on the CPU."""
        alpha = self.cfg.flow_shift
        if alpha is None:
            alpha = flow_shift(grid.places, grid.latent_frames)
        key, normal = (seed, step, sample_ids), self.cfg.sample_method == "logit-normal"
        if self.time_range == (0.0, 1.0):
            return time_shift(alpha, logit_normal(*key) if normal else uniform_per_sample(*key, "timestep"))
        drawn = draw_per_sample(*key, "timestep", ()) if normal else uniform_per_sample(*key, "timestep")
        ends = (time_shift(1 / alpha, torch.tensor(t, dtype=torch.float64)).item() for t in self.time_range)
        return time_shift(alpha, between(drawn, *ends, normal=normal)).clamp(*self.time_range).float()

    def noised(self, x0: Tensor, noise: Tensor, t: Tensor, known: Tensor | None = None) -> Noised:
        """x_t and the velocity."""
        x0, noise = exact(x0), exact(noise)
        at = t.to(x0).view(-1, *[1] * (x0.ndim - 1))
        x = (1 - at) * x0 + (1 - (1 - self.cfg.sigma_min) * (1 - at)) * noise
        if known is not None:
            x = torch.where(known[:, None], x0, x)
        return Noised(x, {"velocity": (1 - self.cfg.sigma_min) * noise - x0})

    def loss(self, prediction: Tensor, targets: Mapping[str, Tensor], t: Tensor) -> Tensor:
        """Squared differences of velocities."""
        target = exact(targets["velocity"])
        return (exact(first_outputs(prediction, target)) - target).square()
