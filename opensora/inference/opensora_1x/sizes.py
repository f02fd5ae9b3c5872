"""How long clips that go on from one another are, in latent frames and in frames."""

from typing import Any

from opensora.config.run import SampleConfig
from opensora.inference.lengths import Coder, coded, frames_of, latents_made
from opensora.models.base import Denoising, coding_of


def joins_latents(release: str | None, references: str) -> bool:
    """Whether clips are joined before they are decoded, as in 1.3, and by models that read references beside the noise.

    ``references``: see ``Denoising``.
    """
    return release == "1.3" or references == "channels"


def piece_length(shape: Coder) -> int:
    """Latent frames that an autoencoder decodes together; 1: it says nothing of pieces."""
    return getattr(coding_of(shape), "latent_length", None) or 1


def frames_at_head(latents: int, shape: Coder) -> int:
    """Frames of a clip that its first latent frames decode to."""
    if (coding := coding_of(shape)) is not None:
        return coding.frames(latents)
    lead = int(shape.causal)
    return (latents - lead) * shape.stride[0] + lead


def whole_pieces(latents: int, shape: Coder) -> int:
    """Latent frames of joined clips that are decoded: whole pieces, if there are any."""
    piece = piece_length(shape)
    return latents // piece * piece or latents


def clip_latents(cfg: SampleConfig, denoising: Denoising, shape: Coder) -> int:
    """Latent frames of one clip."""
    return latents_made(coded(cfg.sampling, denoising, shape), shape)


def video_frames(cfg: SampleConfig, latents: int, shape: Coder, references: Any) -> int:
    """Frames of a whole video whose clips have so many latent frames each."""
    asked = cfg.sampling.num_frames
    if cfg.loop == 1:
        return asked
    length, more = cfg.condition_frame_length, cfg.loop - 1
    if joins_latents(cfg.release, references):
        return frames_of(whole_pieces(latents + more * (latents - length), shape), 0, shape)
    return asked + more * (frames_of(latents, asked, shape) - frames_at_head(length, shape))
