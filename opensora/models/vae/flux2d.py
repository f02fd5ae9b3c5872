"""Flux's 2-D autoencoder (8x, 16 channels): the published ae.safetensors, or a diffusers folder; frame by frame."""

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

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
from opensora.models.vae.image_network import MAX_LEVELS, FrameCoder, ImageSizes, image_network, image_sizes
from opensora.models.vae.posterior import Posterior
from opensora.utils.errors import UserError
from opensora.utils.limits import Limits
from opensora.utils.tasks import TaskRunner, one_by_one

SCALE, SHIFT = 0.3611, 0.1159  # latents = SCALE * (sample - SHIFT)
DIFFUSERS_CLASS = "AutoencoderKL"
WEIGHTS = FluxWeights(
    kind="flux2d",
    published="ae.safetensors",
    top_level=("encoder", "decoder", "quant_conv", "post_quant_conv"),
    example_layer="encoder.mid.attn_1.q",
)


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
        self.cfg = cfg
        self.network: Any = _build(cfg, device, dtype)
        shape = flux2d_shape(cfg)
        self.channels, self.stride = shape.channels, shape.stride
        self.samples = cfg.sample == "posterior"
        channels, stride = self.channels, self.stride[1]
        self._coder = FrameCoder(
            self.network, cfg.micro_batch, dtype, channels=channels, stride=stride, compile=cfg.compile
        )

    @torch.no_grad()
    def encode(self, pixels: Tensor, run: TaskRunner = one_by_one, draw: Draw | None = None) -> Tensor:
        """(B, 3, T, H, W) in [-1, 1] -> (B, channels, T', H', W') fp32: the mode, or a sample where ``vae.sample`` says
        so and ``draw`` gives standard normal noise."""
        if not self.samples or draw is None:
            return (self._coder.mean(pixels, run).float() - SHIFT) * SCALE
        posterior = self.posterior(pixels, run)
        return (posterior.sample(draw(tuple(posterior.mean.shape[1:]))).float() - SHIFT) * SCALE

    @torch.no_grad()
    def posterior(self, pixels: Tensor, run: TaskRunner = one_by_one) -> Posterior:
        """Of (B, 3, T, H, W) in [-1, 1]."""
        return self._coder.posterior(pixels, run)

    @torch.no_grad()
    def decode(self, latents: Tensor, run: TaskRunner = one_by_one, *, clamp: bool = True) -> Tensor:
        """(B, channels, T', H', W') -> (B, 3, T, H, W) fp32, in [-1, 1] unless ``clamp`` is off."""
        pixels = self._coder.decode(latents.float() / SCALE + SHIFT, run).float()
        return pixels.clamp(-1, 1) if clamp else pixels


def _build(cfg: Flux2DConfig, device: torch.device | str, dtype: torch.dtype) -> Any:
    """diffusers' module, with the weights of a folder as diffusers reads them, or of the published file."""
    from diffusers import AutoencoderKL

    if _is_folder(cfg) and torch.device(device).type != "meta":
        return load_frozen(AutoencoderKL, cfg.path, device, dtype)
    build = partial(image_network, _sizes(find_checkpoint(cfg.path, WEIGHTS, DIFFUSERS)))
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
    checkpoint.check(partial(image_network, _sizes(checkpoint)))


def _is_folder(cfg: Flux2DConfig) -> bool:
    """Whether it is a folder that diffusers wrote."""
    return config_file(cfg.path) is not None


def _sizes(checkpoint: Checkpoint | None) -> ImageSizes:
    """What the tensors of a checkpoint say; None: the published sizes."""
    return image_sizes(checkpoint, ImageSizes())


def flux2d_shape(cfg: Flux2DConfig) -> AutoencoderShape:
    """The file's own numbers where it exists, else the published ones."""
    if _is_folder(cfg):
        levels = stated_shape(cfg.path).get("block_out_channels", [0] * 4)
        channels = stated_number(cfg.path, "latent_channels", ImageSizes.channels, MAX_CHANNELS)
    else:
        sizes = _sizes(find_checkpoint(cfg.path, WEIGHTS, DIFFUSERS))
        levels, channels = list(sizes.widths), sizes.channels
    if not isinstance(levels, list) or not 1 <= len(levels) <= MAX_LEVELS:
        raise UserError(f"{KEY}={cfg.path}: config.json has block_out_channels={levels!r}; must be a list of numbers")
    spatial = 2 ** (len(levels) - 1)
    return AutoencoderShape(channels, (1, spatial, spatial), Flux2DAutoencoder.causal)
