"""Open-Sora's video DC-AE (after arXiv 2410.10733), with the parameter names that it was published with.

Convolutions are over frames, rows and columns, padded with zeros on all sides: a latent sees frames before and after.
A still has one frame and one latent frame; wherever there is a single frame, time is neither halved nor doubled.
"""

from dataclasses import dataclass

import torch
from einops import rearrange, reduce, repeat
from torch import Tensor, nn
from torch.nn import functional as F

COLOURS = 3
HEAD = 32  # channels of an attention head
NORM_EPS = 1e-5
ATTENTION_EPS = 1e-15
EXPANSION = 4  # of the gated convolutions


@dataclass(frozen=True, kw_only=True)
class DCAESizes:
    """What a network is made of; stages from pixels to latents, in both directions."""

    widths: tuple[int, ...] = (128, 256, 512, 512, 1024, 1024)
    encoder_depths: tuple[int, ...] = (2, 2, 2, 3, 3, 3)
    decoder_depths: tuple[int, ...] = (3, 3, 3, 3, 3, 3)
    attention: tuple[bool, ...] = (False, False, False, True, True, True)  # stages of linear attention
    halves_time: tuple[bool, ...] = (False, False, False, True, True, False)  # between a stage and the next
    channels: int = 128  # of the latents

    @property
    def stride(self) -> tuple[int, int, int]:
        """Pixels per latent."""
        side = 2 ** (len(self.widths) - 1)
        return 2 ** sum(self.halves_time[:-1]), side, side


class RMSNorm(nn.Module):
    """Over the channels of every position, with a bias."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=wide)
        scaled = (x * (norm.square() / x.shape[1] + NORM_EPS).rsqrt()).to(x.dtype)
        return scaled * self.weight[:, None, None, None] + self.bias[:, None, None, None]


class ConvLayer(nn.Module):
    """A convolution that keeps the size, and what follows it."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int = 3, *, groups: int = 1, bias: bool = True, norm: bool = False
    ) -> None:
        super().__init__()
        self.conv = nn.Conv3d(inputs, outputs, kernel, padding=kernel // 2, groups=groups, bias=bias)
        self.norm = RMSNorm(outputs) if norm else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x if self.norm is None else self.norm(x)


class ResBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        first, second = ConvLayer(width, width), ConvLayer(width, width, bias=False, norm=True)
        self.main = nn.ModuleDict({"conv1": first, "conv2": second})

    def forward(self, x: Tensor) -> Tensor:
        return x + self.main["conv2"](F.silu(self.main["conv1"](x), inplace=True))


class LinearAttention(nn.Module):
    """ReLU attention over all positions, with heads of the plain and of locally averaged queries, keys and values."""

    def __init__(self, width: int) -> None:
        super().__init__()
        parts = 3 * width
        self.qkv = ConvLayer(width, parts, 1, bias=False)
        averaged = nn.Conv3d(parts, parts, 5, padding=2, groups=parts, bias=False)
        mixed = nn.Conv3d(parts, parts, 1, groups=parts // HEAD, bias=False)
        self.aggreg = nn.ModuleList([nn.Sequential(averaged, mixed)])
        self.proj = ConvLayer(2 * width, width, 1, bias=False, norm=True)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x)
        every = torch.cat([qkv, self.aggreg[0](qkv)], dim=1)
        del qkv
        heads = rearrange(every, "b (n c) t h w -> b n c (t h w)", c=3 * HEAD)
        out = _linear_attention(*heads.to(torch.promote_types(x.dtype, torch.float32)).chunk(3, dim=2))
        return self.proj(rearrange(out.to(x.dtype), "b n c (t h w) -> b (n c) t h w", t=x.shape[2], h=x.shape[3]))


def _linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B, heads, C, N) each; sum_j v_j (k_j . q_i) / sum_j (k_j . q_i) with q, k >= 0, in time linear in N."""
    q, k = q.relu(), k.relu()
    out = (v @ k.transpose(-1, -2)) @ q
    return out / (k.sum(dim=-1, keepdim=True).transpose(-1, -2) @ q + ATTENTION_EPS)


class GatedConv(nn.Module):
    """Wide, local in space and time, gated, narrow."""

    def __init__(self, width: int) -> None:
        super().__init__()
        wide = 2 * EXPANSION * width
        self.inverted_conv = ConvLayer(width, wide, 1)
        self.depth_conv = ConvLayer(wide, wide, groups=wide)
        self.point_conv = ConvLayer(wide // 2, width, 1, bias=False, norm=True)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.depth_conv(F.silu(self.inverted_conv(x), inplace=True)).chunk(2, dim=1)
        return self.point_conv(x * F.silu(gate))


class Residual(nn.Module):
    """What goes in, plus what ``main`` makes of it."""

    def __init__(self, main: nn.Module) -> None:
        super().__init__()
        self.main = main

    def forward(self, x: Tensor) -> Tensor:
        return x + self.main(x)


class AttentionBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.context_module, self.local_module = Residual(LinearAttention(width)), Residual(GatedConv(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.local_module(self.context_module(x))


class Downsample(nn.Module):
    """A strided convolution, plus the pixels of each new position averaged to the new channels."""

    def __init__(self, inputs: int, outputs: int, *, in_time: bool) -> None:
        super().__init__()
        self.in_time, self.outputs = in_time, outputs
        self.main = nn.ModuleDict({"conv": nn.Conv3d(inputs, outputs, 3, (1 + in_time, 2, 2), padding=1)})

    def forward(self, x: Tensor) -> Tensor:
        frames = 2 if self.in_time and x.shape[2] > 1 else 1
        unshuffled = rearrange(x, "b c (t p) (h q) (w r) -> b (c p q r) t h w", p=frames, q=2, r=2)
        return self.main["conv"](x) + averaged(unshuffled, self.outputs)


class Upsample(nn.Module):
    """Every value repeated, then a convolution, plus the channels repeated and spread over the new positions."""

    def __init__(self, inputs: int, outputs: int, *, in_time: bool) -> None:
        super().__init__()
        self.in_time, self.outputs = in_time, outputs
        self.main = nn.ModuleDict({"conv": ConvLayer(inputs, outputs)})

    def forward(self, x: Tensor) -> Tensor:
        frames = 2 if self.in_time and x.shape[2] > 1 else 1
        near = repeat(x, "b c t h w -> b c (t p) (h q) (w r)", p=frames, q=2, r=2)
        wide = duplicated(x, self.outputs * frames * 4)
        return self.main["conv"](near) + rearrange(
            wide, "b (c p q r) t h w -> b c (t p) (h q) (w r)", p=frames, q=2, r=2
        )


def averaged(x: Tensor, width: int) -> Tensor:
    """Means of neighbouring channels, so many that ``width`` are left."""
    return reduce(x, "b (c n) t h w -> b c t h w", "mean", c=width)


def duplicated(x: Tensor, width: int) -> Tensor:
    """Every channel repeated in its place, so often that there are ``width``."""
    return repeat(x, "b c t h w -> b (c n) t h w", n=width // x.shape[1])


class Stage(nn.Module):
    def __init__(self, *ops: nn.Module) -> None:
        super().__init__()
        self.op_list = nn.ModuleList(ops)

    def forward(self, x: Tensor) -> Tensor:
        for op in self.op_list:
            x = op(x)
        return x


def _blocks(sizes: DCAESizes, stage: int, depth: int) -> list[nn.Module]:
    block = AttentionBlock if sizes.attention[stage] else ResBlock
    return [block(sizes.widths[stage]) for _ in range(depth)]


class EncoderEnd(nn.Module):
    """The last convolution, plus channels averaged to those of the latents."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.main = Stage(ConvLayer(width, channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.main(x) + averaged(x, self.channels)


