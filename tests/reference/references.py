"""Known frames of a training clip: which kind is drawn, and what of the clip is given for it."""

from collections.abc import Mapping

import torch
from torch import Tensor

from tests.reference import draws
from tests.reference.encoders import BlockTransform

# In this order draws go through them: (latent frames at the head, at the tail), as a causal autoencoder codes them.
GIVEN = {
    "t2v": (0, 0), "i2v_head": (1, 0), "i2v_tail": (0, 1), "i2v_loop": (1, 1), "v2v_head": (9, 0), "v2v_tail": (0, 9),
    "v2v_head_easy": (17, 0), "v2v_tail_easy": (0, 17),
}  # fmt: skip


def kind(weights: Mapping[str, float], frames: int, learn_some: bool, seed: int, step: int, sample: int) -> str:
    """By weight among those that ``frames`` latent frames have room for; a still has none."""
    room = {}
    for name, (head, tail) in GIVEN.items():
        enough = head + tail < frames or (name == "i2v_loop" and frames == 2 and not learn_some)
        if weights.get(name) and enough and (frames > 1 or name == "t2v"):
            room[name] = weights[name]
    if not room or frames == 1:
        return "t2v"
    at = draws.philox(seed, step, sample, "condition").random() * sum(room.values())
    for name, weight in room.items():
        at -= weight
        if at < 0:
            return name
    raise AssertionError("unreachable")


def given(name: str, pixels: Tensor, autoencoder: BlockTransform, grid: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """(mask (1, T', H', W'), mask * latents (C, T', H', W')) of a clip (3, T, H, W): each end coded by itself."""
    mask, latents = torch.zeros(1, *grid), torch.zeros(autoencoder.channels, *grid, dtype=pixels.dtype)
    head, tail = GIVEN[name]
    if head:
        mask[:, :head], latents[:, :head] = 1, autoencoder.encode(pixels[:, : 4 * head - 3])
    if tail:
        mask[:, -tail:], latents[:, -tail:] = 1, autoencoder.encode(pixels[:, -(4 * tail - 3) :])
    return mask, latents
