"""Which latent frames of a training clip the model is given clean (the mask strategies of Open-Sora 1.1 and later).

Drawn per (seed, step, sample), so that every process knows how many latents of a whole step are learned from, without
an exchange.
"""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from opensora.utils.rng import numpy_generator

Draw = Callable[[int, np.random.Generator], np.ndarray]  # (frames, where to draw from) -> (frames,) bool, True: known


def _random(frames: int, rng: np.random.Generator) -> np.ndarray:
    """Each with a common probability of 0.1 to 0.9; one at least stays noisy."""
    known = rng.random(frames) < rng.uniform(0.1, 0.9)
    if known.all():
        known[rng.integers(frames)] = False
    return known


def _interpolate(frames: int, rng: np.random.Generator) -> np.ndarray:
    """Every other one, from the first or the second on."""
    return np.arange(frames) % 2 == rng.integers(2)


def _runs(longest: Callable[[int], int], *places: str) -> Draw:
    """Up to ``longest`` frames at each of ``places``, as many at both ends. Where ``longest`` is none it is one: a
    quarter of two or three frames, of which the original fails."""

    def draw(frames: int, rng: np.random.Generator) -> np.ndarray:
        count = int(rng.integers(1, max(1, longest(frames)) + 1))
        known = np.zeros(frames, bool)
        if "random" in places:
            start = int(rng.integers(0, frames - count + 1))
            known[start : start + count] = True
        if "head" in places:
            known[:count] = True
        if "tail" in places:
            known[-count:] = True
        return known

    return draw


_ENDS = {"random": ("random",), "head": ("head",), "tail": ("tail",), "head_tail": ("head", "tail")}
_LONGEST: dict[str, Callable[[int], int]] = {"quarter": lambda frames: frames // 4, "image": lambda frames: 1}

MASKS: dict[str, Draw] = {
    "random": _random,
    "intepolate": _interpolate,  # spelt as in the family's configurations
    **{f"{size}_{name}": _runs(longest, *ends) for size, longest in _LONGEST.items() for name, ends in _ENDS.items()},
}


def draw_known(seed: int, step: int, sample: int, frames: int, masks: Mapping[str, float]) -> np.ndarray | None:
    """(frames,) bool, the latent frames of a sample that are given; None: none. One frame at least is learned: of two
    frames image_head_tail gives the first alone, as in Open-Sora 1.3 (earlier ones gave both and learned nothing)."""
    if not masks or frames == 1:
        return None
    rng = numpy_generator(seed, step, sample, "mask")
    left = rng.random()
    for name, share in masks.items():
        left -= share
        if left < 0:
            known = MASKS[name](frames, rng)
            if known.all():
                known[-1] = False
            return known if known.any() else None
    return None


def known_frames(
    seed: int, step: int, sample_ids: tuple[int, ...], grid: tuple[int, int, int], masks: Mapping[str, float]
) -> Tensor | None:
    """(B, T', H', W') bool on the CPU, a view; None where masks are not used at all."""
    if not masks:
        return None
    frames, height, width = grid
    drawn = [draw_known(seed, step, sample, frames, masks) for sample in sample_ids]
    known = torch.from_numpy(np.stack([np.zeros(frames, bool) if one is None else one for one in drawn]))
    return known[:, :, None, None].expand(-1, -1, height, width)
