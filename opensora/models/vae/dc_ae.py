"""Open-Sora's video DC-AE (4x32x32, 128 channels), from its published file."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from opensora.models.base import AutoencoderShape, decoded_frames, latent_grid
from opensora.models.vae.checkpoint import (
    AutoencoderWeights,
    Checkpoint,
    build_network,
    find_checkpoint,
    open_checkpoint,
)
from opensora.models.vae.dc_ae_network import COLOURS, DCAESizes, VideoDCAE
from opensora.models.vae.tiles import TILE_LIMITS, check_tiles, code_in_tiles, tilings
from opensora.models.weights.rows import Shape
from opensora.utils.limits import SCALE, Limits
from opensora.utils.tasks import TaskRunner, one_by_one

PUBLISHED = DCAESizes()
MAX_STAGES, MAX_DEPTH = 8, 64
WEIGHTS = AutoencoderWeights(
    kind="dc_ae",
    published="F32T4C128_AE.safetensors",
    top_level=("encoder", "decoder"),
    example_layer="encoder.project_in.conv",
)


@dataclass(frozen=True, kw_only=True)
class DCAEConfig:
    """``path`` is the published file, F32T4C128_AE.safetensors, or its folder. The model behind it has patch_size 1."""

    kind: Literal["dc_ae"] = "dc_ae"
    path: str = ""
    scale: float = 0.493  # latents are divided by it, in training and in sampling
    spatial_tiling: bool = True  # frames larger than tile_size are coded in tiles
    temporal_tiling: bool = True  # clips longer than tile_frames, too; false: whole in time
    tile_size: int = 256  # pixels
    tile_frames: int = 32
    tile_overlap: float = 0.25  # of a tile, with the next one
    micro_batch: int = 1  # clips coded at a time
    compile: bool = False  # by torch.compile: for many clips of few sizes

    LIMITS: ClassVar[Limits] = {**TILE_LIMITS, "scale": SCALE}

    def __post_init__(self) -> None:
        check_tiles(self, PUBLISHED.stride)
        if self.scale <= 0:
            raise ValueError(f"scale={self.scale}: must be a number > 0")


class DCAEAutoencoder:
    """Every tile of every ``micro_batch`` samples is a piece of work of its own. No posterior: a clip has one code."""

    causal = False
    is_costly = True

    def __init__(self, cfg: DCAEConfig, device: torch.device | str, dtype: torch.dtype) -> None:
        """On the meta device: without weights, to know sizes and memory by."""
        sizes = _sizes(cfg)
        self.cfg, self._dtype = cfg, dtype
        self.network: VideoDCAE = build_network(partial(VideoDCAE, sizes), cfg.path, WEIGHTS, device, dtype)
        self.channels, self.stride = sizes.channels, sizes.stride
        self.time_tiles = _time_tiles(cfg, sizes)
        check_tiles(cfg, sizes.stride)
        self._encoding, self._decoding = tilings(
            cfg,
            sizes.stride,
            in_space=cfg.spatial_tiling,
            in_time=cfg.temporal_tiling,
            lead=0,
            coded=lambda frames: 1 if frames == 1 else frames * sizes.stride[0],
        )
        compiled: Any = torch.compile if cfg.compile else lambda function: function
        self._encode, self._decode = compiled(self.network.encoder), compiled(self.network.decoder)

    @torch.no_grad()
    def encode(self, pixels: Tensor, run: TaskRunner = one_by_one) -> Tensor:
        """(B, 3, T, H, W) in [-1, 1], T = 4k or 1 -> (B, channels, T', H/32, W/32) fp32."""
        frames, height, width = pixels.shape[2:]
        latent_grid(frames, height, width, self)
        x = pixels.to(self._dtype)
        latents = code_in_tiles(x, self._encode, self.channels, self._encoding, run, self.cfg.micro_batch)
        return latents.float() / self.cfg.scale

    @torch.no_grad()
    def decode(self, latents: Tensor, run: TaskRunner = one_by_one, *, clamp: bool = True) -> Tensor:
        """(B, channels, T', H', W') -> (B, 3, decoded_frames(T'), H, W) fp32, in [-1, 1] unless ``clamp`` is off."""
        z = (latents.float() * self.cfg.scale).to(self._dtype)
        pixels = code_in_tiles(z, self._decode, COLOURS, self._decoding, run, self.cfg.micro_batch).float()
        return pixels.clamp_(-1, 1) if clamp else pixels

    def decoded_frames(self, latent_frames: int) -> int:
        """How many frames come of so many latent ones: four of each, but one of a latent frame that is alone, as that
        of a still is, and as the last tile of a clip may be."""
        return decoded_frames(latent_frames, self)


def check_dc_ae(cfg: DCAEConfig) -> None:
    """That the weights of ``cfg`` are there, with the names and shapes of such an autoencoder; reads headers only.

    Raises:
        UserError: they are not.
    """
    checkpoint = open_checkpoint(cfg.path, WEIGHTS)
    checkpoint.check(partial(VideoDCAE, network_sizes(checkpoint)))


def _sizes(cfg: DCAEConfig) -> DCAESizes:
    checkpoint = find_checkpoint(cfg.path, WEIGHTS)
    return network_sizes(checkpoint) if checkpoint else PUBLISHED


def network_sizes(checkpoint: Checkpoint) -> DCAESizes:
    """What the tensors of a checkpoint say. Time is halved twice before the last stage, as in the published one."""
    encoder, decoder = (
        [_stage(checkpoint.shapes, side, i) for i in range(MAX_STAGES)] for side in ("encoder", "decoder")
    )
    count = next((i for i, stage in enumerate(encoder) if not stage), MAX_STAGES)
    if not count or not all(decoder[:count]):
        return PUBLISHED  # names what is missing
    return DCAESizes(
        widths=tuple(stage[0].width for stage in encoder[:count]),
        encoder_depths=tuple(map(len, encoder[:count])),
        decoder_depths=tuple(map(len, decoder[:count])),
        attention=tuple(stage[0].attends for stage in encoder[:count]),
        halves_time=tuple(count - 3 <= stage < count - 1 for stage in range(count)),
        channels=checkpoint.shapes.get("encoder.project_out.main.op_list.0.conv.weight", (PUBLISHED.channels,))[0],
    )


class _Block(NamedTuple):
    width: int
    attends: bool


def _stage(shapes: Mapping[str, Shape], side: str, index: int) -> list[_Block]:
    """The blocks of a stage; what changes the size is none."""
    found = []
    for op in range(MAX_DEPTH):
        start = f"{side}.stages.{index}.op_list.{op}"
        residual = shapes.get(f"{start}.main.conv1.conv.weight")
        attention = shapes.get(f"{start}.context_module.main.qkv.conv.weight")
        if residual:
            found.append(_Block(residual[0], attends=False))
        elif attention:
            found.append(_Block(attention[1], attends=True))
    return found


def dc_ae_shape(cfg: DCAEConfig) -> AutoencoderShape:
    """The file's own numbers where it exists, else the published ones."""
    sizes = _sizes(cfg)
    return AutoencoderShape(sizes.channels, sizes.stride, DCAEAutoencoder.causal, _time_tiles(cfg, sizes))


def _time_tiles(cfg: DCAEConfig, sizes: DCAESizes) -> tuple[int, int] | None:
    """See ``AutoencoderShape``."""
    if not cfg.temporal_tiling:
        return None
    length = cfg.tile_frames // sizes.stride[0]
    return length, length - round(length * cfg.tile_overlap)
