"""What the model is told of known frames: cond = cat(mask, mask * latent), packed as the image tokens are."""

import torch
from torch import Tensor

from opensora.utils.tokens import pack


def unconditioned(x0: Tensor, patch: int) -> Tensor:
    """The condition of text-to-video: no frame is known. (B, C, T', H', W') -> zeros (B, N, (1+C)*p*p)."""
    b, c, *grid = x0.shape
    return pack(torch.zeros(b, 1 + c, *grid, dtype=x0.dtype, device=x0.device), patch)
