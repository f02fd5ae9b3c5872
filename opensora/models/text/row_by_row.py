"""Blocks that work on one prompt after the other, so that a prompt's features do not depend on those beside it.

Kernels choose their order of summation by the size of the batch, and the same prompt comes out differently in the last
bits. What is kept for later, or encoded elsewhere, then depends on history and layout, and a resumed run would be
another. The loop is inside the block and not around the model, so that sharded weights are gathered once for all.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


def row_by_row(blocks: Iterable[nn.Module]) -> None:
    """Make every block, called with (B, N, D) and whatever belongs to it, run once per row, in place.

    Of several results the first is of the rows. Others, such as T5's bias by position, are the same for each, but where
    a release of transformers adds the mask of a row to it.
    """
    for block in blocks:
        block.forward = _Rows(block.forward)


class _Rows:
    """The forward of a block, row by row."""

    def __init__(self, whole: Any) -> None:
        self._whole = whole

    def __call__(self, x: Tensor, *args: Any, **options: Any) -> Any:
        rows = len(x)
        if rows == 1:
            return self._whole(x, *args, **options)
        found = []
        for row in range(rows):
            mine = [_row(value, row, rows) for value in args]
            found.append(
                self._whole(x[row : row + 1], *mine, **{name: _row(v, row, rows) for name, v in options.items()})
            )
        if isinstance(found[0], Tensor):
            return torch.cat(found)
        return (
            torch.cat([first for first, *_ in found]),
            *(_joined(column) for column in list(zip(*found, strict=True))[1:]),
        )


def _joined(values: tuple[Any, ...]) -> Any:
    """What serves all rows once; what differs between them, by row."""
    first = values[0]
    if not isinstance(first, Tensor) or all(one is first or torch.equal(one, first) for one in values):
        return first
    return torch.cat(values)


def _row(value: Any, row: int, rows: int) -> Any:
    """Of what belongs to a batch, such as a mask, the row's part; of what serves all rows, all."""
    return value[row : row + 1] if isinstance(value, Tensor) and value.dim() > 1 and len(value) == rows else value
