"""Rectified flow as in Open-Sora 2: straight paths from data (t=0) to noise (t=1), learned as velocities.

    u   ~ sigmoid(N(0, 1))
    t   = alpha u / (1 + (alpha - 1) u)                  more noise for more tokens and frames, see flow_shift
    x_t = (1 - t) x0 + (1 - (1 - s)(1 - t)) x1           x1 ~ N(0, I), s = sigma_min
    v   = (1 - s) x1 - x0                                the target, d x_t / dt

Everything is fp32 (fp64 for fp64 latents). Draws belong to samples: whoever holds a sample at a step draws the same
time, noise and dropout, on any layout.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from opensora.schedulers.timesteps import draw_per_sample, flow_shift, logit_normal, time_shift
from opensora.utils.limits import Limits
from opensora.utils.rng import numpy_generator


@dataclass(frozen=True, kw_only=True)
class RectifiedFlowConfig:
    """The objective."""

    kind: Literal["rectified_flow"] = "rectified_flow"
    sigma_min: float = 1e-5  # how much noise is left in the data at t=0
    flow_shift: float | None = None  # alpha; null: from tokens per frame and latent frames
    text_dropout: float = 0.31622777  # per sample and per text input (tokens, pooled); both at once: its square, 0.1

    LIMITS: ClassVar[Limits] = {"flow_shift": (1000.0, "all times would be noise")}

    def __post_init__(self) -> None:
        if not 0 <= self.sigma_min < 1:
            raise ValueError(f"sigma_min={self.sigma_min}: must be a number from 0 to below 1")
        if self.flow_shift is not None and self.flow_shift <= 0:
            raise ValueError(f"flow_shift={self.flow_shift}: must be a number > 0, or null for the formula")
        if not 0 <= self.text_dropout <= 1:
            raise ValueError(f"text_dropout={self.text_dropout}: must be a number from 0 to 1")


def sample_timesteps(
    seed: int,
    step: int,
    sample_ids: tuple[int, ...],
    grid: tuple[int, int, int],
    patch: int,
    cfg: RectifiedFlowConfig,
) -> Tensor:
    """t (B,) fp32 on the CPU for clips with latent grid (T', H', W'), ``patch`` latents per token side."""
    frames, height, width = grid
    alpha = cfg.flow_shift if cfg.flow_shift is not None else flow_shift((height // patch) * (width // patch), frames)
    return time_shift(alpha, logit_normal(seed, step, sample_ids))


def sample_noise(seed: int, step: int, sample_ids: tuple[int, ...], latent_shape: tuple[int, ...]) -> Tensor:
    """x1 (B, C, T', H', W') fp32 on the CPU, for ``latent_shape`` = (C, T', H', W')."""
    return draw_per_sample(seed, step, sample_ids, "noise", latent_shape)


def corrupt(x0: Tensor, noise: Tensor, t: Tensor, cfg: RectifiedFlowConfig) -> Tensor:
    """x_t of the shape of x0 (B, ...), in fp32 (fp64 for fp64 x0), for t (B,)."""
    x0, noise = _exact(x0), _exact(noise)
    t = t.to(x0).view(-1, *[1] * (x0.ndim - 1))
    return (1 - t) * x0 + (1 - (1 - cfg.sigma_min) * (1 - t)) * noise


def target(x0: Tensor, noise: Tensor, cfg: RectifiedFlowConfig) -> Tensor:
    """The velocity (1 - s) x1 - x0, in fp32 (fp64 for fp64 x0)."""
    return (1 - cfg.sigma_min) * _exact(noise) - _exact(x0)


def squared_error(v: Tensor, target: Tensor) -> Tensor:
    """Sum (not mean) of squared differences, a scalar in fp32 (fp64 if either input is).

    The caller divides by the number of elements of the whole global batch, so that shares add up to its mean.
    """
    return (_exact(v) - _exact(target)).square().sum()


def drop_text(seed: int, step: int, sample_ids: tuple[int, ...], p: float) -> tuple[Tensor, Tensor]:
    """Which samples lose their text tokens, and which their pooled prompt: two (B,) bool, independent, each with p."""

    def draw(purpose: str) -> Tensor:
        dropped = [numpy_generator(seed, step, sample, purpose).random() < p for sample in sample_ids]
        return torch.tensor(dropped, dtype=torch.bool)

    return draw("drop_txt"), draw("drop_vec")


def _exact(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
