"""How many frames are made of a clip, and which of them are those that were asked for.

An autoencoder codes frames in groups, so a few more may have to be made. Two autoencoders need more than that: one that
is not causal decodes a single frame that is known to a whole group, of which the clip needs one; and one that decodes
in tiles may give fewer frames of the last tile (``AutoencoderShape.time_tiles``).
"""

from typing import TypeAlias

from torch import Tensor

from opensora.conditioning.references import KINDS, is_still
from opensora.models.base import Autoencoder, AutoencoderShape, Denoising, decoded_frames
from opensora.sampling.options import SamplingOption
from opensora.schedulers.timesteps import coded_frames, latent_frames

Coder: TypeAlias = Autoencoder | AutoencoderShape


def coded(option: SamplingOption, denoising: Denoising, shape: Coder, cond_type: str = "t2v") -> int:
    """Frames that are made of a clip, so that those that were asked for are among what its latents decode to.

    With ``noise=published`` as few as the family's sampler makes.
    """
    stride, patch = shape.stride[0], denoising.patch[0]
    made = coded_frames(option.num_frames, stride, shape.causal, patch)
    if option.num_frames == 1 or option.noise == "published":
        return made
    wanted = option.num_frames + (repetitions(cond_type, shape) > 0) * (stride - 1)
    while decoded_frames(latent_frames(made, stride, shape.causal), shape) < wanted:
        made = coded_frames(made + 1, stride, shape.causal, patch)
    return made


def repetitions(cond_type: str, shape: Coder, end: str | None = None) -> int:
    """Frames of a clip that repeat one that is known, at ``end`` or in all."""
    if shape.causal or not is_still(cond_type):
        return 0
    return (shape.stride[0] - 1) * sum(end in (None, at) for at, _ in KINDS[cond_type])


def asked_for(pixels: Tensor, cond_type: str, frames: int, shape: Coder) -> Tensor:
    """``frames`` of (B, 3, T, H, W): without repetitions of a single known frame, as far as there are more frames than
    those, and otherwise from the end that is known."""
    more = pixels.shape[2] - frames
    if more <= 0:
        return pixels
    ends = {end for end, _ in KINDS[cond_type]} if repetitions(cond_type, shape) else set()
    head = min(more, repetitions(cond_type, shape, "head"))
    tail = min(more - head, repetitions(cond_type, shape, "tail") if _is_whole(pixels.shape[2], shape) else 0)
    if ends == {"tail"}:
        head = more - tail
    return pixels[:, :, head : head + frames]


def _is_whole(frames: int, shape: Coder) -> bool:
    """Whether the last latent frame of a clip decodes to a whole group."""
    return frames % shape.stride[0] == 0


def as_published(pixels: Tensor, cond_type: str, frames: int, shape: Coder) -> Tensor:
    """Those that the family's sampler leaves: at most ``frames``, and of these no repetition. Of 16 these are 13, or 10
    where both ends are known."""
    pixels = pixels[:, :, :frames]
    head, tail = (repetitions(cond_type, shape, end) for end in ("head", "tail"))
    return pixels[:, :, head : pixels.shape[2] - tail] if head + tail < pixels.shape[2] else pixels
