"""The image autoencoder of Stable Diffusion and of Flux, diffusers' ``AutoencoderKL``, applied to frames of clips."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from opensora.models.vae.checkpoint import Checkpoint
from opensora.models.vae.folder import MAX_CHANNELS
from opensora.models.vae.posterior import Posterior
from opensora.utils.tasks import Task, TaskRunner

COLOURS = 3
MAX_LEVELS = 7  # each halves the frame


@dataclass(frozen=True, kw_only=True)
class ImageSizes:
    """What a network is made of."""

    widths: tuple[int, ...] = (128, 256, 512, 512)  # channels of the stages
    layers: int = 2  # residual blocks of an encoder's stage
    groups: int = 32  # of the norms
    channels: int = 16  # of the latents
    quantized: bool = False  # 1x1 convolutions behind the encoder and before the decoder, as in Stable Diffusion's

    @property
    def stride(self) -> int:
        """Pixels per latent along a side."""
        return int(2 ** (len(self.widths) - 1))


def image_network(sizes: ImageSizes) -> nn.Module:
    """diffusers' module, without weights that mean anything."""
    from diffusers import AutoencoderKL

    module: nn.Module = AutoencoderKL(
        block_out_channels=sizes.widths,
        down_block_types=("DownEncoderBlock2D",) * len(sizes.widths),
        up_block_types=("UpDecoderBlock2D",) * len(sizes.widths),
        layers_per_block=sizes.layers,
        latent_channels=sizes.channels,
        norm_num_groups=sizes.groups,
        use_quant_conv=sizes.quantized,
        use_post_quant_conv=sizes.quantized,
    )
    return module


def image_sizes(checkpoint: Checkpoint | None, otherwise: ImageSizes, prefix: str = "") -> ImageSizes:
    """What the tensors of a checkpoint say, in diffusers' names behind ``prefix``; None: ``otherwise``."""
    if checkpoint is None:
        return otherwise
    found = ImageSizes(
        widths=checkpoint.widths(f"{prefix}encoder.down_blocks.{{}}.resnets.0.conv1.weight", otherwise.widths),
        layers=checkpoint.count(f"{prefix}encoder.down_blocks.0.resnets.{{}}.conv1.weight", otherwise.layers),
        groups=checkpoint.number("norm_num_groups", otherwise.groups, MAX_CHANNELS),
        channels=checkpoint.shapes.get(f"{prefix}decoder.conv_in.weight", (0, otherwise.channels))[1],
        quantized=otherwise.quantized,
    )
    return found if len(found.widths) <= MAX_LEVELS else otherwise


class FrameCoder:
    """Codes frames as images; every ``micro_batch`` of the frames of all clips are a piece of work."""

    def __init__(
        self,
        network: Any,
        micro_batch: int,
        dtype: torch.dtype,
        *,
        channels: int,
        stride: int,
        compile: bool = False,
    ) -> None:
        """
        Args:
            network: of ``image_network``.
            stride: pixels per latent along a side.
        """
        self.network, self.channels, self._stride = network, channels, stride
        self._micro_batch, self._dtype = micro_batch, dtype
        compiled: Any = torch.compile if compile else lambda function: function
        self._encoder, self._decoder = compiled(network.encoder), compiled(network.decoder)

    def mean(self, pixels: Tensor, run: TaskRunner) -> Tensor:
        """(B, 3, T, H, W) in [-1, 1] -> (B, C, T, H', W'): modes of the posterior, not scaled."""
        return self._code(pixels, self._mean, self.channels, run)

    def posterior(self, pixels: Tensor, run: TaskRunner) -> Posterior:
        """Of (B, 3, T, H, W) in [-1, 1]; fp32, or fp64 of fp64."""
        moments = self._code(pixels, self.moments, 2 * self.channels, run)
        return Posterior.of(moments.to(torch.promote_types(moments.dtype, torch.float32)), per_frame=True)

    def decode(self, latents: Tensor, run: TaskRunner) -> Tensor:
        """(B, C, T, H', W'), not scaled -> (B, 3, T, H, W), not clamped."""
        frames = rearrange(latents, "b c t h w -> (b t) c h w").to(self._dtype)
        size = (COLOURS, *(side * self._stride for side in frames.shape[2:]))
        parts = run([_piece(self.pixels, z, size) for z in frames.split(self._micro_batch)])
        return rearrange(torch.cat(parts), "(b t) c h w -> b c t h w", b=len(latents))

    def moments(self, frames: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, 2C, H', W')."""
        hidden: Tensor = self._encoder(frames)
        return hidden if self.network.quant_conv is None else self.network.quant_conv(hidden)

    def pixels(self, z: Tensor) -> Tensor:
        """(N, C, H', W') -> (N, 3, H, W)."""
        found: Tensor = self._decoder(z if self.network.post_quant_conv is None else self.network.post_quant_conv(z))
        return found

    def _mean(self, frames: Tensor) -> Tensor:
        return self.moments(frames)[:, : self.channels]

    def _code(self, pixels: Tensor, code: Any, channels: int, run: TaskRunner) -> Tensor:
        frames = rearrange(pixels, "b c t h w -> (b t) c h w").to(self._dtype)
        size = (channels, *(side // self._stride for side in frames.shape[2:]))
        parts = run([_piece(code, x, size) for x in frames.split(self._micro_batch)])
        return rearrange(torch.cat(parts), "(b t) c h w -> b c t h w", b=len(pixels))


def _piece(code: Callable[[Tensor], Tensor], frames: Tensor, size: tuple[int, ...]) -> Task:
    """Contiguous both ways, as a piece is that has travelled: kernels choose by strides how they add up."""
    return Task(lambda: code(frames.contiguous()).contiguous(), (len(frames), *size))
