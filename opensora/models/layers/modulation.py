"""Adaptive layer norm: the conditioning vector shifts, scales and gates every layer (DiT, arXiv 2212.09748)."""

from typing import Any

import torch
from torch import Tensor, nn


class Modulation(nn.Module):
    """(S, D) -> ``parts`` tensors, in the order (shift, scale, gate), (shift, scale, gate); see ``over_tokens``."""

    def __init__(self, hidden: int, parts: int) -> None:
        super().__init__()
        self.parts = parts
        self.act = nn.SiLU()
        self.lin = nn.Linear(hidden, parts * hidden)

    def forward(self, vec: Tensor, sample_of: Tensor | None = None) -> tuple[Tensor, ...]:
        return over_tokens(self.lin(self.act(vec.to(self.lin.weight.dtype))), self.parts, sample_of)


def over_tokens(joined: Tensor, parts: int, sample_of: Tensor | None) -> tuple[Tensor, ...]:
    """(S, parts * D) -> ``parts`` tensors for (B, N, D) tokens.

    Without ``sample_of`` sample s is sequence s: (S, 1, D) each. ``sample_of`` (B, N) int64 says for every token which
    sample it is of: (B, N, D) each.
    """
    if sample_of is None:
        return joined[:, None, :].chunk(parts, dim=-1)
    return tuple(_Spread.apply(part, sample_of) for part in joined.chunk(parts, dim=-1))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """(B, ..., D) with (B, 1, ..., D) or (B, ..., D) twice -> (B, ..., D); scale 0 leaves x as it is."""
    return torch.addcmul(shift, 1 + scale, x)


def table_rows(
    table: Tensor, vector: Tensor, ndim: int, *, clean: Tensor | None = None, known: Tensor | None = None
) -> tuple[Tensor, ...]:
    """The modulations of a block from its own table and a vector that all blocks share (adaLN-single, PixArt-alpha,
    arXiv 2310.00426); with two vectors where some frames are clean (Open-Sora 1.1).

    Args:
        table: (n, D).
        vector: (B, n D), or (B, D) for every row alike.
        ndim: dims of the tokens: 3 for (B, N, D), 4 for (B, T, S, D).
        clean: the vector of known frames, if there are any: that of time 0.
        known: (B, T, S) bool or (B, T, 1), frames that ``clean`` is for.

    Returns:
        n tensors, (B, 1, D), (B, 1, 1, D), or (B, T, 1 or S, D) with ``known``.
    """
    rows = _rows(table, vector, ndim)
    if known is not None and clean is not None:
        rows = torch.where(known[..., None, None], _rows(table, clean, ndim), rows)  # (B, T, S or 1, n, D)
    return rows.unbind(-2)


def _rows(table: Tensor, vector: Tensor, ndim: int) -> Tensor:
    """(B, 1, n, D), or (B, 1, 1, n, D): all rows at once, as each operator of a block costs a compiler seconds."""
    return _with_axes(table + vector.unflatten(-1, (-1, table.shape[-1])), ndim)


def vector_rows(vector: Tensor, parts: int, ndim: int) -> tuple[Tensor, ...]:
    """(B, parts * D) -> ``parts`` tensors (B, 1, D), or (B, 1, 1, D) for tokens of 4 dims (adaLN, DiT)."""
    return _with_axes(vector, ndim).chunk(parts, dim=-1)


def _with_axes(x: Tensor, ndim: int) -> Tensor:
    """(B, ...) -> (B, 1, ...), or (B, 1, 1, ...) for tokens of 4 dims."""
    return x[:, None] if ndim == 3 else x[:, None, None]


class _Spread(torch.autograd.Function):
    """(S, D), (B, N) -> (B, N, D): a row for every token.

    Its gradient sums the tokens of each sample by one product, in the same order every time and with the sums of a
    matrix product, which torch's own for an index has neither of in bf16.
    """

    @staticmethod
    def forward(ctx: Any, table: Tensor, sample_of: Tensor) -> Tensor:
        ctx.save_for_backward(sample_of)
        ctx.samples = table.shape[0]
        return table[sample_of]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (sample_of,) = ctx.saved_tensors
        is_of = torch.arange(ctx.samples, device=sample_of.device)[:, None] == sample_of.flatten()  # (S, B * N)
        return is_of.to(grad.dtype) @ grad.flatten(0, 1), None
