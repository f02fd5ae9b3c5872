"""HunyuanVideo's causal 3-D autoencoder (4x8x8, 16 channels), from a local diffusers folder."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from opensora.models.vae.folder import load_frozen, stated_shape

SCALE = 0.476986  # latents = SCALE * sample
TILE_PIXELS, TILE_FRAMES, TILE_OVERLAP = 256, 64, 0.25


@dataclass(frozen=True, kw_only=True)
class HunyuanConfig:
    """``path`` holds config.json and the weights (diffusers AutoencoderKLHunyuanVideo)."""

    kind: Literal["hunyuan"] = "hunyuan"
    path: str = ""
    tiling: bool = False  # code long or large clips in tiles of 256 pixels and 64 frames that overlap by a quarter


class HunyuanAutoencoder:
    """Encodes to the mode of the posterior (no random draw: the same clip gives the same latents)."""

    causal = True

    def __init__(self, cfg: HunyuanConfig, device: torch.device | str, dtype: torch.dtype) -> None:
        from diffusers import AutoencoderKLHunyuanVideo

        self._model: Any = load_frozen(AutoencoderKLHunyuanVideo, cfg.path, device, dtype)
        self._dtype = dtype
        self.channels, self.stride = hunyuan_shape(cfg)
        if cfg.tiling:
            self._model.enable_tiling(
                tile_sample_min_height=TILE_PIXELS,
                tile_sample_min_width=TILE_PIXELS,
                tile_sample_min_num_frames=TILE_FRAMES,
                tile_sample_stride_height=int(TILE_PIXELS * (1 - TILE_OVERLAP)),
                tile_sample_stride_width=int(TILE_PIXELS * (1 - TILE_OVERLAP)),
                tile_sample_stride_num_frames=int(TILE_FRAMES * (1 - TILE_OVERLAP)),
            )

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """(B, 3, T, H, W) in [-1, 1] -> (B, channels, T', H', W') fp32."""
        posterior = self._model.encode(pixels.to(self._dtype)).latent_dist
        return posterior.mode().float() * SCALE

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """(B, channels, T', H', W') -> (B, 3, T, H, W) fp32, clamped to [-1, 1]."""
        return self._model.decode((latents.float() / SCALE).to(self._dtype)).sample.float().clamp(-1, 1)


def hunyuan_shape(cfg: HunyuanConfig) -> tuple[int, tuple[int, int, int]]:
    """(channels, stride): the folder's own numbers where it exists, else the published ones."""
    stated = stated_shape(cfg.path)
    spatial = stated.get("spatial_compression_ratio", 8)
    return stated.get("latent_channels", 16), (stated.get("temporal_compression_ratio", 4), spatial, spatial)
