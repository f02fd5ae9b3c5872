"""Independent pieces of work, done at the same time by processes that would all do the same.

Pieces are dealt out in turn, and every process gets every result, so that all hold the same bits. Each process runs
equally many: one that has no piece left repeats the last, because a piece may be collective itself, as the forward of
a model is whose weights are sharded over these processes too.
"""

from collections.abc import Callable, Sequence
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from acceleration.distributed import collectives
from acceleration.distributed.mesh import Axis


class Piece(Protocol):
    """What a piece of work states."""

    @property
    def run(self) -> Callable[[], Tensor]:
        """Computes the result."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the result."""


class DistributedRunner:
    """Runs pieces over the processes of some axes. Collective over them; results have one dtype. Not differentiable."""

    def __init__(self, *axes: Axis) -> None:
        """``axes``: slowest first. All their processes must be given the same pieces."""
        self.axes = axes
        self.degree, self.rank = 1, 0
        for axis in axes:
            self.degree, self.rank = self.degree * axis.degree, self.rank * axis.degree + axis.rank

    def __call__(self, work: Sequence[Piece]) -> list[Tensor]:
        """The results of all pieces, in order, on every process."""
        if self.degree == 1:
            return [piece.run() for piece in work]
        dealt = [range(rank, len(work), self.degree) for rank in range(self.degree)]
        results = []
        for turn in range(0, len(work), self.degree):
            piece = work[min(turn + self.rank, len(work) - 1)]
            results.append(piece.run())
            assert results[-1].shape == piece.shape, (results[-1].shape, piece.shape)
        mine = [result.flatten() for result in results[: len(dealt[self.rank])]]
        values = self._gather(
            torch.cat(mine) if mine else results[0].flatten()[:0],
            [sum(prod(work[index].shape) for index in indices) for indices in dealt],
        )
        order = [index for indices in dealt for index in indices]
        parts = values.split([prod(work[index].shape) for index in order])
        found = dict(zip(order, parts, strict=True))
        return [found[index].view(piece.shape) for index, piece in enumerate(work)]

    def _gather(self, values: Tensor, sizes: list[int]) -> Tensor:
        """Concatenate what all processes hold, in rank order: axis by axis, the fastest first."""
        rank = self.rank
        for axis in reversed(self.axes):
            rank //= axis.degree
            groups = [sizes[i : i + axis.degree] for i in range(0, len(sizes), axis.degree)]
            values = collectives.all_gather(values, 0, groups[rank], axis)
            sizes = [sum(group) for group in groups]
        return values
