"""Start latents, and the latent frames of a clip."""

import math

import torch
from torch import Tensor

from opensora.schedulers.timesteps import latent_frames
from opensora.utils.rng import torch_generator


def get_noise(
    num_samples: int,
    height: int,
    width: int,
    num_frames: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int | None = None,
    patch_size: int = 2,
    channels: int = 16,
    *,
    stride: tuple[int, int, int] = (4, 8, 8),
    causal: bool = True,
    published: bool = False,
    latents: int | None = None,
) -> Tensor:
    """Start latents (B, channels, T', H', W'), standard normal, from one generator keyed by the seed.

    Drawn on the CPU in fp32 and then moved, so that devices agree. H' and W' are rounded up to whole patches.

    Args:
        seed: must be given.
        latents: T', where an autoencoder makes others than ``stride`` and ``causal`` tell.
        published: draw as the family's own sampler does on a CPU: by a generator that has the seed itself.
    """
    if seed is None:
        raise TypeError("get_noise: seed is missing")
    frames = latent_frames(num_frames, stride[0], causal) if latents is None else latents
    rows = patch_size * math.ceil(height / (stride[1] * patch_size))
    columns = patch_size * math.ceil(width / (stride[2] * patch_size))
    shape = (num_samples, channels, frames, rows, columns)
    generator = torch.Generator().manual_seed(seed) if published else torch_generator(seed, "sampling noise")
    return torch.randn(shape, generator=generator).to(device, dtype)
