"""Fixed positions: sines and cosines of where a token is, added to it where it enters a model (MAE, DiT).

Every token's are computed from its own coordinates, so a process with a share of the tokens has those of its share.
Sines are taken in fp64 and rounded to fp32, as the tables in published files were.
"""

import math

import torch
from torch import Tensor


def sincos(positions: Tensor, dim: int) -> Tensor:
    """(...,) -> (..., dim) fp32: sin, then cos, of ``position * 10000^(-k / (dim / 2))``. The embedding of times has
    cosines first (``sinusoid``)."""
    half = dim // 2
    frequencies = 10000.0 ** (-torch.arange(half, device=positions.device, dtype=torch.float64) / half)
    angles = positions.to(torch.float64)[..., None] * frequencies
    return torch.cat((angles.sin(), angles.cos()), dim=-1).float()


def sincos_2d(rows: Tensor, columns: Tensor, dim: int) -> Tensor:
    """(...,) twice -> (..., dim) fp32: half of the channels for the column, which comes first, half for the row."""
    return torch.cat((sincos(columns, dim // 2), sincos(rows, dim // 2)), dim=-1)


def scaled(positions: Tensor, scale: float | Tensor, base: float | None = None, count: int = 1) -> Tensor:
    """Coordinates in tokens -> coordinates for a table: ``i / scale``, and ``i / scale * base / count`` where a grid of
    ``base`` tokens along a side is stretched over one of ``count``.

    In fp32, in this order, as published models were trained.
    """
    found = positions.float() / scale
    return found if base is None else found * (base / count)


def base_side(places: int, *, nearest: bool = False) -> int:
    """Side of a square of so many tokens, rounded down (PixArt), or to the nearest (Open-Sora 1.1 and later)."""
    return round(places**0.5) if nearest else math.isqrt(places)
