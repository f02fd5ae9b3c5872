"""Flux's 2-D autoencoder (8x, 16 channels), from a local diffusers folder; a clip is coded frame by frame."""

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from einops import rearrange
from torch import Tensor

from opensora.models.base import AutoencoderShape
from opensora.models.vae.folder import KEY, MAX_CHANNELS, load_frozen, stated_number, stated_shape
from opensora.utils.errors import UserError
from opensora.utils.limits import Limits
from opensora.utils.tasks import Task, TaskRunner, one_by_one

COLOURS = 3
MAX_LEVELS = 7  # each halves the frame
SCALE, SHIFT = 0.3611, 0.1159  # latents = SCALE * (sample - SHIFT)


@dataclass(frozen=True, kw_only=True)
class Flux2DConfig:
    """``path`` holds config.json and the weights (diffusers AutoencoderKL)."""

    kind: Literal["flux2d"] = "flux2d"
    path: str = ""
    micro_batch: int = 8  # frames coded at a time

    LIMITS: ClassVar[Limits] = {"micro_batch": (100_000, "they are in memory together")}

    def __post_init__(self) -> None:
        if self.micro_batch < 1:
            raise ValueError(f"micro_batch={self.micro_batch}: must be an integer >= 1")


class Flux2DAutoencoder:
    """No compression in time: T' = T, any number of frames. Encodes to the mode of the posterior."""

    causal = False
    is_costly = True

    def __init__(self, cfg: Flux2DConfig, device: torch.device | str, dtype: torch.dtype) -> None:
        from diffusers import AutoencoderKL

        self.cfg = cfg
        self._model: Any = load_frozen(AutoencoderKL, cfg.path, device, dtype)
        self._dtype = dtype
        self.channels, self.stride, _ = flux2d_shape(cfg)

    @torch.no_grad()
    def encode(self, pixels: Tensor, run: TaskRunner = one_by_one) -> Tensor:
        """(B, 3, T, H, W) in [-1, 1] -> (B, channels, T, H', W') fp32."""
        frames = rearrange(pixels, "b c t h w -> (b t) c h w").to(self._dtype)
        size = (
            self.channels,
            *(side // stride for side, stride in zip(frames.shape[2:], self.stride[1:], strict=True)),
        )
        parts = run([Task(partial(self._encode, x), (len(x), *size)) for x in frames.split(self.cfg.micro_batch)])
        return rearrange((torch.cat(parts).float() - SHIFT) * SCALE, "(b t) c h w -> b c t h w", b=len(pixels))

    @torch.no_grad()
    def decode(self, latents: Tensor, run: TaskRunner = one_by_one) -> Tensor:
        """(B, channels, T, H', W') -> (B, 3, T, H, W) fp32, clamped to [-1, 1]."""
        frames = rearrange(latents.float() / SCALE + SHIFT, "b c t h w -> (b t) c h w").to(self._dtype)
        size = (COLOURS, *(side * stride for side, stride in zip(frames.shape[2:], self.stride[1:], strict=True)))
        parts = run([Task(partial(self._decode, z), (len(z), *size)) for z in frames.split(self.cfg.micro_batch)])
        return rearrange(torch.cat(parts).float(), "(b t) c h w -> b c t h w", b=len(latents)).clamp(-1, 1)

    def _encode(self, frames: Tensor) -> Tensor:
        return self._model.encode(frames).latent_dist.mode()

    def _decode(self, latents: Tensor) -> Tensor:
        return self._model.decode(latents).sample


def flux2d_shape(cfg: Flux2DConfig) -> AutoencoderShape:
    """The folder's own numbers where it exists, else the published ones."""
    levels = stated_shape(cfg.path).get("block_out_channels", [0] * 4)
    if not isinstance(levels, list) or not 1 <= len(levels) <= MAX_LEVELS:
        raise UserError(f"{KEY}={cfg.path}: config.json has block_out_channels={levels!r}; must be a list of numbers")
    spatial = 2 ** (len(levels) - 1)
    channels = stated_number(cfg.path, "latent_channels", 16, MAX_CHANNELS)
    return AutoencoderShape(channels, (1, spatial, spatial), Flux2DAutoencoder.causal)