class DecoderStart(nn.Module):
    """The first convolution, plus channels of the latents repeated."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.main = ConvLayer(channels, width)

    def forward(self, z: Tensor) -> Tensor:
        return self.main(z) + duplicated(z, self.width)


class Encoder(nn.Module):
    def __init__(self, sizes: DCAESizes) -> None:
        super().__init__()
        self.project_in = ConvLayer(COLOURS, sizes.widths[0])
        self.stages = nn.ModuleList([self._stage(sizes, index) for index in range(len(sizes.widths))])
        self.project_out = EncoderEnd(sizes.widths[-1], sizes.channels)

    @staticmethod
    def _stage(sizes: DCAESizes, index: int) -> Stage:
        ops = _blocks(sizes, index, sizes.encoder_depths[index])
        if index + 1 < len(sizes.widths):
            width, following = sizes.widths[index : index + 2]
            ops.append(Downsample(width, following, in_time=sizes.halves_time[index]))
        return Stage(*ops)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> (B, C, T', H', W')."""
        x = self.project_in(x)
        for stage in self.stages:
            x = stage(x)
        return self.project_out(x)


class Decoder(nn.Module):
    def __init__(self, sizes: DCAESizes) -> None:
        super().__init__()
        self.project_in = DecoderStart(sizes.channels, sizes.widths[-1])
        self.stages = nn.ModuleList([self._stage(sizes, index) for index in range(len(sizes.widths))])
        self.project_out = Stage(RMSNorm(sizes.widths[0]), nn.ReLU(inplace=True), ConvLayer(sizes.widths[0], COLOURS))

    @staticmethod
    def _stage(sizes: DCAESizes, index: int) -> Stage:
        ops = _blocks(sizes, index, sizes.decoder_depths[index])
        if index + 1 < len(sizes.widths):
            width, before = sizes.widths[index : index + 2]
            ops.insert(0, Upsample(before, width, in_time=sizes.halves_time[index]))
        return Stage(*ops)

    def forward(self, z: Tensor) -> Tensor:
        """(B, C, T', H', W') -> (B, 3, T, H, W)."""
        x = self.project_in(z)
        for stage in reversed(self.stages):
            x = stage(x)
        return self.project_out(x)


class VideoDCAE(nn.Module):
    """Pixels to latents and back, neither scaled nor clamped; differentiable."""

    def __init__(self, sizes: DCAESizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.encoder, self.decoder = Encoder(sizes), Decoder(sizes)
