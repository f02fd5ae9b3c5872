"""Latents as token rows (patchify), and where each token sits."""

from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

Patch = tuple[int, int, int]  # latents per token along (t, h, w)


class Grid(NamedTuple):
    """The latents of a clip, and the patches that they are cut into."""

    latents: tuple[int, int, int]  # T', H', W'
    patch: tuple[int, int, int]  # latents per token along (t, h, w)
    pixels: tuple[int, int, int] | None = None  # frames, height and width of the clip, for who wants them

    @property
    def frames(self) -> int:
        """Tokens along time."""
        return self.latents[0] // self.patch[0]

    @property
    def places(self) -> int:
        """Tokens of one frame."""
        return (self.latents[1] // self.patch[1]) * (self.latents[2] // self.patch[2])

    @property
    def tokens(self) -> int:
        return self.frames * self.places

    @property
    def latent_frames(self) -> int:
        return self.latents[0]


def pack(latents_BCTHW: Tensor, patch: int | Patch) -> Tensor:
    """(B, C, T', H', W') -> (B, N, C * pt * ph * pw), tokens in (t, h, w) order, channels in (c, pt, ph, pw) order.

    Args:
        patch: latents per token, along (t, h, w), or in space alone.

    Raises:
        ValueError: T', H' or W' is not a multiple of ``patch``.
    """
    pt, ph, pw = _along_axes(patch)
    frames, height, width = latents_BCTHW.shape[-3:]
    if height % ph or width % pw:
        raise ValueError(f"latents of {height}x{width} do not divide into patches: use multiples of patch={ph}")
    if frames % pt:
        raise ValueError(f"{frames} latent frames do not divide into patches: use multiples of patch={pt}")
    return rearrange(latents_BCTHW, "b c (t pt) (h ph) (w pw) -> b (t h w) (c pt ph pw)", pt=pt, ph=ph, pw=pw)


def unpack(tokens: Tensor, grid: tuple[int, int, int], patch: int | Patch) -> Tensor:
    """(B, N, C * pt * ph * pw) -> (B, C, T', H', W') with ``grid`` = (T', H', W'), the inverse of ``pack``."""
    pt, ph, pw = _along_axes(patch)
    frames, height, width = grid
    return rearrange(
        tokens,
        "b (t h w) (c pt ph pw) -> b c (t pt) (h ph) (w pw)",
        t=frames // pt,
        h=height // ph,
        w=width // pw,
        pt=pt,
        ph=ph,
        pw=pw,
    )


def image_ids(grid: tuple[int, int, int], patch: int | Patch, device: torch.device | str | None = None) -> Tensor:
    """(N, 3) fp32: (t, h, w) of every token of a latent grid (T', H', W'), in the order of ``pack``."""
    sizes = [size // n for size, n in zip(grid, _along_axes(patch), strict=True)]
    axes = [torch.arange(size, device=device, dtype=torch.float32) for size in sizes]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, 3)


def _along_axes(patch: int | Patch) -> Patch:
    return (1, patch, patch) if isinstance(patch, int) else patch
