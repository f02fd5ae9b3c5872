"""What tokens weigh in the loss of a step, which is a sum over tokens of all processes, divided once."""

import torch
from torch import Tensor

from opensora.conditioning.condition_dropout import known_weights
from opensora.config.run import LossReduction


def loss_weights(
    x: Tensor,
    known: Tensor | None,
    *,
    left_out: bool,
    known_weight: float = 1.0,
    reduction: LossReduction = "elements",
    inside: Tensor | None = None,
) -> Tensor | None:
    """(B, N) or (B, T, S) fp64, of the whole tokens ``x`` (..., C) of samples; None: all 1.

    Args:
        known: the same shape, bool: what the model is given; None: nothing.
        left_out: whether the loss is of the other tokens alone.
        known_weight: of what is known, if it is in the loss; see ``known_weights``.
        reduction: samples: a token of a sample weighs 1 / (latent values of the sample that the loss is over).
        inside: (1, ..., C) bool, values of tokens that are latents and fill up nothing; None: all.
    """
    weights = None
    if known is not None and not left_out and known_weight != 1:
        weights = known_weights(known, known_weight)
    if reduction == "elements":
        return weights
    weights = torch.ones(x.shape[:-1], device=x.device, dtype=torch.float64) if weights is None else weights
    learned = ~known if known is not None and left_out else torch.ones_like(weights, dtype=torch.bool)
    values = learned.flatten(1).sum(1) * x.shape[-1]
    if inside is not None:
        values = (learned[..., None] & inside).flatten(1).sum(1)
    return weights / values.view(-1, *[1] * (weights.ndim - 1))
