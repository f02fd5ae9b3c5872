"""Rotary positions over several axes (RoFormer, arXiv 2104.09864; the axes as in Flux).

Channel pair d of a head is rotated by position * frequency_d. Which two channels form the pair is the layout:
``interleaved`` pairs (2d, 2d+1), ``half`` pairs (d, Dh/2 + d). The layouts differ by a permutation of the q and k
channels, see ``mmdit/convert.py``.

Interleaved pairs are complex numbers in memory, so their rotation is one product: on a CPU core a third of the time of
the half-split rotation, forward and backward.
"""

from typing import Literal

import torch
from torch import Tensor

RopeLayout = Literal["interleaved", "half"]
RopeTable = tuple[Tensor, ...]  # interleaved: (e^ia,), complex (B, L, 1, Dh/2); half: (cos, -+sin), (B, L, 1, Dh) each


def rope_table(ids: Tensor, axes_dim: tuple[int, ...], theta: float, layout: RopeLayout) -> RopeTable:
    """What ``apply_rope`` needs for tokens at ids (B, L, axes), fp32 or fp64; Dh = sum(axes_dim)."""
    angles = []
    for axis, dim in enumerate(axes_dim):
        exponents = torch.arange(0, dim, 2, device=ids.device, dtype=ids.dtype) / dim
        angles.append(ids[..., axis, None] * theta**-exponents)  # (B, L, dim/2)
    joined = torch.cat(angles, dim=-1)[:, :, None, :]
    cos, sin = joined.cos(), joined.sin()
    if layout == "interleaved":
        return (torch.complex(cos, sin),)
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def apply_rope(x_BLHD: Tensor, table: RopeTable, layout: RopeLayout) -> Tensor:
    """Rotate every head of (B, L, H, Dh); computed in the precision of the table, returned in that of x."""
    if layout == "interleaved":
        (turns,) = table
        pairs = x_BLHD.to(turns.real.dtype).unflatten(-1, (-1, 2)).contiguous()
        return torch.view_as_real(torch.view_as_complex(pairs) * turns).flatten(-2).to(x_BLHD.dtype)
    cos, sin = table
    x = x_BLHD.to(cos.dtype)
    partners = x.roll(x.shape[-1] // 2, dims=-1)
    return torch.addcmul(x * cos, partners, sin).to(x_BLHD.dtype)
