"""Layers that the Open-Sora 1.x models share with one another and with nobody else."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from opensora.models.base import TensorPlan
from opensora.models.layers.attention import attend
from opensora.models.layers.modulation import table_rows
from opensora.models.layers.rope import RopeTable, apply_rope
from opensora.models.layers.sincos import base_side, scaled, sincos_2d
from opensora.models.layers.transformer import CrossAttention, SelfAttention
from opensora.models.stdit.windows import Window, WindowCore

FPS_OF_A_STILL = 120.0  # what the published models were told of images


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

    @property
    def exact(self) -> torch.dtype:
        """Of positions and angles."""
        return torch.float64 if self.freqs.dtype == torch.float64 else torch.float32

    def forward(self, *positions: Tensor) -> RopeTable:
        """(B, ...) coordinates along one axis or several -> the table of as many parts of a head, one after the other:
        (B, ..., 1, axes * dim/2, 2)."""
        freqs = self.freqs.to(self.exact)
        angles = torch.cat([along.to(self.exact)[..., None] * freqs for along in positions], dim=-1)[..., None, :]
        return (torch.stack((angles.cos(), angles.sin()), dim=-1),)

    @staticmethod
    def fill_(freqs: Tensor) -> None:
        """10000^(-2i/dim), rounded to fp32."""
        dim = 2 * freqs.numel()
        freqs.copy_(1.0 / (10000.0 ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)))


class WindowAttention(SelfAttention):
    """Attention within windows of places over all frames; see windows.py."""

    def __init__(self, hidden: int, heads: int, window: Window, **more: Any) -> None:
        super().__init__(hidden, heads, **more)
        self.core = WindowCore(window)  # type: ignore[assignment]

    def in_windows(self, x: Tensor, rope: RopeTable, grid: tuple[int, int, int], context: Any) -> Tensor:
        """(B, T, S, D) -> (B, T, S, D); ``grid``: tokens of the whole clip."""

        def project() -> tuple[Tensor, Tensor, Tensor]:
            q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in self.qkv(x).chunk(3, dim=-1))
            return apply_rope(self.q_norm(q), rope, "interleaved"), apply_rope(self.k_norm(k), rope, "interleaved"), v

        return self.proj(attend(self.core, project, key_mask=None, context=context, grid=grid).flatten(3))


class FrameText(NamedTuple):
    """What attention to the text reads, as wide as the model."""

    text: Tensor  # (B, L, D)
    mask: Tensor | None = None  # (B, L) bool, of either text
    null: Tensor | None = None  # (B, L, D), what given frames read in place of the text
    given: Tensor | None = None  # (B, T) bool


class FrameCrossAttention(CrossAttention):
    """Attention to the text, and of given frames to another text; the same mask hides words of both."""

    def of_frames(self, x: Tensor, text: FrameText, context: Any) -> Tensor:
        """(B, T, S, D) -> (B, T, S, D)."""
        if text.given is None or text.null is None:
            return self(x, text.text, text.mask, context)
        given, both, mask = text.given, torch.stack((text.text, text.null)), text.mask

        def project() -> tuple[Tensor, Tensor, Tensor]:
            q = self.q_linear(x).flatten(0, 1).unflatten(-1, (-1, self.head_dim))  # (B T, S, H, Dh)
            prompt, null = self.kv_linear(both)[:, :, None].unbind(0)  # (B, 1, L, 2 D) each
            of_frame = torch.where(given[..., None, None], null, prompt).flatten(0, 1)  # (B T, L, 2 D)
            k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in of_frame.chunk(2, dim=-1))
            return q, k, v

        masks = None if mask is None else mask[:, None].expand(-1, given.shape[1], -1).flatten(0, 1)
        out = attend(self.core, project, key_mask=masks, context=context).flatten(2)
        return self.proj(out).unflatten(0, given.shape)


def text_rows(y: Tensor, mask: Tensor | Sequence[int] | None) -> tuple[Tensor, Tensor | None]:
    """Texts (B, L, D) and their mask, of those that are end to end, (1, lengths, D), where ``mask`` is a list of
    lengths."""
    if mask is None or isinstance(mask, Tensor):
        return y, mask
    lengths = torch.tensor(list(mask), device=y.device)
    rows = pad_sequence(list(y[0].split(list(mask))), batch_first=True)
    return rows, torch.arange(rows.shape[1], device=y.device) < lengths[:, None]


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


def told_fps(fps: Tensor, num_frames: Tensor | None) -> Tensor:
    """(B,) frames per second as the model is told them; of a still, and where none are known, those of a still."""
    is_still = fps <= 0 if num_frames is None else (fps <= 0) | (num_frames == 1)
    return torch.where(is_still, FPS_OF_A_STILL, fps)


def known_frames(x_mask: Tensor | None) -> Tensor | None:
    """(B, T) bool, True for noisy frames -> (B, T, 1), True for known ones."""
    return None if x_mask is None else ~x_mask.bool()[..., None]


def noisy_frames(known: Tensor | None) -> Tensor | None:
    """Known tokens (B, T, S) bool -> the family's ``x_mask`` (B, T), True for frames that are noisy."""
    return None if known is None else ~known.any(dim=2)


def tensor_plan(hidden: int, inner: int, head_dim: int) -> TensorPlan:
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
