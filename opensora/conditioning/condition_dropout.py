"""Which samples with reference frames lose these, their prompt, or both, and what their frames weigh in the loss: for
guidance in three passes, as in Open-Sora 1.3 (drop_condition, x_cond_weight)."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from opensora.utils.rng import numpy_generator


class Drop(NamedTuple):
    """What a sample loses."""

    text: bool
    reference: bool


DROPS: dict[str, Drop] = {  # named by what is left
    "keep": Drop(text=False, reference=False),
    "cond": Drop(text=True, reference=False),
    "text": Drop(text=False, reference=True),
    "null": Drop(text=True, reference=True),
}


def draw_drops(seed: int, step: int, sample_ids: tuple[int, ...], weights: Mapping[str, float]) -> list[Drop]:
    """One for each sample; the original draws one for a whole batch."""
    names, total = list(weights), sum(weights.values())
    drawn = [numpy_generator(seed, step, sample, "drop condition").random() * total for sample in sample_ids]
    return [DROPS[_at(names, weights, place)] for place in drawn]


def _at(names: list[str], weights: Mapping[str, float], place: float) -> str:
    for name in names:
        place -= weights[name]
        if place < 0:
            return name
    return next(name for name in reversed(names) if weights[name])


def without_references(reference: Tensor, dropped: Tensor) -> Tensor:
    """(B, C, T', H', W') with zeros for samples that are ``dropped`` (B,); which frames these were is known still."""
    return torch.where(dropped.view(-1, *[1] * (reference.ndim - 1)), 0.0, reference)


def known_weights(known: Tensor, weight: float) -> Tensor:
    """(B, ...) fp64 of tokens in the loss: ``weight`` where known, and (1 - f weight) / (1 - f) elsewhere, f the part
    of a sample that is known, so that the mean is 1. A sample all of which is known has no other."""
    share = known.double().flatten(1).mean(1)
    others = (1 - share * weight) / (1 - share).clamp(min=torch.finfo(share.dtype).eps)
    return torch.where(known, weight, others.view(-1, *[1] * (known.ndim - 1)))
