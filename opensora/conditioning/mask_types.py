"""Frames that Open-Sora 1.3 is given in training (``mask_types``): which latent frames of a clip the model reads beside
the noise, as latents of the whole clip, coded together with the frames that it has to learn.

They are drawn by weight for every (seed, step, sample); the original draws one type for all clips of a batch. A still
is given nothing. The types of ``references.py``, which are those of Open-Sora 2, give frames that are coded by
themselves, and so many at each end whatever the length of the clip.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from opensora.schedulers.timesteps import draw_per_sample
from opensora.utils.rng import numpy_generator

NOISE = (0.1, 0.3)  # least and most part of noise in the pixels of a noisy reference
_NOISY = "_noisy"

Draw = Callable[[int, np.random.Generator], list[int]]  # (frames, where to draw from) -> which of these are given


def _other(frames: int, rng: np.random.Generator) -> list[int]:
    """Some frames at the head, or at the tail; one at least is left."""
    count = int(rng.integers(1, frames))
    return list(range(count)) if rng.integers(2) == 0 else list(range(frames - count, frames))


_PLAIN: dict[str, Draw] = {
    "i2v_head": lambda frames, rng: [0],
    "i2v_tail": lambda frames, rng: [frames - 1],
    "i2v_loop": lambda frames, rng: [0, frames - 1],
    "v2v_head": lambda frames, rng: list(range(frames // 2)),
    "v2v_tail": lambda frames, rng: list(range(frames // 2, frames)),
    "other": _other,
    "i2v": lambda frames, rng: [0],
}
MASK_TYPES: dict[str, Draw] = {
    "none": lambda frames, rng: [],
    **_PLAIN,
    **{f"{name}{_NOISY}": draw for name, draw in _PLAIN.items()},
}


class GivenFrames(NamedTuple):
    """What a sample is given."""

    frames: list[int]  # latent ones (mask_index)
    noise: float = 0.0  # part of noise in the pixels that they are coded from


def is_noisy(mask_type: str) -> bool:
    """Whether its frames are coded from pixels with noise."""
    return mask_type.endswith(_NOISY)


def draw_given(seed: int, step: int, sample: int, frames: int, weights: Mapping[str, float]) -> GivenFrames:
    """What a sample of so many latent frames is given, its type drawn by weight."""
    if frames == 1:
        return GivenFrames([])
    rng = numpy_generator(seed, step, sample, "mask type")
    place = rng.random() * sum(weights.values())
    names = [name for name, weight in weights.items() if weight > 0]
    chosen = names[-1]
    for name in names:
        place -= weights[name]
        if place < 0:
            chosen = name
            break
    return GivenFrames(MASK_TYPES[chosen](frames, rng), float(rng.uniform(*NOISE)) if is_noisy(chosen) else 0.0)


def known_latents(given: list[GivenFrames], latents: tuple[int, int, int]) -> Tensor:
    """(B, T', H', W') bool on the CPU, a view."""
    frames, height, width = latents
    known = torch.zeros(len(given), frames, dtype=torch.bool)
    for row, one in zip(known, given, strict=True):
        row[one.frames] = True
    return known[:, :, None, None].expand(-1, -1, height, width)


def noisy_pixels(pixels: Tensor, noise: list[float], seed: int, step: int, sample_ids: tuple[int, ...]) -> Tensor:
    """(B, 3, T, H, W) in [-1, 1] on the CPU -> (1 - s) pixels + s e, s of each sample from ``noise``, e normal."""
    drawn = draw_per_sample(seed, step, sample_ids, "reference noise", tuple(pixels.shape[1:]))
    part = torch.tensor(noise, dtype=torch.float32).view(-1, *[1] * (pixels.ndim - 1))
    return (1 - part) * pixels.float() + part * drawn
