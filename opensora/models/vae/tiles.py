"""Coding a clip in overlapping tiles: where they lie, and how their results become one.

Tiles, overlaps and blending are those that the autoencoders of HunyuanVideo and Open-Sora were published with, and of
``AutoencoderKLHunyuanVideo`` in diffusers; but the loop is here, so that tiles are independent pieces of work. Results
are blended in fp32 (fp64 for fp64) whatever the tiles are computed in.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from opensora.utils.limits import Limits
from opensora.utils.tasks import Task, TaskRunner

Size = tuple[int, int, int]  # (frames, height, width)
TIME, HEIGHT, WIDTH = 2, 3, 4  # dims of (B, C, T, H, W)

MAX_OVERLAP = 0.5  # from there on three tiles would lie on one place
TILE_LIMITS: Limits = {
    "tile_size": (65_536, "no frame is so large"),
    "tile_frames": (100_000, "no clip is so long"),
    "micro_batch": (100_000, "they are in memory together"),
}


class TileOptions(Protocol):
    """What a configuration says of tiles."""

    @property
    def tile_size(self) -> int: ...
    @property
    def tile_frames(self) -> int: ...
    @property
    def tile_overlap(self) -> float: ...
    @property
    def micro_batch(self) -> int: ...


def check_tiles(cfg: TileOptions, stride: Size) -> None:
    """That tiles are whole latents, and so are their overlaps: else latents and pixels would be cut differently.

    Raises:
        ValueError: ``field=value: what is allowed``.
    """
    if not 0 <= cfg.tile_overlap <= MAX_OVERLAP:
        raise ValueError(f"tile_overlap={cfg.tile_overlap}: must be a number from 0 to {MAX_OVERLAP}")
    if cfg.micro_batch < 1:
        raise ValueError(f"micro_batch={cfg.micro_batch}: must be an integer >= 1")
    for name, pixels in (("tile_size", stride[1]), ("tile_frames", stride[0])):
        size = getattr(cfg, name)
        multiple = next(n for n in range(1, 10_001) if _is_whole(n * cfg.tile_overlap) or n == 10_000)
        if size < 1 or size % (pixels * multiple):
            why = f"latents of {pixels}, of which tile_overlap={cfg.tile_overlap} is a whole number"
            raise ValueError(f"{name}={size}: must be a multiple of {pixels * multiple}: {why}")


def _is_whole(value: float) -> bool:
    return abs(value - round(value)) < 1e-6


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """How one direction, encoding or decoding, is cut."""

    window: Size  # of the input; clips no larger are coded whole
    stride: Size  # of the input
    in_space: bool  # False: height and width are whole
    in_time: bool  # False: clips of any length are coded whole in time
    lead: int  # 1: causal, every tile has a frame in front, whose result only the first keeps; 0: none has
    out_stride: Size  # what a tile adds to the output
    blend: Size  # of the output: how far a tile fades in over the one before
    coded: Callable[[int, int, int], Size]  # size of the input -> of the output

    def frames(self, count: int) -> list[slice]:
        """Windows in time."""
        if not self.in_time or count <= self.window[0]:
            return [slice(0, count)]
        starts = range(0, count, self.stride[0])
        end = self.window[0] + self.lead
        return [slice(i, min(i + end, count)) for i in starts if i == 0 or i + self.lead < count]

    def plane(self, height: int, width: int) -> tuple[list[slice], list[slice]]:
        """Windows in (height, width); where one dim is larger than a window, both are cut."""
        if not self.in_space or (height <= self.window[1] and width <= self.window[2]):
            return [slice(0, height)], [slice(0, width)]
        rows, columns = (
            [slice(i, min(i + window, size)) for i in range(0, size, stride)]
            for size, window, stride in zip((height, width), self.window[1:], self.stride[1:], strict=True)
        )
        return rows, columns


def tilings(
    cfg: TileOptions, stride: Size, *, in_space: bool, in_time: bool, lead: int, coded: Callable[[int], int]
) -> tuple[Tiling, Tiling]:
    """How clips are cut for encoding, and latents for decoding.

    Args:
        stride: pixels per latent.
        coded: frames that latent frames decode to. An autoencoder makes ``lead`` latent frames of as many frames, or
            one of a still, and one more of every ``stride[0]`` further ones.
    """
    latents = (cfg.tile_frames // stride[0], cfg.tile_size // stride[1], cfg.tile_size // stride[2])
    shared = tuple(round(size * cfg.tile_overlap) for size in latents)  # latents that two tiles have in common
    steps = tuple(size - blend for size, blend in zip(latents, shared, strict=True))
    pixel_steps, pixel_shared, pixels = (_times(sizes, stride) for sizes in (steps, shared, latents))
    cut = partial(Tiling, in_space=in_space, in_time=in_time, lead=lead)
    encoding = cut(
        window=pixels,
        stride=pixel_steps,
        out_stride=_times(steps),
        blend=_times(shared),
        coded=lambda t, h, w: (max(1, (t - lead) // stride[0] + lead), h // stride[1], w // stride[2]),
    )
    decoding = cut(
        window=_times(latents),
        stride=_times(steps),
        out_stride=pixel_steps,
        blend=pixel_shared,
        coded=lambda t, h, w: (coded(t), h * stride[1], w * stride[2]),
    )
    return encoding, decoding


def _times(sizes: tuple[int, ...], factors: Size = (1, 1, 1)) -> Size:
    return sizes[0] * factors[0], sizes[1] * factors[1], sizes[2] * factors[2]


def code_in_tiles(
    x: Tensor, code: Callable[[Tensor], Tensor], channels: int, tiling: Tiling, run: TaskRunner, micro_batch: int = 1
) -> Tensor:
    """(B, C, T, H, W) -> (B, channels, *coded size) by ``code``, which maps (b, C, t, h, w) to (b, channels, ...).

    Every tile of every ``micro_batch`` samples is a piece of work for ``run``.
    """
    frames, (rows, columns) = tiling.frames(x.shape[TIME]), tiling.plane(*x.shape[HEIGHT:])
    batches = x.split(micro_batch)
    work = [
        _work(batch[:, :, t, h, w], code, channels, tiling, drop=tiling.lead if t.start > 0 else 0)
        for batch in batches
        for t in frames
        for h in rows
        for w in columns
    ]
    results = iter([result.to(torch.promote_types(result.dtype, torch.float32)) for result in run(work)])
    clips = [
        _join_frames([_join_plane([[next(results) for _ in columns] for _ in rows], tiling) for _ in frames], tiling)
        for _ in batches
    ]
    return torch.cat(clips)


def largest_tile(tiling: Tiling, size: Size) -> Size:
    """Of the input, for a clip of this size: what takes most memory."""
    frames, (rows, columns) = tiling.frames(size[0]), tiling.plane(*size[1:])
    every = [(t.stop - t.start, h.stop - h.start, w.stop - w.start) for t in frames for h in rows for w in columns]
    return max(every, key=prod)


def _work(x: Tensor, code: Callable[[Tensor], Tensor], channels: int, tiling: Tiling, *, drop: int) -> Task:
    frames, height, width = tiling.coded(*x.shape[TIME:])
    return Task(partial(_code_tile, x, code, drop=drop), (len(x), channels, frames - drop, height, width))


def _code_tile(x: Tensor, code: Callable[[Tensor], Tensor], *, drop: int) -> Tensor:
    """Contiguous both ways, as a tile is that has travelled: kernels choose by strides how they add up."""
    return code(x.contiguous())[:, :, drop:].contiguous()


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
    """The same along time; of a causal autoencoder the first part has the clip's first frame more than others."""
    if len(parts) == 1:
        return parts[0]
    for before, part in pairwise(parts):
        _fade_in_(part, before, tiling.blend[0], TIME)
    kept = tiling.out_stride[0]
    first, *others = parts
    return torch.cat([first[:, :, : kept + tiling.lead], *(part[:, :, :kept] for part in others)], TIME)


def _fade_in_(tile: Tensor, before: Tensor, extent: int, dim: int) -> None:
    """Write into the start of ``tile`` a linear transition from the end of ``before``."""
    extent = min(before.shape[dim], tile.shape[dim], extent)
    new = (torch.arange(extent, dtype=torch.float64) / extent).view(-1, *[1] * (tile.dim() - 1 - dim))
    old, new = (weight.to(tile.device, tile.dtype) for weight in (1 - new, new))
    start = tile.narrow(dim, 0, extent)
    start.copy_(before.narrow(dim, before.shape[dim] - extent, extent) * old + start * new)
