"""HunyuanVideo's causal 3-D autoencoder (arXiv 2412.03603), with the parameter names that it was published with.

These are also the names of ``AutoencoderKLHunyuanVideo`` in diffusers. Clips are (B, C, T, H, W), as coded together:
group norms take their statistics over all frames and pixels of the input.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

COLOURS = 3
NORM_EPS = 1e-6
# A convolution works on so many values at a time, and attention on so many scores: memory beside the activations.
CONV_VALUES = 2**28
SCORES = 2**26


@dataclass(frozen=True, kw_only=True)
class HunyuanSizes:
    """What a network is made of."""

    widths: tuple[int, ...] = (128, 256, 512, 512)  # channels of the stages
    layers: int = 2  # residual blocks of an encoder's stage; a decoder's has one more
    groups: int = 32  # of the norms
    channels: int = 16  # of the latents
    space_levels: int = 3  # times that height and width are halved
    time_levels: int = 2  # times that frames are halved, in the last stages but one

    @property
    def stride(self) -> tuple[int, int, int]:
        """Pixels per latent."""
        return 2**self.time_levels, 2**self.space_levels, 2**self.space_levels

    def factors(self, stage: int) -> tuple[int, int, int] | None:
        """(t, h, w) that a stage is followed by: down in the encoder, up in the decoder; None: it keeps the size."""
        in_space = stage < self.space_levels
        last = len(self.widths) - 1
        in_time = last - self.time_levels <= stage < last
        return (1 + in_time, 1 + in_space, 1 + in_space) if in_space or in_time else None


class CausalConv3d(nn.Module):
    """A frame sees itself and the frames before; edges are repeated outwards, the first frame into the past."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, stride: tuple[int, int, int] = (1, 1, 1)) -> None:
        super().__init__()
        self.conv = nn.Conv3d(inputs, outputs, kernel, stride)
        self.past, self.around = kernel - 1, kernel // 2

    def forward(self, x: Tensor) -> Tensor:
        """A few output frames at a time, so that the padded copy is small beside a long clip."""
        stride = self.conv.stride[0]
        count = (x.shape[2] - 1) // stride + 1
        pieces = min(count, -(-x.numel() // CONV_VALUES))
        if pieces <= 1:
            return self.conv(self._padded(x, -self.past, x.shape[2]))
        out: Tensor | None = None
        for first, last in runs(count, pieces):
            part = self.conv(self._padded(x, first * stride - self.past, (last - 1) * stride + 1))
            if out is None:
                out = part.new_empty(*part.shape[:2], count, *part.shape[3:])
            out[:, :, first:last] = part
        assert out is not None
        return out

    def _padded(self, x: Tensor, start: int, stop: int) -> Tensor:
        """Frames ``start`` to ``stop`` with the edges; a negative ``start`` is before the first frame."""
        part, before = x[:, :, max(0, start) : stop], max(0, -start)
        if not self.past:
            return part
        if torch.compiler.is_compiling():
            return _with_edges(part, before, self.around)
        return F.pad(part, (*(self.around,) * 4, before, 0), mode="replicate")


def _with_edges(x: Tensor, before: int, around: int) -> Tensor:
    """What ``F.pad`` does, in joined pieces: torch 2.13 does not compile it for a CPU behind a nearest upsampling."""
    for dim, first, last in ((2, before, 0), (3, around, around), (4, around, around)):
        edges = x.narrow(dim, 0, 1), x.narrow(dim, x.shape[dim] - 1, 1)
        x = torch.cat([edges[0]] * first + [x] + [edges[1]] * last, dim)
    return x


def runs(count: int, pieces: int) -> list[tuple[int, int]]:
    """0 to ``count`` in runs of about the same length."""
    edges = [count * piece // pieces for piece in range(pieces + 1)]
    return [(first, last) for first, last in pairwise(edges) if first < last]


class ResnetBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, inputs, NORM_EPS)
        self.conv1 = CausalConv3d(inputs, outputs)
        self.norm2 = nn.GroupNorm(groups, outputs, NORM_EPS)
        self.conv2 = CausalConv3d(outputs, outputs)
        self.conv_shortcut = CausalConv3d(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x), inplace=True))
        h = self.conv2(F.silu(self.norm2(h), inplace=True))
        return h.add_(x if self.conv_shortcut is None else self.conv_shortcut(x))


