"""Reference frames: the kinds of Open-Sora 2, which latent frames each of them gives, and what is coded for these.

A kind names an end of the clip (or both) and how much of it is known. What is known is coded by itself, as a clip of
these frames alone: in sampling there is nothing else, and in training nothing of the other frames leaks into it. What
models are given of it is a matter of ``Denoising.references``:

* channels: cat(mask, mask * latents) beside the noise
* clip: beside the noise, too, but coded as one clip with the rest of it, which is grey (0 in [-1, 1]), by the mode of
  the posterior; kinds are then those that give frames at the head, as Wan is trained with
* in_place: these latents in the place of noise, clean from the first step to the last

In training a kind is drawn for every (seed, step, sample), so that every process knows without an exchange how many
latents of a whole step are learned from.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from opensora.models.base import Autoencoder, AutoencoderShape
from opensora.utils.rng import numpy_generator

End = Literal["head", "tail"]
STILL = 0  # in place of a number of groups: one frame, which becomes one latent frame
MOST_REFERENCES = 2  # images or clips that a kind may be given: one for each end

# kind -> (which end, groups of frames that become a latent frame each; a causal autoencoder codes one frame more)
KINDS: dict[str, tuple[tuple[End, int], ...]] = {
    "t2v": (),
    "i2v_head": (("head", STILL),),
    "i2v_tail": (("tail", STILL),),
    "i2v_loop": (("head", STILL), ("tail", STILL)),
    "v2v_head": (("head", 8),),
    "v2v_tail": (("tail", 8),),
    "v2v_head_easy": (("head", 16),),
    "v2v_tail_easy": (("tail", 16),),
}


class Part(NamedTuple):
    """Frames at one end of a clip that are coded by themselves."""

    end: End
    frames: int  # of pixels
    latents: int  # frames of latents

    @property
    def name(self) -> str:
        """As in ``head_33``."""
        return f"{self.end}_{self.frames}"

    def of(self, x: Tensor, length: int) -> Tensor:
        """(..., T, H, W) -> (..., length, H, W): the first or last frames, a view."""
        return x[..., :length, :, :] if self.end == "head" else x[..., x.shape[-3] - length :, :, :]


def parts_of(kind: str, shape: Autoencoder | AutoencoderShape) -> tuple[Part, ...]:
    """What a kind gives, the head first.

    Raises:
        ValueError: there is no such kind.
    """
    if kind not in KINDS:
        raise ValueError(f"{kind}: must be one of {', '.join(KINDS)}")
    lead = int(shape.causal)
    return tuple(
        Part(end, 1, 1) if groups == STILL else Part(end, groups * shape.stride[0] + lead, groups + lead)
        for end, groups in KINDS[kind]
    )


def kinds_of(references: str) -> tuple[str, ...]:
    """The kinds that models can be given that take references so (``Denoising.references``)."""
    if references == "none":
        return ("t2v",)
    if references == "clip":  # whose mask tells latent frames apart, of which a tail would begin within one
        return tuple(kind for kind, ends in KINDS.items() if all(end == "head" for end, _ in ends))
    return tuple(KINDS)


def grey_behind(head: Tensor, frames: int) -> Tensor:
    """(..., k, H, W) in [-1, 1] -> (..., frames, H, W): grey behind the first frames of a clip."""
    grey = head.new_zeros(*head.shape[:-3], frames - head.shape[-3], *head.shape[-2:])
    return torch.cat((head, grey), dim=-3)


def is_still(kind: str) -> bool:
    """Whether a kind gives single frames, which stay as they are in what is sampled."""
    return kind.startswith("i2v")


def fits(kind: str, latent_frames: int, shape: Autoencoder | AutoencoderShape) -> bool:
    """Whether a clip of so many latent frames has room for what a kind gives: a still gives nothing, one given frame
    at each end may be all of a clip, and longer references have to leave a latent frame."""
    given = sum(part.latents for part in parts_of(kind, shape))
    return given == 0 or (latent_frames > 1 and given < latent_frames + is_still(kind))


def draw_kind(
    seed: int,
    step: int,
    sample: int,
    latent_frames: int,
    weights: Mapping[str, float],
    shape: Autoencoder | AutoencoderShape,
    *,
    learn_some: bool = False,
) -> str:
    """The kind of a training sample, drawn by weight among those that fit its clip; t2v where none does.

    Args:
        learn_some: known frames are left out of the loss, so a kind that gives the whole clip does not fit.
    """
    if latent_frames == 1:
        return "t2v"
    fitting = {
        kind: weights[kind]
        for kind in KINDS
        if weights.get(kind, 0) > 0
        and fits(kind, latent_frames, shape)
        and not (learn_some and given_frames(kind, latent_frames, shape) == latent_frames)
    }
    left = numpy_generator(seed, step, sample, "condition").random() * sum(fitting.values())
    for kind, weight in fitting.items():
        left -= weight
        if left < 0:
            return kind
    return next(reversed(fitting), "t2v")


def given_frames(kind: str, latent_frames: int, shape: Autoencoder | AutoencoderShape) -> int:
    """Latent frames of a clip that are known."""
    return min(latent_frames, sum(part.latents for part in parts_of(kind, shape)))


def shown(tokens: Tensor, known: Tensor) -> Tensor:
    """(B, K, D) tokens of first frames, with zeros of samples that do not know theirs; known is (B, T', H', W')."""
    return torch.where(known[:, 0].flatten(1).any(1)[:, None, None], tokens, 0.0)


def needed_parts(
    weights: Mapping[str, float], latent_frames: int, shape: Autoencoder | AutoencoderShape
) -> tuple[Part, ...]:
    """Whatever draws may ask of a clip of this length, each once, in a fixed order."""
    if latent_frames == 1:
        return ()
    kinds = [kind for kind in KINDS if weights.get(kind, 0) > 0 and fits(kind, latent_frames, shape)]
    return tuple(dict.fromkeys(part for kind in kinds for part in parts_of(kind, shape)))


def code_references(
    kinds: Sequence[str],
    grid: tuple[int, int, int],
    shape: Autoencoder | AutoencoderShape,
    code: Callable[[Part, list[int]], Tensor],
    *,
    device: torch.device | str = "cpu",
    whole: bool = False,
) -> tuple[Tensor, Tensor]:
    """What is known of a batch, one kind per sample.

    Args:
        grid: (T', H', W') of the clips.
        code: (part, samples) -> (len(samples), C, part.latents, H', W'), the part of each of these samples coded by
            itself; or (len(samples), C, T', H', W'), coded with the rest of the clip grey, ``whole``. Called once for
            every part that any sample has.
        device: where ``code`` leaves its results.

    Returns:
        reference (B, C, T', H', W') in the precision of what is coded (fp32 where nothing is), zeros where unknown, or
        in samples of which nothing is; and known (B, T', H', W') bool.
    """
    rows: dict[Part, list[int]] = {}
    for row, kind in enumerate(kinds):
        for part in parts_of(kind, shape):
            rows.setdefault(part, []).append(row)
    coded = {part: code(part, samples) for part, samples in rows.items()}
    dtype = next((latents.dtype for latents in coded.values()), torch.float32)
    reference = torch.zeros(len(kinds), shape.channels, *grid, dtype=dtype, device=device)
    known = torch.zeros(len(kinds), *grid, dtype=torch.bool, device=device)
    for part, latents in coded.items():
        for row, one in zip(rows[part], latents, strict=True):
            (reference[row] if whole else part.of(reference[row], part.latents))[:] = one
            part.of(known[row], part.latents)[:] = True
    return reference, known
