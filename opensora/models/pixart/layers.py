"""The block of PixArt, and attention to a coarser grid of keys and values (PixArt-Sigma, arXiv 2403.04692)."""

from typing import Any

import torch
from torch import Tensor, nn

from opensora.models.layers.attention import attend
from opensora.models.layers.modulation import modulate, table_rows
from opensora.models.layers.norm import plain_norm
from opensora.models.layers.transformer import CrossAttention, Mlp, SelfAttention

Sides = tuple[int, int, int]  # tokens along (t, h, w)


class PixArtBlock(nn.Module):
    """Attention, attention to the text, MLP. The vector of time is the same for all blocks, each adds its own table."""

    def __init__(
        self, hidden: int, heads: int, mlp_hidden: int, *, qk_norm: bool = False, sampling: str = "", factor: int = 1
    ) -> None:
        super().__init__()
        self.norm1 = plain_norm(hidden)
        self.attn: SelfAttention = (
            CompressedAttention(hidden, heads, qk_norm=qk_norm, sampling=sampling, factor=factor)
            if factor > 1
            else SelfAttention(hidden, heads, qk_norm=qk_norm)
        )
        self.cross_attn = CrossAttention(hidden, heads)
        self.norm2 = plain_norm(hidden)
        self.mlp = Mlp(hidden, mlp_hidden, hidden)
        self.scale_shift_table = nn.Parameter(torch.empty(6, hidden))

    def forward(
        self, x: Tensor, vector: Tensor, text: Tensor, mask: Tensor | None, grid: Sides | None, context: Any = None
    ) -> Tensor:
        """x (B, N, D), vector (B, 6 D), text (B, L, D), mask (B, L) bool -> (B, N, D).

        ``grid``: tokens of the clip along (t, h, w), where keys and values are compressed.
        """
        x = x.to(self.scale_shift_table.dtype)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = table_rows(self.scale_shift_table, vector, x.ndim)
        h = modulate(self.norm1(x), shift, scale)
        if isinstance(self.attn, CompressedAttention):
            h = self.attn.over_grid(h, grid, context)
        else:
            h = self.attn(h, context=context)
        x = x + gate * h
        x = x + self.cross_attn(x, text, mask, context)
        return x + gate_mlp * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))

    def modulated(self, x: Tensor, vector: Tensor) -> Tensor:
        """The normalised, modulated tokens that attention starts from."""
        shift, scale, *_ = table_rows(self.scale_shift_table, vector, x.ndim)
        return modulate(self.norm1(x.to(self.scale_shift_table.dtype)), shift, scale)


class CompressedAttention(SelfAttention):
    """Attention whose keys and values are of a grid that is ``factor`` times coarser along both sides.

    Frames are thinned out each by itself. Neighbours make up a key, so all tokens of a clip must be here
    (``Denoising.cuts_tokens``).
    """

    def __init__(self, hidden: int, heads: int, *, qk_norm: bool, sampling: str, factor: int) -> None:
        super().__init__(hidden, heads, qk_norm=qk_norm)
        self.sampling, self.factor = sampling, factor
        if sampling == "conv":
            self.sr = nn.Conv2d(hidden, hidden, kernel_size=factor, stride=factor, groups=hidden)
            self.norm = nn.LayerNorm(hidden)

    def over_grid(self, x: Tensor, grid: Sides | None, context: Any = None) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        assert grid is not None, "attention over a coarser grid must be told the grid (TokenBatch.grid)"

        def project() -> tuple[Tensor, Tensor, Tensor]:
            q, k, v = self.qkv(x).chunk(3, dim=-1)
            parts = (q, self.compressed(k, grid), self.compressed(v, grid))
            q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in parts)
            return self.q_norm(q), self.k_norm(k), v

        return self.proj(attend(self.core, project, key_mask=None, context=context).flatten(2))

    def compressed(self, x: Tensor, grid: Sides) -> Tensor:
        """(B, N, D) -> (B, N', D); what is left of a side that ``factor`` does not divide is not read."""
        step, (frames, height, width) = self.factor, grid
        if self.sampling == "uniform_every":
            return x[:, : x.shape[1] // step * step : step]
        planes = x.unflatten(1, (frames, height, width)).flatten(0, 1)  # (B * T, H, W, D)
        if self.sampling == "conv":
            planes = self.norm(self.sr(planes.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        else:  # nearest neighbours of an average's place are the first of each square, as are uniform samples
            planes = planes[:, : height // step * step : step, : width // step * step : step]
        return planes.flatten(1, 2).unflatten(0, (-1, frames)).flatten(1, 2)
