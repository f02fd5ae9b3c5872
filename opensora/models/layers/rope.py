"""Rotary positions over several axes (RoFormer, arXiv 2104.09864; the axes as in Flux).

Channel pair d of a head is rotated by position * frequency_d. Which two channels form the pair is the layout:
``interleaved`` pairs (2d, 2d+1), ``half`` pairs (d, Dh/2 + d). The layouts differ by a permutation of the q and k
channels, see ``mmdit/convert.py``.

Interleaved pairs are complex numbers in memory, so their rotation is one product: on a CPU core a third of the time of
the half-split rotation, forward and backward. Compilers for GPUs do not fuse complex numbers, so there, and wherever a
graph is traced, the same product is written in real ones; the table is the same memory for both.
"""

from typing import Literal

import torch
from torch import Tensor

RopeLayout = Literal["interleaved", "half"]
# interleaved: one tensor (B, L, 1, Dh/2, 2) of (cos, sin), which is e^ia; half: (cos, -+sin), (B, L, 1, Dh) each
RopeTable = tuple[Tensor, ...]


def rope_table(ids: Tensor, axes_dim: tuple[int, ...], theta: float, layout: RopeLayout) -> RopeTable:
    """What ``apply_rope`` needs for tokens at ids (B, L, axes), fp32 or fp64; Dh = sum(axes_dim)."""
    angles = []
    for axis, dim in enumerate(axes_dim):
        exponents = torch.arange(0, dim, 2, device=ids.device, dtype=ids.dtype) / dim
        angles.append(ids[..., axis, None] * theta**-exponents)  # (B, L, dim/2)
    joined = torch.cat(angles, dim=-1)[:, :, None, :]
    cos, sin = joined.cos(), joined.sin()
    if layout == "interleaved":
        return (torch.stack((cos, sin), dim=-1),)
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def apply_rope(x_BLHD: Tensor, table: RopeTable, layout: RopeLayout) -> Tensor:
    """Rotate every head of (B, L, H, Dh); computed in the precision of the table, returned in that of x."""
    if layout == "interleaved":
        (turns,) = table
        pairs = x_BLHD.to(turns.dtype).unflatten(-1, (-1, 2)).contiguous()  # (B, L, H, Dh/2, 2)
        complex_is_fast = pairs.device.type == "cpu" and not torch.compiler.is_compiling()
        return (_turned_complex if complex_is_fast else _turned_real)(pairs, turns).flatten(-2).to(x_BLHD.dtype)
    cos, sin = table
    x = x_BLHD.to(cos.dtype)
    partners = x.roll(x.shape[-1] // 2, dims=-1)
    return torch.addcmul(x * cos, partners, sin).to(x_BLHD.dtype)


def _turned_complex(pairs: Tensor, turns: Tensor) -> Tensor:
    """(B, L, H, Dh/2, 2) times (B, L, 1, Dh/2, 2), both taken for complex numbers."""
    return torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(turns))


def _turned_real(pairs: Tensor, turns: Tensor) -> Tensor:
    """The same: (a + bi)(cos + i sin) = (a cos - b sin) + (b cos + a sin)i."""
    cos, sin = turns.split(1, dim=-1)  # (B, L, 1, Dh/2, 1) each
    return pairs * cos + pairs.flip(-1) * torch.cat((-sin, sin), dim=-1)
