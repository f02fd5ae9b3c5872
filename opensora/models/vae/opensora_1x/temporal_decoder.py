"""Stable Video Diffusion's autoencoder: images in, clips out, by diffusers' ``AutoencoderKLTemporalDecoder``.

Open-Sora 1.x has it to decode latents of Stable Diffusion's image autoencoder more steadily; its encoder is that one's.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from opensora.models.base import AutoencoderShape, Draw, grid_of
from opensora.models.vae.checkpoint import (
    AutoencoderWeights,
    Checkpoint,
    build_network,
    find_checkpoint,
    open_checkpoint,
)
from opensora.models.vae.image_network import COLOURS, FrameCoder, ImageSizes, image_sizes
from opensora.models.vae.opensora_1x.clip_coding import FrameByFrame
from opensora.models.vae.opensora_1x.sd import FACTOR, check_micro_batch
from opensora.models.vae.posterior import Posterior
from opensora.utils.limits import Limits
from opensora.utils.tasks import Task, TaskRunner, one_by_one

SIZES = ImageSizes(channels=4)
WEIGHTS = AutoencoderWeights(
    kind="sd_temporal_decoder",
    published="diffusion_pytorch_model.safetensors of stabilityai/stable-video-diffusion-img2vid, folder vae",
    top_level=("encoder", "decoder", "quant_conv"),
    example_layer="encoder.mid_block.attentions.0.to_q",
)


@dataclass(frozen=True, kw_only=True)
class SDTemporalDecoderConfig:
    """``path`` is a folder of diffusers (AutoencoderKLTemporalDecoder), or its file of weights."""

    kind: Literal["sd_temporal_decoder"] = "sd_temporal_decoder"
    path: str = ""
    sample: Literal["mode", "posterior"] = "posterior"  # latents of a clip: a keyed draw of its posterior, or the mode
    micro_batch: int = 4  # frames encoded at a time; a clip is decoded whole

    LIMITS: ClassVar[Limits] = {"micro_batch": (100_000, "they are in memory together")}

    def __post_init__(self) -> None:
        check_micro_batch(self.micro_batch)


class SDTemporalDecoder:
    """No compression in time: T' = T, any number of frames. A clip is a piece of work to decode."""

    causal = False
    is_costly = True

    def __init__(self, cfg: SDTemporalDecoderConfig, device: torch.device | str, dtype: torch.dtype) -> None:
        """On the meta device: without weights, to know sizes and memory by."""
        sizes = _sizes(find_checkpoint(cfg.path, WEIGHTS))
        self.cfg, self._dtype = cfg, dtype
        self.network: Any = build_network(partial(_network, sizes), cfg.path, WEIGHTS, device, dtype)
        self.channels, self.stride = sizes.channels, (1, sizes.stride, sizes.stride)
        self.coding = FrameByFrame(sizes.stride)
        self.samples = cfg.sample == "posterior"
        self._coder = FrameCoder(self.network, cfg.micro_batch, dtype, channels=sizes.channels, stride=sizes.stride)

    @torch.no_grad()
    def encode(self, pixels: Tensor, run: TaskRunner = one_by_one, draw: Draw | None = None) -> Tensor:
        """(B, 3, T, H, W) in [-1, 1] -> (B, channels, T, H', W') fp32: the mode, or a sample where ``vae.sample`` says
        so and ``draw`` gives standard normal noise."""
        grid_of(pixels, self)
        if not self.samples or draw is None:
            return self._coder.mean(pixels, run).float() * FACTOR
        posterior = self.posterior(pixels, run)
        return posterior.sample(draw(tuple(posterior.mean.shape[1:]))).float() * FACTOR

    @torch.no_grad()
    def posterior(self, pixels: Tensor, run: TaskRunner = one_by_one) -> Posterior:
        """Of (B, 3, T, H, W) in [-1, 1]."""
        return self._coder.posterior(pixels, run)

    @torch.no_grad()
    def decode(
        self, latents: Tensor, run: TaskRunner = one_by_one, *, frames: int | None = None, clamp: bool = True
    ) -> Tensor:
        """(B, channels, T, H', W') -> (B, 3, T, H, W) fp32, in [-1, 1] unless ``clamp`` is off."""
        z = (latents.float() / FACTOR).to(self._dtype)
        size = (1, COLOURS, z.shape[2], *(self.coding.stride * side for side in z.shape[3:]))
        pixels = torch.cat(run([Task(partial(self._pixels, clip), size) for clip in z.split(1)])).float()
        return pixels.clamp_(-1, 1) if clamp else pixels

    def _pixels(self, clip: Tensor) -> Tensor:
        frames = rearrange(clip, "1 c t h w -> t c h w").contiguous()
        found = self.network.decode(frames, num_frames=len(frames)).sample
        return rearrange(found, "t c h w -> 1 c t h w").contiguous()


def _network(sizes: ImageSizes) -> nn.Module:
    """diffusers' module, without weights that mean anything."""
    from diffusers import AutoencoderKLTemporalDecoder

    module: nn.Module = AutoencoderKLTemporalDecoder(
        block_out_channels=sizes.widths,
        down_block_types=("DownEncoderBlock2D",) * len(sizes.widths),
        layers_per_block=sizes.layers,
        latent_channels=sizes.channels,
    )
    module.post_quant_conv = None  # type: ignore[assignment]  # as of ``AutoencoderKL`` without one
    return module


def _sizes(checkpoint: Checkpoint | None) -> ImageSizes:
    return image_sizes(checkpoint, SIZES)


def check_sd_temporal_decoder(cfg: SDTemporalDecoderConfig) -> None:
    """That the weights of ``cfg`` are there, with the names and shapes of such an autoencoder; reads headers only.

    Raises:
        UserError: they are not.
    """
    checkpoint = open_checkpoint(cfg.path, WEIGHTS)
    checkpoint.check(partial(_network, _sizes(checkpoint)))


def sd_temporal_decoder_shape(cfg: SDTemporalDecoderConfig) -> AutoencoderShape:
    """The file's own numbers where it exists, else the published ones."""
    sizes = _sizes(find_checkpoint(cfg.path, WEIGHTS))
    stride = (1, sizes.stride, sizes.stride)
    return AutoencoderShape(sizes.channels, stride, SDTemporalDecoder.causal, coding=FrameByFrame(sizes.stride))
