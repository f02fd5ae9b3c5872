"""The causal autoencoder of Open-Sora 1.3 (4x8x8, 16 channels), with the parameter names that it was published with.

Group norms take their statistics over all frames and pixels of what is coded together.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from opensora.models.vae.hunyuan_network import SCORES
from opensora.models.vae.opensora_1x.convolution import CausalConv3d, causal

COLOURS = 3
GROUPS = 32  # of the norms
NORM_EPS, UPSAMPLE_EPS = 1e-6, 1e-5
LEAD = 3  # frames that the decoder makes before the first


@dataclass(frozen=True, kw_only=True)
class CausalSizes:
    """What a network is made of."""

    first: int = 128  # channels behind the encoder's first convolution
    widths: tuple[int, ...] = (128, 256, 512, 512)  # channels of the levels
    layers: int = 2  # residual blocks of an encoder's level; a decoder's has one more
    channels: int = 16  # of the latents


class ResnetBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(GROUPS, inputs, NORM_EPS)
        self.conv1 = CausalConv3d(inputs, outputs)
        self.norm2 = nn.GroupNorm(GROUPS, outputs, NORM_EPS)
        self.conv2 = CausalConv3d(outputs, outputs)
        self.nin_shortcut = CausalConv3d(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.nin_shortcut is None else self.nin_shortcut(x))


class CausalAttention(nn.Module):
    """One head over all positions of a clip; one sees those before it in (t, h, w) order, also of its own frame."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, width, NORM_EPS)
        self.q, self.k, self.v, self.proj_out = (CausalConv3d(width, width, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (rearrange(layer(h), "b c t h w -> b 1 (t h w) c") for layer in (self.q, self.k, self.v))
        found = rearrange(causal_attention(q, k, v), "b 1 (t h w) c -> b c t h w", t=x.shape[2], h=x.shape[3])
        return x + self.proj_out(found)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, most: int = SCORES) -> Tensor:
    """Row i of (B, 1, N, C) attends to rows 0 to i: a run of rows at a time, with never more than ``most`` scores (or
    those of one row), nor any mask that is larger than these."""
    batch, _, count, _ = q.shape
    if batch * count * count <= most:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    found, start = [], 0
    while start < count:
        # The largest run of n rows with n (start + n) scores.
        size = max(1, int((((start * start + 4 * most / batch) ** 0.5) - start) / 2))
        stop = min(count, start + size)
        seen = torch.ones(stop - start, stop, dtype=torch.bool, device=q.device).tril(start)
        found.append(F.scaled_dot_product_attention(q[:, :, start:stop], k[:, :, :stop], v[:, :, :stop], seen))
        start = stop
    return torch.cat(found, 2)


class Mid(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.block_1, self.attn_1, self.block_2 = (
            ResnetBlock(width, width),
            CausalAttention(width),
            ResnetBlock(width, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class FrameDownsample(nn.Module):
    """Half of every frame, rounded down."""

    def __init__(self, width: int, together: int) -> None:
        super().__init__()
        self.conv, self._together = nn.Conv2d(width, width, 3, 2), together

    def forward(self, x: Tensor) -> Tensor:
        return by_frame(x, lambda frames: self.conv(F.pad(frames, (0, 1, 0, 1))), self._together)


class FrameUpsample(nn.Module):
    """Every frame in twice its size."""

    def __init__(self, width: int, together: int) -> None:
        super().__init__()
        self.conv, self._together = nn.Conv2d(width, width, 3, padding=1), together

    def forward(self, x: Tensor) -> Tensor:
        return by_frame(x, lambda frames: self.conv(F.interpolate(frames, scale_factor=2.0)), self._together)


def by_frame(x: Tensor, code: Callable[[Tensor], Tensor], together: int) -> Tensor:
    """``code`` on the frames of (B, C, T, H, W) as images, so many at a time."""
    frames = rearrange(x, "b c t h w -> (b t) c h w")
    return rearrange(torch.cat([code(part) for part in frames.split(together)]), "(b t) c h w -> b c t h w", b=len(x))


class ClipDownsample(nn.Module):
    """Half as many frames of half the size, both rounded up."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = CausalConv3d(width, width, 3, (2, 2, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class UpsampleBlock(nn.Module):
    """Behind a repetition of values. What is repeated is added inside of the block, and to its result once more."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = CausalConv3d(width, width), CausalConv3d(width, width)
        self.norm1, self.norm2 = (nn.GroupNorm(GROUPS, width, UPSAMPLE_EPS) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.norm1(self.conv1(x)))
        return F.silu(self.norm2(self.conv2(h)) + x) + x


class ClipUpsample(nn.Module):
    """Twice as many frames of twice the size."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv3d = UpsampleBlock(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3d(x.repeat_interleave(2, 2).repeat_interleave(2, 3).repeat_interleave(2, 4))


class Level(nn.Module):
    """Residual blocks, then a change of size, if there is one."""

    def __init__(self, inputs: int, outputs: int, layers: int, sampler: nn.Module | None, name: str) -> None:
        super().__init__()
        widths = [inputs] + [outputs] * layers
        self.block = nn.ModuleList([ResnetBlock(before, after) for before, after in pairwise(widths)])
        self._sampler = name if sampler is not None else None
        if sampler is not None:
            self.add_module(name, sampler)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        return x if self._sampler is None else self.get_submodule(self._sampler)(x)


class Encoder(nn.Module):
    def __init__(self, sizes: CausalSizes, together: int) -> None:
        super().__init__()
        last = len(sizes.widths) - 1
        before = (sizes.first, *sizes.widths)

        def sampler(level: int) -> nn.Module | None:
            width = sizes.widths[level]
            return None if level == last else ClipDownsample(width) if level else FrameDownsample(width, together)

        self.conv_in = CausalConv3d(COLOURS, sizes.first)
        self.down = nn.ModuleList(
            [Level(before[i], width, sizes.layers, sampler(i), "downsample") for i, width in enumerate(sizes.widths)]
        )
        self.mid = Mid(sizes.widths[-1])
        self.norm_out = nn.GroupNorm(GROUPS, sizes.widths[-1], NORM_EPS)
        self.conv_out = CausalConv3d(sizes.widths[-1], 2 * sizes.channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> (B, 2C, T', H', W')."""
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    def __init__(self, sizes: CausalSizes, together: int) -> None:
        super().__init__()
        before = (*sizes.widths[1:], sizes.widths[-1])

        def sampler(level: int) -> nn.Module | None:
            width = sizes.widths[level]
            return None if level == 0 else FrameUpsample(width, together) if level == 1 else ClipUpsample(width)

        self.conv_in = CausalConv3d(sizes.channels, sizes.widths[-1])
        self.mid = Mid(sizes.widths[-1])
        self.up = nn.ModuleList(
            [Level(before[i], width, sizes.layers + 1, sampler(i), "upsample") for i, width in enumerate(sizes.widths)]
        )
        self.norm_out = nn.GroupNorm(GROUPS, sizes.widths[0], NORM_EPS)
        self.conv_out = nn.Conv3d(sizes.widths[0], COLOURS, 3, padding=(0, 1, 1))

    def forward(self, z: Tensor) -> Tensor:
        """(B, C, T', H', W') -> (B, 3, 4T' - 3, H, W)."""
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        return causal(self.conv_out, F.silu(self.norm_out(x)), 2)[:, :, LEAD:]


class CausalVAE(nn.Module):
    """Pixels to moments and latents to pixels, neither scaled nor clamped; differentiable."""

    def __init__(self, sizes: CausalSizes, together: int = 4) -> None:
        """``together``: frames that layers which work frame by frame take at a time."""
        super().__init__()
        self.sizes = sizes
        self.encoder, self.decoder = Encoder(sizes, together), Decoder(sizes, together)
