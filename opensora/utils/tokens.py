"""Latents as token rows, and where each token sits."""

import torch
from einops import rearrange
from torch import Tensor


def pack(latents_BCTHW: Tensor, patch: int) -> Tensor:
    """(B, C, T', H', W') -> (B, N, C * patch^2), tokens in (t, h, w) order, channels in (c, ph, pw) order.

    Raises:
        ValueError: H' or W' is not a multiple of ``patch``.
    """
    height, width = latents_BCTHW.shape[-2:]
    if height % patch or width % patch:
        raise ValueError(f"latents of {height}x{width} do not divide into patches: use multiples of patch={patch}")
    return rearrange(latents_BCTHW, "b c t (h ph) (w pw) -> b (t h w) (c ph pw)", ph=patch, pw=patch)


def unpack(tokens: Tensor, grid: tuple[int, int, int], patch: int) -> Tensor:
    """(B, N, C * patch^2) -> (B, C, T', H', W') with ``grid`` = (T', H', W'), the inverse of ``pack``."""
    frames, height, width = grid
    return rearrange(
        tokens,
        "b (t h w) (c ph pw) -> b c t (h ph) (w pw)",
        t=frames,
        h=height // patch,
        w=width // patch,
        ph=patch,
        pw=patch,
    )


def image_ids(grid: tuple[int, int, int], patch: int, device: torch.device | str | None = None) -> Tensor:
    """(N, 3) fp32: (t, h, w) of every token of a latent grid (T', H', W'), in the order of ``pack``."""
    frames, height, width = grid
    sizes = (frames, height // patch, width // patch)
    axes = [torch.arange(size, device=device, dtype=torch.float32) for size in sizes]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, 3)
