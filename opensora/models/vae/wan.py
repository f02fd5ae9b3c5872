"""Wan's causal autoencoders (4x8x8 with 16 channels of 2.1, 4x16x16 with 48 of 2.2), from a diffusers folder.

The network is diffusers' ``AutoencoderKLWan``: the first frame by itself, then 4 frames at a time beside what its
convolutions remember of the frames before, so that memory does not grow with the length of a clip but by its pixels.
Latents are (mode - mean) / deviation of every channel.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from opensora.models.base import AutoencoderShape, latent_grid
from opensora.models.vae.checkpoint import (
    AutoencoderWeights,
    Checkpoint,
    build_network,
    find_checkpoint,
    open_checkpoint,
)
from opensora.models.vae.tiles import TILE_LIMITS, Tiling, check_tiles, code_in_tiles, tilings
from opensora.models.vae.wan_sizes import COLOURS, WAN, WAN22, WanSizes, stated_sizes
from opensora.utils.limits import Limits
from opensora.utils.tasks import TaskRunner, one_by_one


@dataclass(frozen=True, kw_only=True)
class _Options:
    """What both kinds have in common."""

    path: str = ""
    spatial_tiling: bool = False  # frames larger than tile_size are coded in tiles, which is not what is coded whole
    tile_size: int = 256  # pixels
    tile_overlap: float = 0.25  # of a tile, with the next one
    micro_batch: int = 1  # clips coded at a time

    PUBLISHED: ClassVar[WanSizes] = WAN
    LIMITS: ClassVar[Limits] = {name: TILE_LIMITS[name] for name in ("tile_size", "micro_batch")}

    def __post_init__(self) -> None:
        check_tiles(self, self.PUBLISHED.stride)

    @property
    def tile_frames(self) -> int:
        """Clips are whole in time; a length that fits whenever ``tile_size`` does."""
        return self.tile_size


@dataclass(frozen=True, kw_only=True)
class WanVAEConfig(_Options):
    """Of Wan 2.1, and of 2.2 A14B: ``path`` is a diffusers folder (AutoencoderKLWan), or the pipeline's that has it."""

    kind: Literal["wan"] = "wan"


@dataclass(frozen=True, kw_only=True)
class Wan22VAEConfig(_Options):
    """Of Wan 2.2 TI2V-5B: ``path`` is a diffusers folder (AutoencoderKLWan), or the pipeline's that has it."""

    kind: Literal["wan22"] = "wan22"

    PUBLISHED: ClassVar[WanSizes] = WAN22


WanConfigs = WanVAEConfig | Wan22VAEConfig
WEIGHTS = {
    kind: AutoencoderWeights(
        kind=kind,
        published="the folder vae of a diffusers pipeline of Wan",
        top_level=("encoder", "decoder", "quant_conv", "post_quant_conv"),
        example_layer="encoder.mid_block.attentions.0.to_qkv",
        advice="fetch the folder again",
    )
    for kind in ("wan", "wan22")
}


class WanAutoencoder:
    """Every ``micro_batch`` samples, or every tile of them, are a piece of work of their own."""

    causal = True
    is_costly = True

    def __init__(self, cfg: WanConfigs, device: torch.device | str, dtype: torch.dtype) -> None:
        """On the meta device: without weights, to know sizes and memory by."""
        sizes = _sizes(cfg)
        self.cfg, self._dtype = cfg, dtype
        self.network: Any = build_network(sizes.build, cfg.path, WEIGHTS[cfg.kind], device, dtype)
        self.channels, self.stride = sizes.z_dim, sizes.stride
        self._mean, self._std = sizes.latents_mean, sizes.latents_std
        self._encoding, self._decoding = _tilings(cfg, sizes)

    @torch.no_grad()
    def encode(self, pixels: Tensor, run: TaskRunner = one_by_one) -> Tensor:
        """(B, 3, T, H, W) in [-1, 1], T = 4k + 1 -> (B, channels, T', H', W') fp32, fp64 of an fp64 network: the mode
        of the posterior, normalised."""
        frames, height, width = pixels.shape[2:]
        latent_grid(frames, height, width, self)
        x = pixels.to(self._dtype)
        mode = code_in_tiles(x, self._mode, self.channels, self._encoding, run, self.cfg.micro_batch)
        mean, std = self._statistics(mode)
        return (mode - mean) / std

    @torch.no_grad()
    def decode(self, latents: Tensor, run: TaskRunner = one_by_one) -> Tensor:
        """(B, channels, T', H', W') -> (B, 3, 4 (T' - 1) + 1, H, W) fp32, fp64 of an fp64 network, in [-1, 1]."""
        latents = latents.to(torch.promote_types(self._dtype, torch.float32))
        mean, std = self._statistics(latents)
        z = (latents * std + mean).to(self._dtype)
        return code_in_tiles(z, self._pixels, COLOURS, self._decoding, run, self.cfg.micro_batch)

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Means and deviations of channels, (C, 1, 1, 1) each."""
        mean, std = (torch.tensor(x, device=like.device, dtype=like.dtype) for x in (self._mean, self._std))
        return mean.view(-1, 1, 1, 1), std.view(-1, 1, 1, 1)

    def _mode(self, pixels: Tensor) -> Tensor:
        found: Tensor = self.network.encode(pixels).latent_dist.mode()
        return found

    def _pixels(self, z: Tensor) -> Tensor:
        found: Tensor = self.network.decode(z).sample
        return found


def check_wan(cfg: WanConfigs) -> None:
    """That the weights of ``cfg`` are there, with the names and shapes of such an autoencoder; reads headers only.

    Raises:
        UserError: they are not.
    """
    checkpoint = open_checkpoint(cfg.path, WEIGHTS[cfg.kind])
    checkpoint.check(_of(checkpoint, cfg).build)


def wan_shape(cfg: WanConfigs) -> AutoencoderShape:
    """The folder's own numbers where it exists, else the published ones."""
    sizes = _sizes(cfg)
    return AutoencoderShape(sizes.z_dim, sizes.stride, WanAutoencoder.causal)


def _sizes(cfg: WanConfigs) -> WanSizes:
    checkpoint = find_checkpoint(cfg.path, WEIGHTS[cfg.kind])
    return _of(checkpoint, cfg) if checkpoint else cfg.PUBLISHED


def _of(checkpoint: Checkpoint, cfg: WanConfigs) -> WanSizes:
    return stated_sizes(checkpoint.stated, checkpoint.path, cfg.PUBLISHED)


def _tilings(cfg: WanConfigs, sizes: WanSizes) -> tuple[Tiling, Tiling]:
    """For encoding and decoding: 256 pixels that have 64 in common, as ``enable_tiling`` of diffusers cuts 2.1."""
    check_tiles(cfg, sizes.stride)
    cut = partial(tilings, cfg, sizes.stride, in_space=cfg.spatial_tiling, in_time=False, lead=1)
    return cut(coded=lambda frames: (frames - 1) * sizes.stride[0] + 1)