class CausalAttention(nn.Module):
    """One head over all positions of a clip; a position sees those of its own frame and of earlier ones.

    The queries of a frame meet the keys up to the end of that frame, which is all that the mask would let through:
    there is no mask, and never more than ``SCORES`` scores.
    """

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, width, NORM_EPS)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Tensor) -> Tensor:
        batch, _, frames, height, width = x.shape
        tokens = rearrange(self.group_norm(x), "b c t h w -> b 1 (t h w) c")
        q, k, v = self.to_q(tokens), self.to_k(tokens), self.to_v(tokens)
        found = torch.empty_like(q)
        for frame in range(frames):
            start, end = frame * height * width, (frame + 1) * height * width
            pieces = min(end - start, -(-batch * (end - start) * end // SCORES))
            for first, last in runs(end - start, pieces):
                rows = slice(start + first, start + last)
                found[:, :, rows] = F.scaled_dot_product_attention(q[:, :, rows], k[:, :, :end], v[:, :, :end])
        out = self.to_out[0](found)
        return x + rearrange(out, "b 1 (t h w) c -> b c t h w", t=frames, h=height)


class MidBlock(nn.Module):
    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock(width, width, groups) for _ in range(2)])
        self.attentions = nn.ModuleList([CausalAttention(width, groups)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Downsample(nn.Module):
    def __init__(self, width: int, factors: tuple[int, int, int]) -> None:
        super().__init__()
        self.conv = CausalConv3d(width, width, 3, factors)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Upsample(nn.Module):
    """Every value repeated, then a convolution. The first frame is not repeated in time: T frames become 2T - 1."""

    def __init__(self, width: int, factors: tuple[int, int, int]) -> None:
        super().__init__()
        self.factors = factors
        self.conv = CausalConv3d(width, width)

    def forward(self, x: Tensor) -> Tensor:
        t, h, w = self.factors
        batch, width, frames, rows, columns = x.shape
        out = x.new_empty(batch, width, 1 + t * (frames - 1), rows, h, columns, w)
        out[:, :, 0] = x[:, :, 0, :, None, :, None]
        for place in range(t):
            out[:, :, 1 + place :: t] = x[:, :, 1:, :, None, :, None]
        del x
        return self.conv(out.view(batch, width, -1, h * rows, w * columns))


class Stage(nn.Module):
    """Residual blocks, then a change of size."""

    def __init__(self, inputs: int, outputs: int, layers: int, groups: int) -> None:
        super().__init__()
        widths = [inputs] + [outputs] * layers
        self.resnets = nn.ModuleList([ResnetBlock(before, after, groups) for before, after in pairwise(widths)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.resnets:
            x = block(x)
        return x


class DownStage(Stage):
    def __init__(self, sizes: HunyuanSizes, index: int) -> None:
        width = sizes.widths[index]
        super().__init__(sizes.widths[max(0, index - 1)], width, sizes.layers, sizes.groups)
        factors = sizes.factors(index)
        self.downsamplers = nn.ModuleList([Downsample(width, factors)] if factors else [])

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        for sampler in self.downsamplers:
            x = sampler(x)
        return x


class UpStage(Stage):
    def __init__(self, sizes: HunyuanSizes, index: int) -> None:
        widths = sizes.widths[::-1]
        super().__init__(widths[max(0, index - 1)], widths[index], sizes.layers + 1, sizes.groups)
        factors = sizes.factors(index)
        self.upsamplers = nn.ModuleList([Upsample(widths[index], factors)] if factors else [])

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        for sampler in self.upsamplers:
            x = sampler(x)
        return x


class Encoder(nn.Module):
    def __init__(self, sizes: HunyuanSizes) -> None:
        super().__init__()
        last = sizes.widths[-1]
        self.conv_in = CausalConv3d(COLOURS, sizes.widths[0])
        self.down_blocks = nn.ModuleList([DownStage(sizes, index) for index in range(len(sizes.widths))])
        self.mid_block = MidBlock(last, sizes.groups)
        self.conv_norm_out = nn.GroupNorm(sizes.groups, last, NORM_EPS)
        self.conv_out = CausalConv3d(last, 2 * sizes.channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> (B, 2C, T', H', W')."""
        x = self.conv_in(x)
        for stage in self.down_blocks:
            x = stage(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x)), inplace=True))


class Decoder(nn.Module):
    def __init__(self, sizes: HunyuanSizes) -> None:
        super().__init__()
        first, last = sizes.widths[-1], sizes.widths[0]
        self.conv_in = CausalConv3d(sizes.channels, first)
        self.mid_block = MidBlock(first, sizes.groups)
        self.up_blocks = nn.ModuleList([UpStage(sizes, index) for index in range(len(sizes.widths))])
        self.conv_norm_out = nn.GroupNorm(sizes.groups, last, NORM_EPS)
        self.conv_out = CausalConv3d(last, COLOURS)

    def forward(self, z: Tensor) -> Tensor:
        """(B, C, T', H', W') -> (B, 3, T, H, W)."""
        x = self.mid_block(self.conv_in(z))
        for stage in self.up_blocks:
            x = stage(x)
        return self.conv_out(F.silu(self.conv_norm_out(x), inplace=True))


class HunyuanVAE(nn.Module):
    """Pixels to moments and latents to pixels, neither scaled nor clamped; differentiable."""

    def __init__(self, sizes: HunyuanSizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.encoder, self.decoder = Encoder(sizes), Decoder(sizes)
        self.quant_conv = nn.Conv3d(2 * sizes.channels, 2 * sizes.channels, 1)
        self.post_quant_conv = nn.Conv3d(sizes.channels, sizes.channels, 1)

    def encode(self, pixels: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> (B, 2C, T', H', W'): means and logarithms of variances, for ``Posterior.of``."""
        return self.quant_conv(self.encoder(pixels))

    def decode(self, z: Tensor) -> Tensor:
        """(B, C, T', H', W') -> (B, 3, T, H, W)."""
        return self.decoder(self.post_quant_conv(z))
