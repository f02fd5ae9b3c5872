"""The autoencoder of Open-Sora 1.3 (4x8x8, 16 channels): one causal network for space and time."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

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
from opensora.models.vae.opensora_1x.causal_network import COLOURS, CausalSizes, CausalVAE
from opensora.models.vae.opensora_1x.clip_coding import QUARTER, SPACE, CausalPieces, quarter
from opensora.models.vae.opensora_1x.normalization import CHANNELS, PLACES, Normalization, denormalized, normalized
from opensora.models.vae.posterior import Posterior
from opensora.utils.errors import UserError
from opensora.utils.limits import Limits
from opensora.utils.tasks import Task, TaskRunner, one_by_one

PUBLISHED = CausalSizes()
LEVELS = 4  # the first halves frames, the next two clips
WEIGHTS = AutoencoderWeights(
    kind="opensora_v1_3",
    published="model.safetensors of hpcai-tech/OpenSora-VAE-v1.3",
    top_level=("encoder", "decoder"),
    example_layer="encoder.mid.attn_1.q.conv",
)


@dataclass(frozen=True, kw_only=True)
class OpenSoraV13Config:
    """``path`` is model.safetensors of OpenSora-VAE-v1.3, or its folder."""

    kind: Literal["opensora_v1_3"] = "opensora_v1_3"
    path: str = ""
    sample: Literal["mode", "posterior"] = "posterior"  # latents of a clip: a keyed draw of its posterior, or the mode
    micro_batch: int | None = 1  # clips coded at a time; null: all, each whole, whatever micro_frame_size says
    micro_batch_2d: int = 4  # frames that layers which work frame by frame take at a time
    micro_frame_size: int | None = 17  # frames of a piece along time; null: a clip is one, and its latents are others
    temporal_overlap: bool = True  # neighbouring pieces share a frame, the mean of both when decoded
    normalization: Normalization = "video"  # of latents: by channel, or by channel and place among 5 latent frames

    LIMITS: ClassVar[Limits] = {
        **dict.fromkeys(("micro_batch", "micro_batch_2d"), (100_000, "they are in memory together")),
        "micro_frame_size": (100_000, "no clip is so long; null codes all of it together"),
    }

    def __post_init__(self) -> None:
        for name, least in (("micro_batch", 1), ("micro_batch_2d", 1), ("micro_frame_size", 2)):
            value = getattr(self, name)
            if value is not None and value < least:
                null = "" if name == "micro_batch_2d" else ", or null"
                raise ValueError(f"{name}={value}: must be an integer >= {least}{null}")

    @property
    def coding(self) -> CausalPieces:
        """How clips are cut."""
        length = None if self.micro_batch is None else self.micro_frame_size
        multiple = PLACES if self.normalization == "video_5frames" else 1
        return CausalPieces(length, overlap=self.temporal_overlap, multiple=multiple)


class OpenSoraV13Autoencoder:
    """Clips of any length; of 4n + 1 frames whole ones come back, of others fewer. Every piece along time of every
    ``micro_batch`` clips is a piece of work."""

    causal = True
    is_costly = True

    def __init__(self, cfg: OpenSoraV13Config, device: torch.device | str, dtype: torch.dtype) -> None:
        """On the meta device: without weights, to know sizes and memory by."""
        sizes = _sizes(cfg)
        self.cfg, self._dtype = cfg, dtype
        build = partial(CausalVAE, sizes, cfg.micro_batch_2d)
        self.network: CausalVAE = build_network(build, cfg.path, WEIGHTS, device, dtype)
        shape = opensora_v1_3_shape(cfg)
        self.channels, self.stride = shape.channels, shape.stride
        self.coding = cfg.coding
        self.samples = cfg.sample == "posterior"

    @torch.no_grad()
    def encode(self, pixels: Tensor, run: TaskRunner = one_by_one, draw: Draw | None = None) -> Tensor:
        """(B, 3, T, H, W) in [-1, 1] -> (B, channels, T', H', W') fp32: the mode, or a sample where ``vae.sample`` says
        so and ``draw`` gives standard normal noise."""
        if not self.samples or draw is None:
            z = self._encoded(pixels, self._mean, self.channels, run).float()
        else:
            posterior = self.posterior(pixels, run)
            z = posterior.sample(draw(tuple(posterior.mean.shape[1:]))).float()
        return normalized(z, self.cfg.normalization)

    @torch.no_grad()
    def posterior(self, pixels: Tensor, run: TaskRunner = one_by_one) -> Posterior:
        """Of (B, 3, T, H, W) in [-1, 1]; not normalized as latents are."""
        moments = self._encoded(pixels, self.network.encoder, 2 * self.channels, run)
        return Posterior.of(moments.to(torch.promote_types(moments.dtype, torch.float32)))

    @torch.no_grad()
    def decode(
        self, latents: Tensor, run: TaskRunner = one_by_one, *, frames: int | None = None, clamp: bool = True
    ) -> Tensor:
        """(B, channels, T', H', W') -> (B, 3, T, H, W) fp32, in [-1, 1] unless ``clamp`` is off.

        Args:
            frames: the first so many; None: all that they decode to.
        """
        z = denormalized(latents.float(), self.cfg.normalization).to(self._dtype)
        pieces = self.coding.latent_pieces(z.shape[2])
        size = tuple(SPACE * side for side in z.shape[3:])
        work = [
            _piece(clips[:, :, p], self.network.decoder, (COLOURS, QUARTER * (p.stop - p.start - 1) + 1, *size))
            for clips in z.split(self.cfg.micro_batch or len(z))
            for p in pieces
        ]
        join = _joined_overlapping if self.cfg.temporal_overlap else partial(torch.cat, dim=2)
        pixels = _by_clip(run(work), len(pieces), join)[:, :, :frames]
        return pixels.clamp_(-1, 1) if clamp else pixels

    def _encoded(self, pixels: Tensor, code: Callable[[Tensor], Tensor], channels: int, run: TaskRunner) -> Tensor:
        _, *size = grid_of(pixels, self)
        pieces = self.coding.pieces(pixels.shape[2])
        work = [
            _piece(clips[:, :, p], code, (channels, quarter(p.stop - p.start), *size))
            for clips in pixels.to(self._dtype).split(self.cfg.micro_batch or len(pixels))
            for p in pieces
        ]
        return _by_clip(run(work), len(pieces), partial(torch.cat, dim=2))

    def _mean(self, x: Tensor) -> Tensor:
        return self.network.encoder(x)[:, : self.channels]


def _piece(x: Tensor, code: Callable[[Tensor], Tensor], size: tuple[int, ...]) -> Task:
    """``size``: of the result, without its first dim. Contiguous both ways, see ``tiles``."""
    return Task(lambda: code(x.contiguous()).contiguous(), (len(x), *size))


def _by_clip(results: list[Tensor], pieces: int, join: Callable[[list[Tensor]], Tensor]) -> Tensor:
    """Clips of so many pieces each, joined in fp32 (or fp64) at least."""
    found = [result.to(torch.promote_types(result.dtype, torch.float32)) for result in results]
    return torch.cat([join(found[i : i + pieces]) for i in range(0, len(found), pieces)])


def _joined_overlapping(parts: list[Tensor]) -> Tensor:
    """Pieces of (B, 3, T, H, W) whose neighbours have a frame in common: its mean."""
    found = [parts[0]]
    for part in parts[1:]:
        before = found.pop()
        shared = (before[:, :, -1:] + part[:, :, :1]) / 2
        found.append(torch.cat([before[:, :, :-1], shared, part[:, :, 1:]], 2))
    return found[0]


def _sizes(cfg: OpenSoraV13Config) -> CausalSizes:
    checkpoint = find_checkpoint(cfg.path, WEIGHTS)
    return _checked(checkpoint, cfg) if checkpoint else PUBLISHED


def _checked(checkpoint: Checkpoint, cfg: OpenSoraV13Config) -> CausalSizes:
    """Sizes of a network whose latents can be normalized as configured.

    Raises:
        UserError: they have other channels.
    """
    sizes = network_sizes(checkpoint)
    if cfg.normalization != "none" and sizes.channels != CHANNELS:
        raise UserError(
            f"vae.normalization={cfg.normalization}: is of {CHANNELS} channels, and {cfg.path} has {sizes.channels}; "
            "must be none"
        )
    return sizes


def network_sizes(checkpoint: Checkpoint) -> CausalSizes:
    """What the tensors of a checkpoint say."""
    widths = checkpoint.widths("encoder.down.{}.block.0.conv1.conv.weight", PUBLISHED.widths)
    if len(widths) != LEVELS:
        return PUBLISHED  # names what is missing
    return CausalSizes(
        first=checkpoint.shapes.get("encoder.conv_in.conv.weight", (PUBLISHED.first,))[0],
        widths=widths,
        layers=checkpoint.count("encoder.down.0.block.{}.conv1.conv.weight", PUBLISHED.layers),
        channels=checkpoint.shapes.get("decoder.conv_in.conv.weight", (0, PUBLISHED.channels))[1],
    )


def check_opensora_v1_3(cfg: OpenSoraV13Config) -> None:
    """That the weights of ``cfg`` are there, with the names and shapes of such an autoencoder; reads headers only.

    Raises:
        UserError: they are not.
    """
    checkpoint = open_checkpoint(cfg.path, WEIGHTS)
    checkpoint.check(partial(CausalVAE, _checked(checkpoint, cfg)))


def opensora_v1_3_shape(cfg: OpenSoraV13Config) -> AutoencoderShape:
    """The file's own numbers where it exists, else the published ones."""
    stride = (QUARTER, SPACE, SPACE)
    return AutoencoderShape(_sizes(cfg).channels, stride, OpenSoraV13Autoencoder.causal, coding=cfg.coding)
