"""Stable Diffusion's image autoencoder (8x, 4 channels), frame by frame: as Open-Sora 1.0 and 1.1 use it."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from opensora.models.base import AutoencoderShape, Draw, grid_of
from opensora.models.vae.checkpoint import build_network, find_checkpoint, open_checkpoint
from opensora.models.vae.flux2d_names import DIFFUSERS, FluxWeights
from opensora.models.vae.image_network import FrameCoder, ImageSizes, image_network, image_sizes
from opensora.models.vae.opensora_1x.clip_coding import FrameByFrame
from opensora.models.vae.posterior import Posterior
from opensora.models.weights.format import Layout
from opensora.models.weights.rows import Shape, Target
from opensora.utils.limits import SCALE, Limits
from opensora.utils.tasks import TaskRunner, one_by_one

FACTOR = 0.18215  # latents = FACTOR * sample; the family uses it for Stable Diffusion XL's weights as well
SIZES = ImageSizes(channels=4, quantized=True)
# What diffusers called the layers of the attention before version 0.16.
_RENAMED = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


@dataclass(kw_only=True)
class ImageWeights(FluxWeights):
    """diffusers' names of now and of old files, and those of the first release (CompVis)."""

    def targets(self, shapes: Mapping[str, Shape], source: Layout, to: Layout) -> dict[str, Target]:
        found = super().targets(shapes, source, to)
        return {_renamed(name): target for name, target in found.items()}


def _renamed(name: str) -> str:
    parts = name.split(".")
    if "attentions" in parts[:-2] and parts[-2] in _RENAMED:
        parts[-2] = _RENAMED[parts[-2]]
    return ".".join(parts)


WEIGHTS = ImageWeights(
    kind="sd",
    published="diffusion_pytorch_model.safetensors of stabilityai/sd-vae-ft-ema",
    top_level=("encoder", "decoder", "quant_conv", "post_quant_conv"),
    example_layer="encoder.mid_block.attentions.0.to_q",
)


@dataclass(frozen=True, kw_only=True)
class SDConfig:
    """``path`` is a folder of diffusers (AutoencoderKL), or its file of weights, or one in CompVis' names."""

    kind: Literal["sd"] = "sd"
    path: str = ""
    sample: Literal["mode", "posterior"] = "posterior"  # latents of a clip: a keyed draw of its posterior, or the mode
    scale: float = FACTOR  # latents are multiplied by it
    micro_batch: int = 4  # frames coded at a time

    LIMITS: ClassVar[Limits] = {"micro_batch": (100_000, "they are in memory together"), "scale": SCALE}

    def __post_init__(self) -> None:
        check_micro_batch(self.micro_batch)
        if self.scale <= 0:
            raise ValueError(f"scale={self.scale}: must be a number > 0")


def check_micro_batch(count: int) -> None:
    """
    Raises:
        ValueError: it is no number of frames.
    """
    if count < 1:
        raise ValueError(f"micro_batch={count}: must be an integer >= 1")


class SDAutoencoder:
    """No compression in time: T' = T, any number of frames, each by itself."""

    causal = False
    is_costly = True

    def __init__(self, cfg: SDConfig, device: torch.device | str, dtype: torch.dtype) -> None:
        """On the meta device: without weights, to know sizes and memory by."""
        sizes = _sizes(cfg)
        self.cfg = cfg
        self.network: Any = build_network(partial(image_network, sizes), cfg.path, WEIGHTS, device, dtype, DIFFUSERS)
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
            return self._coder.mean(pixels, run).float() * self.cfg.scale
        posterior = self.posterior(pixels, run)
        return posterior.sample(draw(tuple(posterior.mean.shape[1:]))).float() * self.cfg.scale

    @torch.no_grad()
    def posterior(self, pixels: Tensor, run: TaskRunner = one_by_one) -> Posterior:
        """Of (B, 3, T, H, W) in [-1, 1]."""
        return self._coder.posterior(pixels, run)

    @torch.no_grad()
    def decode(
        self, latents: Tensor, run: TaskRunner = one_by_one, *, frames: int | None = None, clamp: bool = True
    ) -> Tensor:
        """(B, channels, T, H', W') -> (B, 3, T, H, W) fp32, in [-1, 1] unless ``clamp`` is off."""
        pixels = self._coder.decode(latents.float() / self.cfg.scale, run).float()
        return pixels.clamp_(-1, 1) if clamp else pixels


def _sizes(cfg: SDConfig) -> ImageSizes:
    return image_sizes(find_checkpoint(cfg.path, WEIGHTS, DIFFUSERS), SIZES)


def check_sd(cfg: SDConfig) -> None:
    """That the weights of ``cfg`` are there, with the names and shapes of such an autoencoder; reads headers only.

    Raises:
        UserError: they are not.
    """
    checkpoint = open_checkpoint(cfg.path, WEIGHTS, DIFFUSERS)
    checkpoint.check(partial(image_network, image_sizes(checkpoint, SIZES)))


def sd_shape(cfg: SDConfig) -> AutoencoderShape:
    """The file's own numbers where it exists, else the published ones."""
    sizes = _sizes(cfg)
    stride = (1, sizes.stride, sizes.stride)
    return AutoencoderShape(sizes.channels, stride, SDAutoencoder.causal, coding=FrameByFrame(sizes.stride))
