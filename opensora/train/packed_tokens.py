"""Packed sequences: samples of several shapes, concatenated into one sequence of tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class EncodedTokens:
    """Samples as tokens, before these are cut over processes; named as the arguments of a denoiser's forward."""

    img: Tensor  # (B, N, C*p*p)
    img_ids: Tensor  # (B, N, 3)
    target: Tensor  # (B, N, C*p*p) velocity, fp32
    cond: Tensor | None  # (B, N, ...)
    txt: Tensor  # (B, L, D)
    txt_mask: Tensor | None  # (B, L) bool
    timesteps: Tensor  # (S,); S = B, but for a packed sequence
    y_vec: Tensor  # (S, V)


SampleOf = tuple[Tensor, Tensor]  # number of its sample for every text token (1, L), for every image token (1, N)


def concat_packed(parts: Sequence[EncodedTokens]) -> tuple[EncodedTokens, SampleOf]:
    """One sequence of all samples; text that nobody may attend to is left out.

    Returns:
        The sequence (B = 1), and of every text and image token the number of its sample, int64 on the CPU, as what
        follows from them is made there. Where text has a mask, counting it waits for the device.
    """

    def end_to_end(tensors: list[Tensor]) -> Tensor:
        return torch.cat([tensor.flatten(0, 1) for tensor in tensors])[None]

    text, text_lengths, image_lengths = [], [], []
    for part in parts:
        samples, length = part.txt.shape[:2]
        if part.txt_mask is None:
            text.append(part.txt.flatten(0, 1))
            text_lengths += [length] * samples
        else:
            text.append(part.txt[part.txt_mask])
            text_lengths += part.txt_mask.sum(dim=1).tolist()
        image_lengths += [part.img.shape[1]] * samples
    cond = [part.cond for part in parts if part.cond is not None]
    packed = EncodedTokens(
        img=end_to_end([part.img for part in parts]),
        img_ids=end_to_end([part.img_ids for part in parts]),
        target=end_to_end([part.target for part in parts]),
        cond=end_to_end(cond) if cond else None,
        txt=torch.cat(text)[None],
        txt_mask=None,
        timesteps=torch.cat([part.timesteps for part in parts]),
        y_vec=torch.cat([part.y_vec for part in parts]),
    )
    return packed, (_sample_numbers(text_lengths), _sample_numbers(image_lengths))


def _sample_numbers(lengths: list[int]) -> Tensor:
    """(1, sum of lengths): 0 as often as the first length says, then 1, ..."""
    return torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[None]
