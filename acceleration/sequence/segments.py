"""Sequences that hold several samples: attention within each, and no product between two.

Text and image tokens of a sample do not lie together (text comes first, and processes hold parts of both), so tokens
are brought into the order of samples, attended, and brought back. Samples of one length are one batch of a kernel; a
kernel that takes samples of any lengths at once (kernels/varlen.py) gets them all.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Segments:
    """Which of the B * L tokens of a micro-batch are of one sample, in the order in which a kernel sees them."""

    order: Tensor  # (B * L,) int64: places of the tokens, sample by sample, samples of few tokens first
    places: Tensor  # (B * L,) int64: the inverse
    lengths: tuple[int, ...]  # tokens of each sample, in that order

    @staticmethod
    def of(samples: Tensor, device: torch.device | str) -> "Segments":
        """``samples`` (B, L) int64 on the CPU: the number of every token's sample, counted over all sequences."""
        numbers = samples.flatten()
        lengths = torch.bincount(numbers)
        order = (lengths[numbers] * len(lengths) + numbers).argsort(stable=True)
        used = sorted(length for length in lengths.tolist() if length)
        return Segments(order.to(device), order.argsort().to(device), tuple(used))

    @cached_property
    def ends(self) -> Tensor:
        """(samples + 1,) int32: where each sample begins, and the end of the last."""
        return torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32, device=self.order.device)

    def gather(self, x: Tensor) -> Tensor:
        """(B, L, ...) -> (B * L, ...), sample by sample."""
        return _Permuted.apply(x.flatten(0, 1), self.order, self.places)

    def scatter(self, x: Tensor, batch: int) -> Tensor:
        """The inverse of ``gather``."""
        return _Permuted.apply(x, self.places, self.order).unflatten(0, (batch, -1))

    def apply(
        self,
        attend: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_mask: Tensor | None,
    ) -> Tensor:
        """(B, L, H, Dh): ``attend(q, k, v, key_mask)`` of each sample's tokens by themselves, each in its place."""
        batches = [(len(list(alike)), length) for length, alike in groupby(self.lengths)]
        sizes = [samples * length for samples, length in batches]
        given = [x if x is None else self.gather(x).split(sizes) for x in (q, k, v, key_mask)]
        parts = []
        for index, shape in enumerate(batches):
            alike = (x if x is None else x[index].unflatten(0, shape) for x in given)
            parts.append(attend(*alike).flatten(0, 1))  # type: ignore[arg-type]
        return self.scatter(torch.cat(parts), q.shape[0])


class _Permuted(torch.autograd.Function):
    """Rows in another order. Its gradient is the way back, where that of an index would add to zeros."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(order, back)
        return x[order]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        order, back = ctx.saved_tensors
        return _Permuted.apply(grad, back, order), None, None
