"""At which times a model is trained."""

import math

import torch
from torch import Tensor

from opensora.utils.rng import torch_generator


def draw_per_sample(seed: int, step: int, sample_ids: tuple[int, ...], purpose: str, shape: tuple[int, ...]) -> Tensor:
    """(B, *shape) fp32 standard normal on the CPU, row i from a generator keyed (seed, step, sample id i, purpose)."""
    rows = [torch.randn(shape, generator=torch_generator(seed, step, sample, purpose)) for sample in sample_ids]
    return torch.stack(rows) if rows else torch.empty(0, *shape)


def uniform_per_sample(seed: int, step: int, sample_ids: tuple[int, ...], purpose: str) -> Tensor:
    """(B,) fp32 in [0, 1) on the CPU, by the same keys."""
    rows = [torch.rand((), generator=torch_generator(seed, step, sample, purpose)) for sample in sample_ids]
    return torch.stack(rows) if rows else torch.empty(0)


def logit_normal(seed: int, step: int, sample_ids: tuple[int, ...]) -> Tensor:
    """(B,) fp32 in (0, 1): the sigmoid of a standard normal, more in the middle than at the ends (arXiv 2403.03206)."""
    return torch.sigmoid(draw_per_sample(seed, step, sample_ids, "timestep", ()))


def between(drawn: Tensor, low: float, high: float, *, normal: bool) -> Tensor:
    """Draws of u moved into [low, high], where they have the density that they have there without being moved.

    Args:
        drawn: (B,) uniform in [0, 1); or standard normal, ``normal``, where u is the sigmoid of that.

    Returns:
        (B,) fp64
    """
    ends, drawn = torch.tensor([low, high], dtype=torch.float64).clamp(0, 1), drawn.double()
    if not normal:
        return ends[0] + (ends[1] - ends[0]) * drawn
    least, most = torch.special.ndtr(torch.logit(ends))
    return torch.sigmoid(torch.special.ndtri(least + (most - least) * torch.special.ndtr(drawn)))


def latent_frames(num_frames: int, frame_stride: int = 4, causal: bool = True) -> int:
    """T' of a clip: 1 for a still, else (F-1)/stride + 1 for a causal autoencoder and F/stride for another, rounded up.

    Two at least of a video that is not coded causally: one latent frame is a still there, and decodes to one.
    """
    if num_frames == 1:
        return 1
    lead = int(causal)
    groups = -(-(num_frames - lead) // frame_stride)
    return groups + lead if causal or frame_stride == 1 else max(2, groups)


def coded_frames(num_frames: int, frame_stride: int = 4, causal: bool = True, multiple: int = 1) -> int:
    """The least frames, ``num_frames`` or more, that an autoencoder can code; those that were not asked for are cut off
    after decoding.

    Args:
        multiple: of latent frames, those that a token of the model spans. A still stays one.
    """
    if num_frames == 1:
        return 1
    lead = int(causal)
    latents = -(-latent_frames(num_frames, frame_stride, causal) // multiple) * multiple
    return (latents - lead) * frame_stride + lead


def flow_shift(tokens_per_frame: int, latent_frames: int) -> float:
    """alpha of ``time_shift``: 1 at 256 tokens to 3 at 4096, linear and beyond, times sqrt(T')."""
    return (1 + 2 * (tokens_per_frame - 256) / (4096 - 256)) * math.sqrt(latent_frames)


def time_shift(alpha: float, t: Tensor) -> Tensor:
    """t in [0, 1] -> alpha t / (1 + (alpha - 1) t): alpha > 1 moves times towards 1, the noise."""
    return alpha * t / (1 + (alpha - 1) * t)


def get_schedule(
    num_steps: int, tokens_per_frame: int, latent_frames: int, *, alpha: float | None = None, shift: bool = True
) -> list[float]:
    """num_steps + 1 times from 1 (noise) to 0 (data).

    Args:
        alpha: the shift; None: ``flow_shift(tokens_per_frame, latent_frames)``.
        shift: False for evenly spaced times.
    """
    times = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)
    if shift:
        times = time_shift(flow_shift(tokens_per_frame, latent_frames) if alpha is None else alpha, times)
    return times.tolist()
