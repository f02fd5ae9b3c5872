"""HunyuanVideo's causal 3-D autoencoder (4x8x8, 16 channels): the published file, or a diffusers folder."""

from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from opensora.models.base import AutoencoderShape, Draw, latent_grid
from opensora.models.vae.checkpoint import (
    AutoencoderWeights,
    Checkpoint,
    build_network,
    find_checkpoint,
    open_checkpoint,
)
from opensora.models.vae.folder import MAX_CHANNELS, MAX_STRIDE
from opensora.models.vae.hunyuan_network import COLOURS, HunyuanSizes, HunyuanVAE
from opensora.models.vae.posterior import Posterior
from opensora.models.vae.tiles import TILE_LIMITS, Tiling, check_tiles, code_in_tiles, tilings
from opensora.utils.limits import Limits
from opensora.utils.tasks import TaskRunner, one_by_one

SCALE = 0.476986  # latents = SCALE * sample
PUBLISHED = HunyuanSizes()
WEIGHTS = AutoencoderWeights(
    kind="hunyuan",
    published="hunyuan_vae.safetensors",
    top_level=("encoder", "decoder", "quant_conv", "post_quant_conv"),
    example_layer="encoder.mid_block.attentions.0.to_q",
)


@dataclass(frozen=True, kw_only=True)
class HunyuanConfig:
    """``path`` is hunyuan_vae.safetensors, or a folder of diffusers (AutoencoderKLHunyuanVideo)."""

    kind: Literal["hunyuan"] = "hunyuan"
    path: str = ""
    sample: Literal["mode", "posterior"] = "mode"  # latents of a clip: the mode of its posterior, or a keyed draw of it
    spatial_tiling: bool = True  # frames larger than tile_size are coded in tiles
    temporal_tiling: bool = False  # clips longer than tile_frames, too; false: whole in time
    tile_size: int = 256  # pixels
    tile_frames: int = 64
    tile_overlap: float = 0.25  # of a tile, with the next one
    micro_batch: int = 1  # clips coded at a time
    compile: bool = False  # by torch.compile: for many clips of few sizes
    tiling: bool | None = None  # of earlier versions; true: 256 pixels, 64 frames; false: whole frames, 16 frames

    LIMITS: ClassVar[Limits] = TILE_LIMITS

    def __post_init__(self) -> None:
        check_tiles(self, PUBLISHED.stride)
        if self.tiling is not None:
            own = {"spatial_tiling", "temporal_tiling", "tile_size", "tile_frames", "tile_overlap"}
            for field in fields(self):
                if field.name in own and getattr(self, field.name) != field.default:
                    value = f"tiling={str(self.tiling).lower()}"
                    raise ValueError(f"{value}: is of earlier versions, and must be null beside {field.name}")

    @property
    def now(self) -> "HunyuanConfig":
        """The same in the options of now."""
        if self.tiling is None:
            return self
        frames = self.tile_frames if self.tiling else 16
        return replace(self, spatial_tiling=self.tiling, temporal_tiling=True, tile_frames=frames, tiling=None)


