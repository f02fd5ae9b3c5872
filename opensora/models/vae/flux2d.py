"""Flux's 2-D autoencoder (8x, 16 channels): the published ae.safetensors, or a diffusers folder; frame by frame."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from opensora.models.base import AutoencoderShape, Draw
from opensora.models.vae.checkpoint import Checkpoint, build_network, find_checkpoint, open_checkpoint
from opensora.models.vae.flux2d_names import DIFFUSERS, FluxWeights
from opensora.models.vae.folder import (
    KEY,
    MAX_CHANNELS,
    check_folder,
    config_file,
    load_frozen,
    stated_number,
    stated_shape,
)
from opensora.models.vae.posterior import Posterior
from opensora.utils.errors import UserError
from opensora.utils.limits import Limits
from opensora.utils.tasks import Task, TaskRunner, one_by_one

COLOURS = 3
MAX_LEVELS = 7  # each halves the frame
SCALE, SHIFT = 0.3611, 0.1159  # latents = SCALE * (sample - SHIFT)
DIFFUSERS_CLASS = "AutoencoderKL"
WEIGHTS = FluxWeights(
    kind="flux2d",
    published="ae.safetensors",
    top_level=("encoder", "decoder", "quant_conv", "post_quant_conv"),
    example_layer="encoder.mid.attn_1.q",
)


@dataclass(frozen=True, kw_only=True)
class FluxSizes:
    """What a network is made of."""

    widths: tuple[int, ...] = (128, 256, 512, 512)  # channels of the stages
    layers: int = 2  # residual blocks of an encoder's stage
    groups: int = 32  # of the norms
    channels: int = 16  # of the latents


@dataclass(frozen=True, kw_only=True)
class Flux2DConfig:
    """``path`` is ae.safetensors, or a folder of diffusers (AutoencoderKL)."""

    kind: Literal["flux2d"] = "flux2d"
    path: str = ""
    sample: Literal["mode", "posterior"] = "mode"  # latents of a clip: the mode of its posterior, or a keyed draw of it
    micro_batch: int = 8  # frames coded at a time
    compile: bool = False  # by torch.compile: for many frames of few sizes

    LIMITS: ClassVar[Limits] = {"micro_batch": (100_000, "they are in memory together")}

    def __post_init__(self) -> None:
        if self.micro_batch < 1:
            raise ValueError(f"micro_batch={self.micro_batch}: must be an integer >= 1")


class Flux2DAutoencoder:
    """No compression in time: T' = T, any number of frames. ``micro_batch`` frames are a piece of work."""

    causal = False
    is_costly = True

    def __init__(self, cfg: Flux2DConfig, device: torch.device | str, dtype: torch.dtype) -> None:
        """On the meta device: without weights, to know sizes and memory by."""
        self.cfg, self._dtype = cfg, dtype
        self.network: Any = _build(cfg, device, dtype)
        shape = flux2d_shape(cfg)
        self.channels, self.stride = shape.channels, shape.stride
        self.samples = cfg.sample == "posterior"
        compiled: Any = torch.compile if cfg.compile else lambda function: function
        self._encoder, self._decoder = compiled(self.network.encoder), compiled(self.network.decoder)

    @torch.no_grad()
    def encode(self, pixels: Tensor, run: TaskRunner = one_by_one, draw: Draw | None = None) -> Tensor:
        """(B, 3, T, H, W) in [-1, 1] -> (B, channels, T, H', W') fp32: the mode, or a sample where ``vae.sample`` says
        so and ``draw`` gives standard normal noise."""
        if not self.samples or draw is None:
            return (self._code(pixels, self._mean, self.channels, run).float() - SHIFT) * SCALE
        posterior = self.posterior(pixels, run)
        return (posterior.sample(draw(tuple(posterior.mean.shape[1:]))).float() - SHIFT) * SCALE

    @torch.no_grad()
    def posterior(self, pixels: Tensor, run: TaskRunner = one_by_one) -> Posterior:
        """Of (B, 3, T, H, W) in [-1, 1]."""
        moments = self._code(pixels, self._moments, 2 * self.channels, run)
        return Posterior.of(moments.to(torch.promote_types(moments.dtype, torch.float32)), per_frame=True)

    @torch.no_grad()
    def decode(self, latents: Tensor, run: TaskRunner = one_by_one, *, clamp: bool = True) -> Tensor:
        """(B, channels, T', H', W') -> (B, 3, T, H, W) fp32, in [-1, 1] unless ``clamp`` is off."""
        frames = rearrange(latents.float() / SCALE + SHIFT, "b c t h w -> (b t) c h w").to(self._dtype)
        size = (COLOURS, *(side * stride for side, stride in zip(frames.shape[2:], self.stride[1:], strict=True)))
        parts = run([_piece(self._pixels, z, size) for z in frames.split(self.cfg.micro_batch)])
        pixels = rearrange(torch.cat(parts).float(), "(b t) c h w -> b c t h w", b=len(latents))
        return pixels.clamp(-1, 1) if clamp else pixels

    def _code(self, pixels: Tensor, code: Any, channels: int, run: TaskRunner) -> Tensor:
        """Frames as images, (B, 3, T, H, W) -> (B, channels, T, H', W')."""
        frames = rearrange(pixels, "b c t h w -> (b t) c h w").to(self._dtype)
        size = (channels, *(side // stride for side, stride in zip(frames.shape[2:], self.stride[1:], strict=True)))
        parts = run([_piece(code, x, size) for x in frames.split(self.cfg.micro_batch)])
        return rearrange(torch.cat(parts), "(b t) c h w -> b c t h w", b=len(pixels))

    def _moments(self, frames: Tensor) -> Tensor:
        hidden = self._encoder(frames)
        return hidden if self.network.quant_conv is None else self.network.quant_conv(hidden)

    def _mean(self, frames: Tensor) -> Tensor:
        return self._moments(frames)[:, : self.channels]

    def _pixels(self, z: Tensor) -> Tensor:
        return self._decoder(z if self.network.post_quant_conv is None else self.network.post_quant_conv(z))


def _piece(code: Callable[[Tensor], Tensor], frames: Tensor, size: tuple[int, ...]) -> Task:
    """Contiguous both ways, as a piece is that has travelled: kernels choose by strides how they add up."""
    return Task(lambda: code(frames.contiguous()).contiguous(), (len(frames), *size))


def _build(cfg: Flux2DConfig, device: torch.device | str, dtype: torch.dtype) -> Any:
    """diffusers' module, with the weights of a folder as diffusers reads them, or of the published file."""
    from diffusers import AutoencoderKL

    if _is_folder(cfg) and torch.device(device).type != "meta":
        return load_frozen(AutoencoderKL, cfg.path, device, dtype)
    build = partial(_network, _sizes(find_checkpoint(cfg.path, WEIGHTS, DIFFUSERS)))
    return build_network(build, cfg.path, WEIGHTS, device, dtype, DIFFUSERS)


def check_flux2d(cfg: Flux2DConfig) -> None:
    """That the weights of ``cfg`` are there, with the names and shapes of such an autoencoder where they are a file;
    reads headers only.

    Raises:
        UserError: they are not.
    """
    if _is_folder(cfg):
        check_folder(cfg.path, DIFFUSERS_CLASS)
        return
    checkpoint = open_checkpoint(cfg.path, WEIGHTS, DIFFUSERS)
    checkpoint.check(partial(_network, _sizes(checkpoint)))


def _is_folder(cfg: Flux2DConfig) -> bool:
    """Whether it is a folder that diffusers wrote."""
    return config_file(cfg.path) is not None


def _sizes(checkpoint: Checkpoint | None) -> FluxSizes:
    """What the tensors of a checkpoint say; None: the published sizes."""
    if checkpoint is None:
        return FluxSizes()
    return FluxSizes(
        widths=checkpoint.widths("encoder.down_blocks.{}.resnets.0.conv1.weight", FluxSizes.widths),
        layers=checkpoint.count("encoder.down_blocks.0.resnets.{}.conv1.weight", FluxSizes.layers),
        groups=checkpoint.number("norm_num_groups", FluxSizes.groups, MAX_CHANNELS),
        channels=checkpoint.shapes.get("decoder.conv_in.weight", (0, FluxSizes.channels))[1],
    )


def _network(sizes: FluxSizes) -> nn.Module:
    """diffusers' module, without weights that mean anything."""
    from diffusers import AutoencoderKL

    module: nn.Module = AutoencoderKL(
        block_out_channels=sizes.widths,
        down_block_types=("DownEncoderBlock2D",) * len(sizes.widths),
        up_block_types=("UpDecoderBlock2D",) * len(sizes.widths),
        layers_per_block=sizes.layers,
        latent_channels=sizes.channels,
        norm_num_groups=sizes.groups,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    return module


def flux2d_shape(cfg: Flux2DConfig) -> AutoencoderShape:
    """The file's own numbers where it exists, else the published ones."""
    if _is_folder(cfg):
        levels = stated_shape(cfg.path).get("block_out_channels", [0] * 4)
        channels = stated_number(cfg.path, "latent_channels", FluxSizes.channels, MAX_CHANNELS)
    else:
        sizes = _sizes(find_checkpoint(cfg.path, WEIGHTS, DIFFUSERS))
        levels, channels = list(sizes.widths), sizes.channels
    if not isinstance(levels, list) or not 1 <= len(levels) <= MAX_LEVELS:
        raise UserError(f"{KEY}={cfg.path}: config.json has block_out_channels={levels!r}; must be a list of numbers")
    spatial = 2 ** (len(levels) - 1)
    return AutoencoderShape(channels, (1, spatial, spatial), Flux2DAutoencoder.causal)
