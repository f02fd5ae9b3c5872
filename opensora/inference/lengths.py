"""How many frames are made of a clip, and which of them are those that were asked for.

An autoencoder codes frames in groups, so a few more may have to be made. Two autoencoders need more than that: one that
is not causal decodes a single frame that is known to a whole group, of which the clip needs one; and one that decodes
in tiles may give fewer frames of the last tile (``AutoencoderShape.time_tiles``). One that takes clips of any length
says itself how many are to be made (``AutoencoderShape.coding``).
"""

from typing import TypeAlias

from torch import Tensor

from opensora.conditioning.references import KINDS, is_still
from opensora.models.base import Autoencoder, AutoencoderShape, ClipCoding, Denoising, coding_of, decoded_frames
from opensora.sampling.options import SamplingOption
from opensora.schedulers.timesteps import coded_frames, latent_frames

Coder: TypeAlias = Autoencoder | AutoencoderShape
MAX_STRIDE = 64  # pixels: a frame that every autoencoder can code


def coded(option: SamplingOption, denoising: Denoising, shape: Coder, cond_type: str = "t2v") -> int:
    """Frames that are made of a clip, so that those that were asked for are among what its latents decode to.

    With ``noise=published`` as few as the family's sampler makes.
    """
    stride, patch = shape.stride[0], denoising.patch[0]
    if (coding := coding_of(shape)) is not None:
        if option.noise == "published":
            return frames_of(_stated(option.num_frames, coding), option.num_frames, shape)
        return _coded_as_told(option.num_frames, patch, coding)
    made = coded_frames(option.num_frames, stride, shape.causal, patch)
    if option.num_frames == 1 or option.noise == "published":
        return made
    wanted = option.num_frames + (repetitions(cond_type, shape) > 0) * (stride - 1)
    while decoded_frames(latent_frames(made, stride, shape.causal), shape) < wanted:
        made = coded_frames(made + 1, stride, shape.causal, patch)
    return made


def _coded_as_told(frames: int, patch: int, coding: ClipCoding) -> int:
    """The least frames that are whole patches. A still that is none is left to ``Denoising.check_frames``."""
    made = coding.made(frames)
    while frames > 1 and _latents_of(made, coding) % patch:
        made = coding.made(made + 1)
    return made


def _stated(frames: int, coding: ClipCoding) -> int:
    """
    Raises:
        ValueError: the family's sampler would make nothing.
    """
    latents = coding.stated(frames, None, None)[0]
    if not latents:
        raise ValueError(
            "makes no latent frames with noise=published; must be 1, or a piece of the autoencoder or more"
        )
    return latents


def latents_made(frames: int, shape: Coder) -> int:
    """Latent frames of so many frames, which ``coded`` gave."""
    if (coding := coding_of(shape)) is not None:
        return _latents_of(frames, coding)
    return latent_frames(frames, shape.stride[0], shape.causal)


def _latents_of(frames: int, coding: ClipCoding) -> int:
    return coding.latents(frames, MAX_STRIDE, MAX_STRIDE)[0]


def frames_of(latents: int, frames: int, shape: Coder) -> int:
    """Frames that so many latent ones are of, where ``frames`` were asked for."""
    if (coding := coding_of(shape)) is not None:
        return frames if _latents_of(frames, coding) == latents else coding.frames(latents)
    return 1 if latents == 1 else (latents - int(shape.causal)) * shape.stride[0] + int(shape.causal)


def repetitions(cond_type: str, shape: Coder, end: str | None = None) -> int:
    """Frames of a clip that repeat one that is known, at ``end`` or in all."""
    if shape.causal or coding_of(shape) is not None or not is_still(cond_type):
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