class HunyuanAutoencoder:
    """Every tile of every ``micro_batch`` samples is a piece of work of its own."""

    causal = True
    is_costly = True

    def __init__(self, cfg: HunyuanConfig, device: torch.device | str, dtype: torch.dtype) -> None:
        """On the meta device: without weights, to know sizes and memory by."""
        sizes, build = _network(cfg)
        self.cfg, self._dtype = cfg, dtype
        self.network: HunyuanVAE = build_network(build, cfg.path, WEIGHTS, device, dtype)
        self.channels, self.stride = sizes.channels, sizes.stride
        self.samples = cfg.sample == "posterior"
        self._encoding, self._decoding = hunyuan_tilings(cfg, sizes)
        compiled: Any = torch.compile if cfg.compile else lambda function: function
        self._encode, self._decode = compiled(self.network.encode), compiled(self.network.decode)

    @torch.no_grad()
    def encode(self, pixels: Tensor, run: TaskRunner = one_by_one, draw: Draw | None = None) -> Tensor:
        """(B, 3, T, H, W) in [-1, 1] -> (B, channels, T', H', W') fp32: the mode, or a sample where ``vae.sample`` says
        so and ``draw`` gives standard normal noise."""
        if not self.samples or draw is None:
            return self._code(pixels, self._mean, self.channels, run).float() * SCALE
        posterior = self.posterior(pixels, run)
        return posterior.sample(draw(tuple(posterior.mean.shape[1:]))).float() * SCALE

    @torch.no_grad()
    def posterior(self, pixels: Tensor, run: TaskRunner = one_by_one) -> Posterior:
        """Of (B, 3, T, H, W) in [-1, 1]."""
        return Posterior.of(self._code(pixels, self._moments, 2 * self.channels, run))

    @torch.no_grad()
    def decode(self, latents: Tensor, run: TaskRunner = one_by_one, *, clamp: bool = True) -> Tensor:
        """(B, channels, T', H', W') -> (B, 3, T, H, W) fp32, in [-1, 1] unless ``clamp`` is off."""
        z = (latents.float() / SCALE).to(self._dtype)
        pixels = code_in_tiles(z, self._decode, COLOURS, self._decoding, run, self.cfg.micro_batch).float()
        return pixels.clamp_(-1, 1) if clamp else pixels

    def _code(self, pixels: Tensor, code: Any, channels: int, run: TaskRunner) -> Tensor:
        frames, height, width = pixels.shape[2:]
        latent_grid(frames, height, width, self)
        return code_in_tiles(pixels.to(self._dtype), code, channels, self._encoding, run, self.cfg.micro_batch)

    def _moments(self, x: Tensor) -> Tensor:
        return self._encode(x)

    def _mean(self, x: Tensor) -> Tensor:
        return self._encode(x)[:, : self.channels]


def check_hunyuan(cfg: HunyuanConfig) -> None:
    """That the weights of ``cfg`` are there, with the names and shapes of such an autoencoder; reads headers only.

    Raises:
        UserError: they are not.
    """
    checkpoint = open_checkpoint(cfg.path, WEIGHTS)
    checkpoint.check(partial(HunyuanVAE, network_sizes(checkpoint)))


def _network(cfg: HunyuanConfig) -> tuple[HunyuanSizes, Any]:
    """Sizes of the network of ``cfg``, and what builds it."""
    checkpoint = find_checkpoint(cfg.path, WEIGHTS)
    sizes = network_sizes(checkpoint) if checkpoint else PUBLISHED
    return sizes, partial(HunyuanVAE, sizes)


def network_sizes(checkpoint: Checkpoint) -> HunyuanSizes:
    """What the tensors of a checkpoint say, and config.json of what they do not."""
    first = "encoder.down_blocks.0.resnets.{}.conv1.conv.weight"
    return HunyuanSizes(
        widths=checkpoint.widths("encoder.down_blocks.{}.resnets.0.conv1.conv.weight", PUBLISHED.widths),
        layers=checkpoint.count(first, PUBLISHED.layers),
        groups=checkpoint.number("norm_num_groups", PUBLISHED.groups, MAX_CHANNELS),
        channels=checkpoint.shapes.get("post_quant_conv.weight", (PUBLISHED.channels,))[0],
        space_levels=checkpoint.levels("spatial_compression_ratio", PUBLISHED.stride[1], MAX_STRIDE),
        time_levels=checkpoint.levels("temporal_compression_ratio", PUBLISHED.stride[0], MAX_STRIDE),
    )


def hunyuan_tilings(cfg: HunyuanConfig, sizes: HunyuanSizes) -> tuple[Tiling, Tiling]:
    """For encoding and decoding."""
    now, stride = cfg.now, sizes.stride
    check_tiles(now, stride)
    return tilings(
        now,
        stride,
        in_space=now.spatial_tiling,
        in_time=now.temporal_tiling,
        lead=1,
        coded=lambda frames: (frames - 1) * stride[0] + 1,
    )


def hunyuan_shape(cfg: HunyuanConfig) -> AutoencoderShape:
    """The file's own numbers where it exists, else the published ones."""
    sizes, _ = _network(cfg)
    return AutoencoderShape(sizes.channels, sizes.stride, HunyuanAutoencoder.causal)
