"""HunyuanVideo's causal 3-D autoencoder (4x8x8, 16 channels), from a local diffusers folder."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from opensora.models.base import AutoencoderShape
from opensora.models.vae.folder import MAX_CHANNELS, MAX_STRIDE, load_frozen, stated_number
from opensora.models.vae.tiles import Size, Tiling, code_in_tiles
from opensora.utils.tasks import TaskRunner, one_by_one

SCALE = 0.476986  # latents = SCALE * sample
COLOURS = 3
TILE_PIXELS, TILE_FRAMES, TILE_OVERLAP = 256, 64, 0.25


@dataclass(frozen=True, kw_only=True)
class HunyuanConfig:
    """``path`` holds config.json and the weights (diffusers AutoencoderKLHunyuanVideo)."""

    kind: Literal["hunyuan"] = "hunyuan"
    path: str = ""
    tiling: bool = False  # code long or large clips in tiles of 256 pixels and 64 frames that overlap by a quarter


class HunyuanAutoencoder:
    """Encodes to the mode of the posterior (no random draw: the same clip gives the same latents).

    A sample is coded by itself, and long clips always in parts: diffusers cuts time into windows of 16 frames that
    overlap, ``tiling`` makes them longer and cuts space too.
    """

    causal = True
    is_costly = True

    def __init__(self, cfg: HunyuanConfig, device: torch.device | str, dtype: torch.dtype) -> None:
        from diffusers import AutoencoderKLHunyuanVideo

        self._model: Any = load_frozen(AutoencoderKLHunyuanVideo, cfg.path, device, dtype)
        self._dtype = dtype
        self.channels, self.stride, _ = hunyuan_shape(cfg)
        if cfg.tiling:
            self._model.enable_tiling(
                tile_sample_min_height=TILE_PIXELS,
                tile_sample_min_width=TILE_PIXELS,
                tile_sample_min_num_frames=TILE_FRAMES,
                tile_sample_stride_height=int(TILE_PIXELS * (1 - TILE_OVERLAP)),
                tile_sample_stride_width=int(TILE_PIXELS * (1 - TILE_OVERLAP)),
                tile_sample_stride_num_frames=int(TILE_FRAMES * (1 - TILE_OVERLAP)),
            )
        self._encoding, self._decoding = _tilings(self._model, self.stride)

    @torch.no_grad()
    def encode(self, pixels: Tensor, run: TaskRunner = one_by_one) -> Tensor:
        """(B, 3, T, H, W) in [-1, 1] -> (B, channels, T', H', W') fp32."""
        x = pixels.to(self._dtype)
        return code_in_tiles(x, self._encode_tile, self.channels, self._encoding, run).float() * SCALE

    @torch.no_grad()
    def decode(self, latents: Tensor, run: TaskRunner = one_by_one) -> Tensor:
        """(B, channels, T', H', W') -> (B, 3, T, H, W) fp32, clamped to [-1, 1]."""
        z = (latents.float() / SCALE).to(self._dtype)
        return code_in_tiles(z, self._decode_tile, COLOURS, self._decoding, run).float().clamp(-1, 1)

    def _encode_tile(self, x: Tensor) -> Tensor:
        mean, _ = self._model.quant_conv(self._model.encoder(x)).chunk(2, dim=1)
        return mean

    def _decode_tile(self, z: Tensor) -> Tensor:
        return self._model.decoder(self._model.post_quant_conv(z))


def _tilings(model: Any, stride: Size) -> tuple[Tiling, Tiling]:
    """How the diffusers model, as it is set, tiles clips for encoding and latents for decoding."""
    window, step = (
        (
            getattr(model, f"tile_sample_{kind}_num_frames"),
            getattr(model, f"tile_sample_{kind}_height"),
            getattr(model, f"tile_sample_{kind}_width"),
        )
        for kind in ("min", "stride")
    )
    small_window, small_step = (_each(lambda a, b: a // b, size, stride) for size in (window, step))
    minus = int.__sub__
    encoding = Tiling(
        window=window,
        stride=step,
        in_space=model.use_tiling,
        out_stride=small_step,
        blend=_each(minus, small_window, small_step),
        coded=lambda t, h, w: ((t - 1) // stride[0] + 1, h // stride[1], w // stride[2]),
    )
    decoding = Tiling(
        window=small_window,
        stride=small_step,
        in_space=model.use_tiling,
        out_stride=step,
        blend=_each(minus, window, step),
        coded=lambda t, h, w: ((t - 1) * stride[0] + 1, h * stride[1], w * stride[2]),
    )
    return encoding, decoding


def _each(operation: Callable[[int, int], int], a: Size, b: Size) -> Size:
    return operation(a[0], b[0]), operation(a[1], b[1]), operation(a[2], b[2])


def hunyuan_shape(cfg: HunyuanConfig) -> AutoencoderShape:
    """The folder's own numbers where it exists, else the published ones."""
    spatial = stated_number(cfg.path, "spatial_compression_ratio", 8, MAX_STRIDE)
    frames = stated_number(cfg.path, "temporal_compression_ratio", 4, MAX_STRIDE)
    channels = stated_number(cfg.path, "latent_channels", 16, MAX_CHANNELS)
    return AutoencoderShape(channels, (frames, spatial, spatial), HunyuanAutoencoder.causal)
