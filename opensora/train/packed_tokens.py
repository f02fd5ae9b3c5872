"""Packed sequences: samples of several shapes, concatenated into one sequence of tokens."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from opensora.models.conditions import Conditions

SampleOf = tuple[Tensor, Tensor]  # number of its sample for every text token (1, L), for every image token (1, N)
BY_SAMPLE = (
    "pooled",
    "label",
    "dropped",
    "fps",
    "size",
    "num_frames",
    "guidance",
    "image_tokens",
)  # fields of Conditions with a row per sample


@dataclass(frozen=True, kw_only=True)
class EncodedTokens:
    """Samples as tokens, before these are cut over processes."""

    x: Tensor  # (B, N, C) or (B, T, S, C), noisy
    positions: Tensor  # (B, N, 3) or (B, T, S, 3)
    targets: dict[str, Tensor]  # as x, fp32
    t: Tensor  # (S,); S = B, but for a packed sequence
    conditions: Conditions  # references as tokens
    inside: Tensor | None = None  # (1, T, S, C) or (1, N, C) bool, values that are latents; None: all
    grid: tuple[int, int, int] | None = None  # tokens along (t, h, w); None: of several samples in a sequence
    weights: Tensor | None = None  # (B, N) or (B, T, S) fp64: of tokens in the loss; None: all 1


def concat_packed(parts: Sequence[EncodedTokens]) -> tuple[EncodedTokens, SampleOf]:
    """One sequence of all samples; text that nobody may attend to is left out.

    Returns:
        The sequence (B = 1), and of every text and image token the number of its sample, int64 on the CPU, as what
        follows from them is made there. Where text has a mask, counting it waits for the device.
    """
    text: list[Tensor] = []
    text_lengths: list[int] = []
    image_lengths: list[int] = []
    for part in parts:
        tokens, mask = part.conditions.text, part.conditions.text_mask
        assert tokens is not None, "a sequence of samples needs their texts"
        text.append(tokens.flatten(0, 1) if mask is None else tokens[mask])
        samples, length = tokens.shape[:2]
        text_lengths += [length] * samples if mask is None else mask.sum(dim=1).tolist()
        image_lengths += [part.x.shape[1]] * samples
    known = [part.conditions for part in parts]
    packed = EncodedTokens(
        x=_end_to_end([part.x for part in parts]),
        positions=_end_to_end([part.positions for part in parts]),
        targets={name: _end_to_end([part.targets[name] for part in parts]) for name in parts[0].targets},
        t=torch.cat([part.t for part in parts]),
        conditions=Conditions(
            text=torch.cat(text)[None],
            **_joined(known, ("reference", "known"), _end_to_end),
            **_joined(known, BY_SAMPLE, torch.cat),
        ),
        weights=_joined(parts, ("weights",), _end_to_end).get("weights"),
    )
    return packed, (_sample_numbers(text_lengths), _sample_numbers(image_lengths))


def of_samples(t: Tensor, x: Tensor, sample_of: SampleOf | None) -> Tensor:
    """Times (S,) with dims to broadcast over tokens like ``x``; those of a packed sequence by token, (1, N, 1)."""
    return t.view(-1, *[1] * (x.ndim - 1)) if sample_of is None else t[sample_of[1]][..., None]


def _end_to_end(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten(0, 1) for tensor in tensors])[None]


def _joined(
    known: Sequence[Conditions] | Sequence[EncodedTokens], names: Sequence[str], join: Callable[[list[Tensor]], Tensor]
) -> dict[str, Tensor]:
    """The named fields, of those that all samples have."""
    columns = {name: [x for one in known if (x := getattr(one, name)) is not None] for name in names}
    return {name: join(column) for name, column in columns.items() if len(column) == len(known)}


def _sample_numbers(lengths: list[int]) -> Tensor:
    """(1, sum of lengths): 0 as often as the first length says, then 1, ..."""
    return torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[None]
