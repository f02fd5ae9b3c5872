"""Scalars and pooled vectors to the hidden size."""

import math

import torch
from torch import Tensor, nn


def sinusoid(t: Tensor, dim: int = 256, *, scale: float = 1000.0, max_period: float = 10000.0) -> Tensor:
    """(B,) -> (B, dim): cos then sin of ``scale * t * max_period^(-i / (dim/2))``, in the dtype of ``t``.

    ``t`` must be fp32 or fp64: in bf16 neighbouring timesteps near t=1 are the same number.
    """
    half = dim // 2
    frequencies = torch.exp(torch.arange(half, device=t.device, dtype=t.dtype) * (-math.log(max_period) / half))
    angles = (scale * t)[:, None] * frequencies  # (B, dim/2)
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


class MLPEmbedder(nn.Module):
    """Linear, SiLU, Linear: (B, in_dim) -> (B, hidden)."""

    def __init__(self, in_dim: int, hidden: int) -> None:
        super().__init__()
        self.in_layer = nn.Linear(in_dim, hidden)
        self.act = nn.SiLU()
        self.out_layer = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(self.act(self.in_layer(x.to(self.in_layer.weight.dtype))))
