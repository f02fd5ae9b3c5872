"""The autoencoder of Open-Sora 1.2 (4x8x8, 4 channels): frames as images, then their latents along time in pieces."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from opensora.models.base import AutoencoderShape, Draw, grid_of
from opensora.models.vae.checkpoint import (
    AutoencoderWeights,
    Checkpoint,
    build_network,
    find_checkpoint,
    open_checkpoint,
)
from opensora.models.vae.folder import MAX_CHANNELS
from opensora.models.vae.image_network import FrameCoder, image_sizes
from opensora.models.vae.opensora_1x.clip_coding import QUARTER, PaddedPieces, quarter
from opensora.models.vae.opensora_1x.pipeline_network import PipelineSizes, PipelineVAE
from opensora.models.vae.opensora_1x.sd import FACTOR, SIZES, check_micro_batch
from opensora.models.vae.opensora_1x.temporal_network import TemporalSizes, decoded_length
from opensora.models.vae.posterior import Posterior
from opensora.utils.limits import Limits
from opensora.utils.tasks import Task, TaskRunner, one_by_one

SPATIAL = "spatial_vae.module."
PUBLISHED = PipelineSizes()
MAX_LEVELS = 8
WEIGHTS = AutoencoderWeights(
    kind="opensora_v1_2",
    published="model.safetensors of hpcai-tech/OpenSora-VAE-v1.2",
    top_level=("spatial_vae", "temporal_vae", "shift", "scale"),
    example_layer="temporal_vae.encoder.res_blocks.0.conv1.conv",
)


@dataclass(frozen=True, kw_only=True)
class OpenSoraV12Config:
    """``path`` is model.safetensors of OpenSora-VAE-v1.2, or its folder."""

    kind: Literal["opensora_v1_2"] = "opensora_v1_2"
    path: str = ""
    sample: Literal["mode", "posterior"] = "posterior"  # latents of a clip: keyed draws of both posteriors, or modes
    micro_batch: int = 4  # frames coded as images at a time
    micro_frame_size: int | None = 17  # frames of a piece along time; null: a clip is one, and its latents are others

    LIMITS: ClassVar[Limits] = {
        "micro_batch": (100_000, "they are in memory together"),
        "micro_frame_size": (100_000, "no clip is so long; null codes all of it together"),
    }

    def __post_init__(self) -> None:
        check_micro_batch(self.micro_batch)
        if self.micro_frame_size is not None and self.micro_frame_size < 1:
            raise ValueError(f"micro_frame_size={self.micro_frame_size}: must be an integer >= 1, or null")


class OpenSoraV12Autoencoder:
    """Any number of frames. Frames as images, ``micro_batch`` of them, and then every piece of every clip, are pieces
    of work."""

    causal = False
    is_costly = True

    def __init__(self, cfg: OpenSoraV12Config, device: torch.device | str, dtype: torch.dtype) -> None:
        """On the meta device: without weights, to know sizes and memory by."""
        sizes = _sizes(cfg)
        self.cfg, self._dtype = cfg, dtype
        self.network: PipelineVAE = build_network(partial(PipelineVAE, sizes), cfg.path, WEIGHTS, device, dtype)
        shape = opensora_v1_2_shape(cfg)
        self.channels, self.stride = shape.channels, shape.stride
        self.coding = PaddedPieces(cfg.micro_frame_size)
        self.samples = cfg.sample == "posterior"
        self._ratio = sizes.temporal.ratio
        self._images = FrameCoder(
            self.network.spatial_vae.module,
            cfg.micro_batch,
            dtype,
            channels=sizes.image.channels,
            stride=sizes.image.stride,
        )

    @torch.no_grad()
    def encode(self, pixels: Tensor, run: TaskRunner = one_by_one, draw: Draw | None = None) -> Tensor:
        """(B, 3, T, H, W) in [-1, 1] -> (B, channels, T', H', W') fp32: modes, or samples where ``vae.sample`` says so
        and ``draw`` gives standard normal noise: of the images (stage ``spatial``), then of the clip (``temporal``)."""
        grid_of(pixels, self)
        if not self.samples or draw is None:
            images = self._images.mean(pixels, run) * FACTOR
            return self._scaled(self._pieces(images, self._mean, self.channels, run))
        found = self._images.posterior(pixels, run)
        images = found.sample(draw(tuple(found.mean.shape[1:]), "spatial")) * FACTOR
        posterior = self.posterior(images, run)
        return self._scaled(posterior.sample(draw(tuple(posterior.mean.shape[1:]), "temporal")))

    @torch.no_grad()
    def posterior(self, images: Tensor, run: TaskRunner = one_by_one) -> Posterior:
        """Of image latents (B, 4, T, H', W'), scaled; not normalized as latents are."""
        moments = self._pieces(images, self.network.temporal_vae.encode, 2 * self.channels, run)
        return Posterior.of(moments.to(torch.promote_types(moments.dtype, torch.float32)))

    @torch.no_grad()
    def decode(
        self, latents: Tensor, run: TaskRunner = one_by_one, *, frames: int | None = None, clamp: bool = True
    ) -> Tensor:
        """(B, channels, T', H', W') -> (B, 3, T, H, W) fp32, in [-1, 1] unless ``clamp`` is off.

        Args:
            frames: of the clip that these are, or are to be, latents of; None: the most that have so many. Others than
                fit give other numbers of frames, as in the published code.
        """
        count = latents.shape[2]
        frames = self.coding.frames(count) if frames is None else frames
        z = self._unscaled(latents).to(self._dtype)
        pieces = self.coding.latent_pieces(count)
        asked = self.coding.asked(frames, len(pieces))
        work = [
            _piece(
                clip[:, :, piece], partial(self.network.temporal_vae.decode, frames=n), (self._images.channels, size)
            )
            for clip in z.split(1)
            for piece, n in zip(pieces, asked, strict=True)
            for size in [decoded_length(piece.stop - piece.start, n, self._ratio)]
        ]
        pixels = self._images.decode(_joined(run(work), len(pieces)).float() / FACTOR, run).float()
        return pixels.clamp_(-1, 1) if clamp else pixels

    def _pieces(self, x: Tensor, code: Callable[[Tensor], Tensor], channels: int, run: TaskRunner) -> Tensor:
        """``code`` on all pieces of (B, C, T, H', W') along time -> (B, channels, T', H', W')."""
        pieces = self.coding.pieces(x.shape[2])
        work = [
            _piece(clip[:, :, piece], code, (channels, quarter(piece.stop - piece.start)))
            for clip in x.to(self._dtype).split(1)
            for piece in pieces
        ]
        return _joined(run(work), len(pieces))

    def _mean(self, images: Tensor) -> Tensor:
        return self.network.temporal_vae.encode(images)[:, : self.channels]

    def _scaled(self, z: Tensor) -> Tensor:
        # In fp32, but by the constants as the model's type has them: published models were trained with these.
        return (z.float() - self.network.shift.float()) / self.network.scale.float()

    def _unscaled(self, z: Tensor) -> Tensor:
        return z.float() * self.network.scale.float() + self.network.shift.float()


def _piece(x: Tensor, code: Callable[[Tensor], Tensor], size: tuple[int, int]) -> Task:
    """``size``: channels and frames of the result. Contiguous both ways, see ``tiles``."""
    return Task(lambda: code(x.contiguous()).contiguous(), (len(x), *size, *x.shape[3:]))


def _joined(results: list[Tensor], pieces: int) -> Tensor:
    """Clips of so many pieces each, one after the other."""
    return torch.cat([torch.cat(results[i : i + pieces], 2) for i in range(0, len(results), pieces)])


def _sizes(cfg: OpenSoraV12Config) -> PipelineSizes:
    checkpoint = find_checkpoint(cfg.path, WEIGHTS)
    return network_sizes(checkpoint) if checkpoint else PUBLISHED


def network_sizes(checkpoint: Checkpoint) -> PipelineSizes:
    """What the tensors of a checkpoint say, and config.json of what they do not."""
    shapes, published = checkpoint.shapes, PUBLISHED.temporal
    convolution, encoder = "conv1.conv.weight", "temporal_vae.encoder."
    widths = checkpoint.widths(f"{encoder}block_res_blocks.{{}}.0.{convolution}", ())
    first = shapes.get(f"{encoder}conv_in.conv.weight", ())
    temporal = published
    halves = tuple(f"{encoder}conv_blocks.{i}.conv.weight" in shapes for i in range(len(widths) - 1))
    if 2 ** sum(halves) == QUARTER and len(first) == 5 and len(widths) <= MAX_LEVELS:  # else what is missing is named
        temporal = TemporalSizes(
            channels=first[1],
            latents=_channels(shapes, "temporal_vae.post_quant_conv.conv.weight", 1, published.latents),
            hidden=_channels(shapes, "temporal_vae.post_quant_conv.conv.weight", 0, published.hidden),
            filters=first[0],
            layers=checkpoint.count(f"{encoder}block_res_blocks.0.{{}}.{convolution}", published.layers),
            multipliers=tuple(max(1, width // max(1, first[0])) for width in widths),
            halves=halves,
            groups=checkpoint.number("num_groups", published.groups, MAX_CHANNELS),
        )
    return PipelineSizes(
        image=image_sizes(checkpoint, SIZES, SPATIAL),
        temporal=temporal,
        statistics=shapes.get("shift", (1, 4, 1, 1, 1)),
    )


def _channels(shapes: Mapping[str, Any], name: str, dim: int, otherwise: int) -> int:
    shape = shapes.get(name, ())
    return int(shape[dim]) if len(shape) > dim else otherwise


def check_opensora_v1_2(cfg: OpenSoraV12Config) -> None:
    """That the weights of ``cfg`` are there, with the names and shapes of such an autoencoder; reads headers only.

    Raises:
        UserError: they are not.
    """
    checkpoint = open_checkpoint(cfg.path, WEIGHTS)
    checkpoint.check(partial(PipelineVAE, network_sizes(checkpoint)))


def opensora_v1_2_shape(cfg: OpenSoraV12Config) -> AutoencoderShape:
    """The file's own numbers where it exists, else the published ones."""
    sizes = _sizes(cfg)
    space = sizes.image.stride
    coding = PaddedPieces(cfg.micro_frame_size)
    return AutoencoderShape(
        sizes.temporal.latents, (sizes.temporal.ratio, space, space), OpenSoraV12Autoencoder.causal, coding=coding
    )
