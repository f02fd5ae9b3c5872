"""Layers that the Open-Sora 1.x models share with one another and with nobody else."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from opensora.models.layers.attention import attend
from opensora.models.layers.modulation import table_rows
from opensora.models.layers.rope import RopeTable, apply_rope
from opensora.models.layers.sincos import base_side, scaled, sincos_2d
from opensora.models.layers.transformer import CrossAttention, SelfAttention
from opensora.models.stdit.windows import Window, WindowCore

FRAMES_OF_A_STILL, FPS_OF_A_STILL = 1, 120.0  # what the published models were told of images


class PatchEmbedder(nn.Module):
    """A token's latents to the hidden size; in files a convolution over patches."""

    def __init__(self, values: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(values, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C pt ph pw) -> (..., D), in the dtype of the weights."""
        return self.proj(x.to(self.proj.weight.dtype))


class Modulations(NamedTuple):
    """The vectors that the blocks' tables are added to."""

    vector: Tensor  # (B, n D)
    clean: Tensor | None = None  # the same at time 0, for frames that are known
    known: Tensor | None = None  # (B, T, 1) bool, which frames these are

    def rows(self, table: Tensor) -> tuple[Tensor, ...]:
        """Of ``table`` (n, D): n tensors (B, 1 or T, 1, D)."""
        return table_rows(table, self.vector, 4, clean=self.clean, known=self.known)

    def noisy_rows(self, table: Tensor) -> tuple[Tensor, ...]:
        """As if no frame were known."""
        return table_rows(table, self.vector, 4)


class RotaryFrequencies(nn.Module):
    """``freqs`` (dim/2) of interleaved channel pairs: frozen, and saved with the weights.

    They are kept in the type that the model computes in. Published models were trained so: in bf16 their angles are
    those of rounded frequencies, while positions and sines here are exact.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.freqs = nn.Parameter(torch.empty(dim // 2), requires_grad=False)

    def forward(self, *positions: Tensor) -> RopeTable:
        """(B, ..., ) coordinates along one axis or several -> the table of as many parts of a head, one after the other:
        (B, ..., 1, axes * dim/2, 2)."""
        exact = torch.float64 if self.freqs.dtype == torch.float64 else torch.float32
        freqs = self.freqs.to(exact)
        angles = torch.cat([along.to(exact)[..., None] * freqs for along in positions], dim=-1)[..., None, :]
        return (torch.stack((angles.cos(), angles.sin()), dim=-1),)

    @staticmethod
    def values(dim: int) -> Tensor:
        """(dim/2,) fp32: 10000^(-2i/dim)."""
        return 1.0 / (10000.0 ** (torch.arange(0, dim, 2)[: dim // 2].float() / dim))


class WindowAttention(SelfAttention):
    """Attention within windows of places over all frames; see windows.py."""

    def __init__(self, hidden: int, heads: int, window: Window, **more: Any) -> None:
        super().__init__(hidden, heads, **more)
        self.core = WindowCore(window)  # type: ignore[assignment]

    def in_windows(self, x: Tensor, rope: RopeTable, grid: tuple[int, int, int], context: Any) -> Tensor:
        """(B, T, S, D) -> (B, T, S, D); ``grid``: tokens of the whole clip."""

        def project() -> tuple[Tensor, Tensor, Tensor]:
            q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in self.qkv(x).chunk(3, dim=-1))
            q, k = (apply_rope(norm(one), rope, "interleaved") for norm, one in ((self.q_norm, q), (self.k_norm, k)))
            return q, k, v

        return self.proj(attend(self.core, project, key_mask=None, context=context, grid=grid).flatten(3))


class FrameCrossAttention(CrossAttention):
    """Attention to the text, of given frames to the null text: the same mask hides words of either."""

    def of_frames(
        self, x: Tensor, text: Tensor, null: Tensor, given: Tensor, mask: Tensor | None, context: Any
    ) -> Tensor:
        """x (B, T, S, D), text and null (B, L, D), given (B, T) bool, mask (B, L) bool -> (B, T, S, D)."""
        samples, frames = given.shape

        def project() -> tuple[Tensor, Tensor, Tensor]:
            q = self.q_linear(x).flatten(0, 1).unflatten(-1, (-1, self.head_dim))  # (B T, S, H, Dh)
            both = self.kv_linear(torch.stack((text, null)))[:, :, None]  # (2, B, 1, L, 2 D)
            of_frame = torch.where(given[..., None, None], both[1], both[0]).flatten(0, 1)  # (B T, L, 2 D)
            k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in of_frame.chunk(2, dim=-1))
            return q, k, v

        masks = None if mask is None else mask[:, None].expand(-1, frames, -1).flatten(0, 1)
        out = attend(self.core, project, key_mask=masks, context=context).flatten(2)
        return self.proj(out).unflatten(0, (samples, frames))


def stretched(positions: Tensor, grid: tuple[int, int, int], scale: Tensor, hidden: int) -> Tensor:
    """Fixed sines and cosines of places for any size of clip: (B, T, S, 3) -> (B, T, S, D).

    A side of n tokens is stretched over ``base`` of them, the side of a square of as many tokens, and shrunk by
    ``scale``, how much larger than its reference the clip is in pixels.
    """
    base = base_side(grid[1] * grid[2], nearest=True)
    rows, columns = (scaled(positions[..., dim], scale, base, grid[dim]) for dim in (1, 2))
    return sincos_2d(rows, columns, hidden)


def pixel_scale(height: Tensor, width: Tensor, reference: int) -> Tensor:
    """How much larger than a square of ``reference`` pixels a side the clips of a batch are; the first one decides."""
    return (height[0].float() * width[0].float()).sqrt() / reference


def known_frames(x_mask: Tensor | None) -> Tensor | None:
    """(B, T) bool, True for noisy frames -> (B, T, 1), True for known ones."""
    return None if x_mask is None else ~x_mask.bool()[..., None]


def tensor_plan(hidden: int, inner: int, head_dim: int) -> dict[str, tuple[str, tuple[tuple[int, int], ...]]]:
    """How tensor parallelism cuts the layers of all of these models."""
    heads, width = (hidden, head_dim), (hidden, 1)
    return {
        "*blocks.*.attn*.qkv": ("column", (heads, heads, heads)),
        "*blocks.*.attn*.proj": ("row", (heads,)),
        "*blocks.*.cross_attn.q_linear": ("column", (heads,)),
        "*blocks.*.cross_attn.kv_linear": ("column", (heads, heads)),
        "*blocks.*.cross_attn.proj": ("row", (heads,)),
        "*blocks.*.mlp.fc1": ("column", ((inner, 1),)),
        "*blocks.*.mlp.fc2": ("row", ((inner, 1),)),
        "t_block*.1": ("gather", ()),
        "t_embedder.mlp.0": ("column", (width,)),
        "t_embedder.mlp.2": ("row", (width,)),
        "y_embedder.y_proj.fc1": ("column", (width,)),
        "y_embedder.y_proj.fc2": ("row", (width,)),
    }


SHARED_NORMS = ("*blocks.*.attn*.?_norm.weight",)


def draw_(name: str, tensor: Tensor, generator: torch.Generator, *, zero: bool, narrow: bool) -> None:
    """The initial value of a parameter by its name: zero biases, norms of one, tables and null texts as normal as
    their width, matrices uniform (Xavier).

    Args:
        zero: this one starts at zero.
        narrow: this one is normal with a deviation of 0.02.
    """
    if name == "rope.freqs":
        tensor.copy_(RotaryFrequencies.values(2 * tensor.numel()))
    elif name.endswith("_norm.weight"):
        tensor.fill_(1.0)
    elif zero or name.endswith(".bias"):
        tensor.zero_()
    else:
        draw = torch.empty(tensor.shape, dtype=torch.float32, device="cpu")
        if "scale_shift_table" in name or name.endswith("y_embedding"):
            draw.normal_(0.0, tensor.shape[-1] ** -0.5, generator=generator)
        elif narrow:
            draw.normal_(0.0, 0.02, generator=generator)
        else:
            bound = math.sqrt(6.0 / (tensor.shape[0] + tensor.shape[1]))
            draw.uniform_(-bound, bound, generator=generator)
        tensor.copy_(draw)
