"""Coding a clip in overlapping tiles: where they lie, and how their results become one.

Tiles, overlaps and blending are those of ``AutoencoderKLHunyuanVideo`` in diffusers, bit for bit in fp32 and sample by
sample; but the loop is here, so that tiles are independent pieces of work. Results are blended in fp32 (fp64 for fp64)
whatever the tiles are computed in.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from opensora.utils.tasks import Task, TaskRunner

Size = tuple[int, int, int]  # (frames, height, width)
TIME, HEIGHT, WIDTH = 2, 3, 4  # dims of (B, C, T, H, W)


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """How one direction, encoding or decoding, is cut."""

    window: Size  # of the input; clips no larger are coded whole
    stride: Size  # of the input
    in_space: bool  # False: only time is cut
    out_stride: Size  # what a tile adds to the output
    blend: Size  # of the output: how far a tile fades in over the one before
    coded: Callable[[int, int, int], Size]  # size of the input -> of the output

    def frames(self, count: int) -> list[slice]:
        """Windows in time. Of all but the first, the first frame is context, whose result is dropped."""
        if count <= self.window[0]:
            return [slice(0, count)]
        starts = range(0, count, self.stride[0])
        return [slice(i, min(i + self.window[0] + 1, count)) for i in starts if i == 0 or i + 1 < count]

    def plane(self, height: int, width: int) -> tuple[list[slice], list[slice]]:
        """Windows in (height, width); where one dim is larger than a window, both are cut."""
        if not self.in_space or (height <= self.window[1] and width <= self.window[2]):
            return [slice(0, height)], [slice(0, width)]
        rows, columns = (
            [slice(i, min(i + window, size)) for i in range(0, size, stride)]
            for size, window, stride in zip((height, width), self.window[1:], self.stride[1:], strict=True)
        )
        return rows, columns


def code_in_tiles(
    x: Tensor, code: Callable[[Tensor], Tensor], channels: int, tiling: Tiling, run: TaskRunner
) -> Tensor:
    """(B, C, T, H, W) -> (B, channels, *coded size) by ``code``, which maps (1, C, t, h, w) to (1, channels, ...).

    Every tile of every sample is a piece of work for ``run``.
    """
    frames, (rows, columns) = tiling.frames(x.shape[TIME]), tiling.plane(*x.shape[HEIGHT:])
    work = [
        _work(x[b : b + 1, :, t, h, w], code, channels, tiling, has_context=t.start > 0)
        for b in range(len(x))
        for t in frames
        for h in rows
        for w in columns
    ]
    results = iter([result.to(torch.promote_types(result.dtype, torch.float32)) for result in run(work)])
    clips = [
        _join_frames([_join_plane([[next(results) for _ in columns] for _ in rows], tiling) for _ in frames], tiling)
        for _ in range(len(x))
    ]
    return torch.cat(clips)


def _work(x: Tensor, code: Callable[[Tensor], Tensor], channels: int, tiling: Tiling, *, has_context: bool) -> Task:
    frames, height, width = tiling.coded(*x.shape[TIME:])
    return Task(
        partial(_code_tile, x, code, drop=int(has_context)), (1, channels, frames - int(has_context), height, width)
    )


def _code_tile(x: Tensor, code: Callable[[Tensor], Tensor], *, drop: int) -> Tensor:
    return code(x)[:, :, drop:]


def _join_plane(rows: list[list[Tensor]], tiling: Tiling) -> Tensor:
    """Tiles of the same frames; each fades in over its neighbours above and to the left, which are blended already."""
    if len(rows) == len(rows[0]) == 1:
        return rows[0][0]
    (_, high, wide), (_, down, right) = tiling.out_stride, tiling.blend
    for i, row in enumerate(rows):
        for j, tile in enumerate(row):
            if i > 0:
                _fade_in_(tile, rows[i - 1][j], down, HEIGHT)
            if j > 0:
                _fade_in_(tile, row[j - 1], right, WIDTH)
    return torch.cat([torch.cat([tile[..., :high, :wide] for tile in row], WIDTH) for row in rows], HEIGHT)


def _join_frames(parts: list[Tensor], tiling: Tiling) -> Tensor:
    """The same along time; the first part has the clip's first frame more than others."""
    if len(parts) == 1:
        return parts[0]
    for before, part in pairwise(parts):
        _fade_in_(part, before, tiling.blend[0], TIME)
    long = tiling.out_stride[0]
    return torch.cat([part[:, :, : long + (index == 0)] for index, part in enumerate(parts)], TIME)


def _fade_in_(tile: Tensor, before: Tensor, extent: int, dim: int) -> None:
    """Write into the start of ``tile`` a linear transition from the end of ``before``."""
    extent = min(before.shape[dim], tile.shape[dim], extent)
    new = (torch.arange(extent, dtype=torch.float64) / extent).view(-1, *[1] * (tile.dim() - 1 - dim))
    old, new = (weight.to(tile.device, tile.dtype) for weight in (1 - new, new))
    start = tile.narrow(dim, 0, extent)
    start.copy_(before.narrow(dim, before.shape[dim] - extent, extent) * old + start * new)
