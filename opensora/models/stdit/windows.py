"""Attention within windows of a clip: places that lie together, over some frames or all (Open-Sora 1.3).

Windows never shift and do not overlap. The published model fills the last ones up with zeros and hides what it filled
in from every query; a window that reaches over the edge of a clip attends here among the tokens that it has, which is
the same and computes nothing for nobody. Windows of the same shape are one batch, at most two shapes to an axis.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from opensora.models.layers.attention import SDPACore

Window = tuple[int, int, int]  # tokens along (h, w, t), as published; -1 for t: all frames


class WindowCore(nn.Module):
    """Fills the slot of attention in windows; what attends in one is its ``core``."""

    def __init__(self, window: Window) -> None:
        super().__init__()
        self.window = window
        self.core: nn.Module = SDPACore()

    def keys(self, frames: int) -> int:
        """Tokens of a whole window of a clip with this many frames."""
        height, width, length = self.window
        return height * width * (frames if length < 0 else length)

    @torch.compiler.disable  # how many runs there are, and of what length, would be a graph for every size of clip
    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, grid: tuple[int, int, int], key_mask: None = None, context: Any = None
    ) -> Tensor:
        """(B, T, S, H, Dh) each -> (B, T, S, H, Dh); ``grid``: tokens of the clip along (t, h, w), T and H' W' = S."""
        height, width, length = self.window
        along = [
            list(runs(size, window))
            for size, window in zip(grid, (grid[0] if length < 0 else length, height, width), strict=True)
        ]
        sides = (grid[1], grid[2])
        packed = torch.stack((q, k, v), dim=3).unflatten(2, sides)  # (B, T, H', W', 3, H, Dh)
        rows = []
        for t, t_window in along[0]:
            columns = []
            for h, h_window in along[1]:
                parts = [
                    self._attend(packed[:, t, h, w], (t_window, h_window, w_window), context)
                    for w, w_window in along[2]
                ]
                columns.append(_joined(parts, 3))
            rows.append(_joined(columns, 2))
        # Of one part, too: behind a graph break a compiler tells the strides of what a view is of apart.
        return torch.cat(rows, 1).flatten(2, 3)

    def _attend(self, packed: Tensor, window: Window, context: Any) -> Tensor:
        """(B, t, h, w, 3, H, Dh), whole windows of (t, h, w) -> (B, t, h, w, H, Dh)."""
        tokens = packed
        for dim, size in zip((1, 3, 5), window, strict=True):
            tokens = tokens.unflatten(dim, (-1, size))  # (B, nt, t, nh, h, nw, w, 3, H, Dh)
        tokens = tokens.permute(0, 1, 3, 5, 2, 4, 6, 7, 8, 9)
        counts = tokens.shape[:4]
        q, k, v = tokens.flatten(0, 3).flatten(1, 3).unbind(2)
        out = self.core(q, k, v, context=context)  # (B nt nh nw, t h w, H, Dh)
        out = out.unflatten(0, counts).unflatten(4, window).permute(0, 1, 4, 2, 5, 3, 6, 7, 8)
        return out.flatten(5, 6).flatten(3, 4).flatten(1, 2)


def runs(size: int, window: int) -> Iterator[tuple[slice, int]]:
    """The part of an axis that whole windows take, and what is left over at its end: (where, size of a window)."""
    whole = size // window * window
    if whole:
        yield slice(0, whole), window
    if size > whole:
        yield slice(whole, size), size - whole


def pairs(grid: tuple[int, int, int], window: Window) -> int:
    """Pairs of tokens of a clip that meet in one layer."""
    height, width, length = window
    total = 1
    for size, side in zip(grid, (grid[0] if length < 0 else length, height, width), strict=True):
        total *= sum((run.stop - run.start) * one for run, one in runs(size, side))
    return total


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)
