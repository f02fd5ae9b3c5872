"""Scalars, pooled vectors and classes to the hidden size."""

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


class TimestepEmbedder(nn.Module):
    """Time of diffusion to a vector: sinusoid, Linear, SiLU, Linear (DiT; PixArt and Open-Sora 1.x use the same names).

    Times are in [0, 1000) and are not rescaled.
    """

    channels = 256  # of the sinusoid

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(self.channels, hidden), nn.SiLU(), nn.Linear(hidden, hidden))

    def forward(self, t: Tensor) -> Tensor:
        """(B,) -> (B, hidden), in the dtype of the weights. Sines are taken in fp32, or fp64 for fp64 weights."""
        dtype: torch.dtype = self.mlp[0].weight.dtype  # type: ignore[assignment]
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        return self.mlp(sinusoid(t.to(exact), self.channels, scale=1.0).to(dtype))


class SizeEmbedder(TimestepEmbedder):
    """Numbers that describe a clip (sides, their ratio, frames, frames per second): each is embedded as a time is."""

    def forward(self, t: Tensor) -> Tensor:
        """(B,) or (B, n) -> (B, n * hidden), one embedding after the other."""
        numbers = t if t.ndim == 2 else t[:, None]
        return super().forward(numbers.flatten()).unflatten(0, numbers.shape).flatten(1)


class LabelEmbedder(nn.Module):
    """A class to a vector; the last row of the table is no class."""

    def __init__(self, classes: int, hidden: int) -> None:
        super().__init__()
        self.classes = classes
        self.embedding_table = nn.Embedding(classes + 1, hidden)

    def forward(self, label: Tensor, dropped: Tensor | None = None) -> Tensor:
        """(B,) int64 -> (B, hidden). ``dropped`` (B,) bool: samples that are of no class."""
        if dropped is not None:
            label = torch.where(dropped, self.classes, label)
        return self.embedding_table(label)
