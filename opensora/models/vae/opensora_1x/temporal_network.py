"""The temporal autoencoder of Open-Sora 1.2 (``VAE_Temporal``), with the parameter names that it was published with.

It codes latents of an image autoencoder along time; height and width stay. Group norms take their statistics over all
frames of what is coded together, so that only the convolutions are causal.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from opensora.models.vae.opensora_1x.convolution import CausalConv3d

NORM_EPS = 1e-5


@dataclass(frozen=True, kw_only=True)
class TemporalSizes:
    """What a network is made of."""

    channels: int = 4  # of the image latents
    latents: int = 4  # channels of the latents; the moments have twice as many
    hidden: int = 4  # channels between the encoder and the 1x1x1 convolution behind it
    filters: int = 128
    layers: int = 4  # residual blocks of a level
    multipliers: tuple[int, ...] = (1, 2, 2, 4)  # of ``filters``, by level
    halves: tuple[bool, ...] = (False, True, True)  # whether a level is followed by half as many frames
    groups: int = 32
    activation: Literal["swish", "relu"] = "swish"

    @property
    def ratio(self) -> int:
        """Frames per latent frame."""
        return int(2 ** sum(self.halves))

    def width(self, level: int) -> int:
        return self.filters * self.multipliers[level]

    def act(self) -> Callable[[Tensor], Tensor]:
        return F.silu if self.activation == "swish" else F.relu


class ResBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, sizes: TemporalSizes) -> None:
        super().__init__()
        self.act = sizes.act()
        self.norm1 = nn.GroupNorm(sizes.groups, inputs, NORM_EPS)
        self.conv1 = CausalConv3d(inputs, outputs, bias=False)
        self.norm2 = nn.GroupNorm(sizes.groups, outputs, NORM_EPS)
        self.conv2 = CausalConv3d(outputs, outputs, bias=False)
        self.conv3 = CausalConv3d(inputs, outputs, 1, bias=False) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(self.act(self.norm1(x)))
        h = self.conv2(self.act(self.norm2(h)))
        return h + (x if self.conv3 is None else self.conv3(x))


class Level(nn.ModuleList):
    """Residual blocks of one width."""

    def __init__(self, inputs: int, outputs: int, sizes: TemporalSizes) -> None:
        super().__init__([ResBlock(inputs if i == 0 else outputs, outputs, sizes) for i in range(sizes.layers)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self:
            x = block(x)
        return x


class Encoder(nn.Module):
    def __init__(self, sizes: TemporalSizes) -> None:
        super().__init__()
        self.act = sizes.act()
        levels = range(len(sizes.multipliers))
        widths = [sizes.filters, *map(sizes.width, levels)]
        self.conv_in = CausalConv3d(sizes.channels, sizes.filters, bias=False)
        self.block_res_blocks = nn.ModuleList([Level(widths[i], widths[i + 1], sizes) for i in levels])
        # One zero frame in front, and not two as elsewhere.
        self.conv_blocks = nn.ModuleList(
            [
                CausalConv3d(sizes.width(i), sizes.width(i), 3, (2, 1, 1), past=1) if half else nn.Identity()
                for i, half in enumerate(sizes.halves)
            ]
        )
        self.res_blocks = Level(widths[-1], widths[-1], sizes)
        self.norm1 = nn.GroupNorm(sizes.groups, widths[-1], NORM_EPS)
        self.conv2 = CausalConv3d(widths[-1], 2 * sizes.hidden, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for i, level in enumerate(self.block_res_blocks):
            x = level(x)
            if i < len(self.conv_blocks):
                x = self.conv_blocks[i](x)
        return self.conv2(self.act(self.norm1(self.res_blocks(x))))


class Decoder(nn.Module):
    def __init__(self, sizes: TemporalSizes) -> None:
        super().__init__()
        self.act = sizes.act()
        levels = range(len(sizes.multipliers))
        widths = [*map(sizes.width, levels), sizes.width(-1)]
        self.conv1 = CausalConv3d(sizes.hidden, widths[-1])
        self.res_blocks = Level(widths[-1], widths[-1], sizes)
        self.block_res_blocks = nn.ModuleList([Level(widths[i + 1], widths[i], sizes) for i in levels])
        self.conv_blocks = nn.ModuleList(
            [
                CausalConv3d(widths[i + 1], 2 * widths[i + 1]) if half else nn.Identity()
                for i, half in enumerate(sizes.halves)
            ]
        )
        self.norm1 = nn.GroupNorm(sizes.groups, widths[0], NORM_EPS)
        self.conv_out = CausalConv3d(widths[0], sizes.channels)

    def forward(self, z: Tensor) -> Tensor:
        x = self.res_blocks(self.conv1(z))
        for i in reversed(range(len(self.block_res_blocks))):
            x = self.block_res_blocks[i](x)
            if i > 0 and isinstance(self.conv_blocks[i - 1], CausalConv3d):
                x = rearrange(self.conv_blocks[i - 1](x), "b (c s) t h w -> b c (t s) h w", s=2)
        return self.conv_out(self.act(self.norm1(x)))


class TemporalVAE(nn.Module):
    """Image latents to moments and back; differentiable."""

    def __init__(self, sizes: TemporalSizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.encoder, self.decoder = Encoder(sizes), Decoder(sizes)
        self.quant_conv = CausalConv3d(2 * sizes.hidden, 2 * sizes.latents, 1)
        self.post_quant_conv = CausalConv3d(sizes.latents, sizes.hidden, 1)

    def encode(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, 2 latents, T / ratio rounded up, H, W): means and logarithms of variances.

        Zero frames are put in front, until frames are whole latents.
        """
        return self.quant_conv(self.encoder(F.pad(x, (0, 0, 0, 0, -x.shape[2] % self.sizes.ratio, 0))))

    def decode(self, z: Tensor, frames: int) -> Tensor:
        """(B, latents, T', H, W) -> (B, C, T, H, W), without the first ``-frames % ratio`` of ratio T' frames: those
        that were put in front of so many."""
        return self.decoder(self.post_quant_conv(z))[:, :, -frames % self.sizes.ratio :]


def decoded_length(latent_frames: int, frames: int, ratio: int) -> int:
    """Frames that ``TemporalVAE.decode`` gives; any number may be asked for."""
    return ratio * latent_frames - (-frames % ratio)
