"""At which times a model is trained."""

import torch
from torch import Tensor

from opensora.utils.rng import torch_generator


def draw_per_sample(seed: int, step: int, sample_ids: tuple[int, ...], purpose: str, shape: tuple[int, ...]) -> Tensor:
    """(B, *shape) fp32 standard normal on the CPU, row i from a generator keyed (seed, step, sample id i, purpose)."""
    rows = [torch.randn(shape, generator=torch_generator(seed, step, sample, purpose)) for sample in sample_ids]
    return torch.stack(rows) if rows else torch.empty(0, *shape)


def logit_normal(seed: int, step: int, sample_ids: tuple[int, ...]) -> Tensor:
    """(B,) fp32 in (0, 1): the sigmoid of a standard normal, more in the middle than at the ends (arXiv 2403.03206)."""
    return torch.sigmoid(draw_per_sample(seed, step, sample_ids, "timestep", ()))
