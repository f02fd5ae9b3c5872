"""Samples of several shapes, laid end to end in one sequence."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Whole:
    """Samples as tokens, before these are cut over processes; named as the arguments of a denoiser's forward."""

    img: Tensor  # (B, N, C*p*p)
    img_ids: Tensor  # (B, N, 3)
    target: Tensor  # (B, N, C*p*p) velocity, fp32
    cond: Tensor | None  # (B, N, ...)
    txt: Tensor  # (B, L, D)
    txt_mask: Tensor | None  # (B, L) bool
    timesteps: Tensor  # (S,); S = B, but for a pack
    y_vec: Tensor  # (S, V)


Rows = tuple[Tensor, Tensor]


def joined(parts: Sequence[Whole]) -> tuple[Whole, Rows]:
    """One sequence of all samples; text that nobody may attend to is left out.

    Returns:
        The sequence (B = 1), and of every text and image token the number of its sample: (1, L), (1, N) int64 on the
        CPU, as what follows from them is made there. Where text has a mask, counting it waits for the device.
    """
    words = [length for part in parts for length in _words(part)]
    tokens = [part.img.shape[1] for part in parts for _ in range(part.img.shape[0])]
    cond = [part.cond for part in parts if part.cond is not None]
    whole = Whole(
        img=_end_to_end([part.img for part in parts]),
        img_ids=_end_to_end([part.img_ids for part in parts]),
        target=_end_to_end([part.target for part in parts]),
        cond=_end_to_end(cond) if cond else None,
        txt=torch.cat([_read(part) for part in parts])[None],
        txt_mask=None,
        timesteps=torch.cat([part.timesteps for part in parts]),
        y_vec=torch.cat([part.y_vec for part in parts]),
    )
    return whole, (_numbers(words), _numbers(tokens))


def _read(part: Whole) -> Tensor:
    """(tokens, D): the text of all samples that may be attended to."""
    return part.txt.flatten(0, 1) if part.txt_mask is None else part.txt[part.txt_mask]


def _words(part: Whole) -> list[int]:
    """How many of these each sample has."""
    batch, length = part.txt.shape[:2]
    return [length] * batch if part.txt_mask is None else part.txt_mask.sum(dim=1).tolist()


def _end_to_end(parts: list[Tensor]) -> Tensor:
    return torch.cat([part.flatten(0, 1) for part in parts])[None]


def _numbers(lengths: list[int]) -> Tensor:
    """(1, sum of lengths): 0 as often as the first length says, then 1, ..."""
    return torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[None]
