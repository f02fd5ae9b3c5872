"""The layers of Wan, named as in its files.

Letters: B batch, S rows of times (B, unless tokens of a sample have times of their own), N image tokens, L text tokens,
K tokens of a picture, D hidden.
"""

from typing import Any

import torch
from torch import Tensor, nn

from opensora.models.layers.attention import SDPACore, attend
from opensora.models.layers.modulation import modulate, over_tokens
from opensora.models.layers.norm import AllHeadsRMSNorm, ExactLayerNorm, plain_norm
from opensora.models.layers.rope import RopeTable, apply_rope


def exact_type(dtype: torch.dtype) -> torch.dtype:
    """Of what stays more exact than weights of ``dtype``: the tokens between layers, modulations, times, positions."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class WanSelfAttention(nn.Module):
    """Attention among all tokens of a clip. Queries and keys are normalised over all heads at once, then turned."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.head_dim = hidden // heads
        self.q, self.k, self.v = (nn.Linear(hidden, hidden) for _ in range(3))
        self.o = nn.Linear(hidden, hidden)
        self.norm_q, self.norm_k = AllHeadsRMSNorm(hidden), AllHeadsRMSNorm(hidden)
        self.core = SDPACore()

    def forward(self, x: Tensor, rope: RopeTable, context: Any = None) -> Tensor:
        """(B, N, D) -> (B, N, D)."""

        def project() -> tuple[Tensor, Tensor, Tensor]:
            parts = (self.norm_q(self.q(x)), self.norm_k(self.k(x)), self.v(x))
            q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in parts)
            return apply_rope(q, rope, "interleaved"), apply_rope(k, rope, "interleaved"), v

        return self.o(attend(self.core, project, key_mask=None, context=context).flatten(2))


class WanCrossAttention(nn.Module):
    """Every token over the text, and by the same queries over a picture; what they find is added up.

    No text is hidden: what fills up a short prompt is attended to, as the published models were trained.
    """

    def __init__(self, hidden: int, heads: int, *, reads_image: bool) -> None:
        super().__init__()
        self.head_dim = hidden // heads
        self.q, self.k, self.v = (nn.Linear(hidden, hidden) for _ in range(3))
        self.o = nn.Linear(hidden, hidden)
        self.norm_q, self.norm_k = AllHeadsRMSNorm(hidden), AllHeadsRMSNorm(hidden)
        self.core = SDPACore()
        if reads_image:
            self.k_img, self.v_img = nn.Linear(hidden, hidden), nn.Linear(hidden, hidden)
            self.norm_k_img = AllHeadsRMSNorm(hidden)
            self.core_img = SDPACore()

    def forward(self, x: Tensor, text: Tensor, image: Tensor | None, context: Any = None) -> Tensor:
        """x (B, N, D), text (B, L, D), image (B, K, D) or None -> (B, N, D)."""
        asked: list[Tensor] = []

        def queries() -> Tensor:  # once for both, and not at all where both give again what they gave before
            if not asked:
                asked.append(self._heads(self.norm_q(self.q(x))))
            return asked[0]

        def of_text() -> tuple[Tensor, Tensor, Tensor]:
            return queries(), self._heads(self.norm_k(self.k(text))), self._heads(self.v(text))

        def of_image() -> tuple[Tensor, Tensor, Tensor]:
            return queries(), self._heads(self.norm_k_img(self.k_img(image))), self._heads(self.v_img(image))

        found = attend(self.core, of_text, key_mask=None, context=context)
        if image is not None:
            found = found + attend(self.core_img, of_image, key_mask=None, context=context)
        return self.o(found.flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))


class WanBlock(nn.Module):
    """Attention, attention to the text, MLP. What modulates is the same for all blocks, each adds a table of its own.

    Tokens stay in fp32 between layers whatever the weights are (fp64 for fp64 weights), and so do modulations.
    """

    def __init__(self, hidden: int, heads: int, inner: int, *, reads_image: bool) -> None:
        super().__init__()
        self.norm1 = plain_norm(hidden)
        self.self_attn = WanSelfAttention(hidden, heads)
        self.norm3 = ExactLayerNorm(hidden, eps=1e-6)  # of attention to the text, the one norm that is learned
        self.cross_attn = WanCrossAttention(hidden, heads, reads_image=reads_image)
        self.norm2 = plain_norm(hidden)
        self.ffn = nn.Sequential(nn.Linear(hidden, inner), nn.GELU(approximate="tanh"), nn.Linear(inner, hidden))
        self.modulation = nn.Parameter(torch.empty(1, 6, hidden))

    def forward(
        self,
        x: Tensor,
        vector: Tensor,
        text: Tensor,
        image: Tensor | None,
        rope: RopeTable,
        row_of: Tensor | None = None,
        context: Any = None,
    ) -> Tensor:
        """x (B, N, D), vector (S, 6, D), text (B, L, D), image (B, K, D) -> (B, N, D).

        ``row_of`` (B, N) int64: the row of ``vector`` that a token is modulated by; None: row b, in sample b.
        """
        dtype = self.modulation.dtype
        x = x.to(exact_type(dtype))
        shift, scale, gate, shift_ffn, scale_ffn, gate_ffn = modulations(self.modulation, vector, row_of)
        h = modulate(self.norm1(x), shift, scale).to(dtype)
        x = torch.addcmul(x, gate, self.self_attn(h, rope, context).to(x.dtype))
        x = x + self.cross_attn(self.norm3(x).to(dtype), text, image, context)
        h = modulate(self.norm2(x), shift_ffn, scale_ffn).to(dtype)
        return torch.addcmul(x, gate_ffn, self.ffn(h).to(x.dtype))

    def modulated(self, x: Tensor, vector: Tensor, row_of: Tensor | None = None) -> Tensor:
        """The normalised, modulated tokens that attention starts from."""
        shift, scale, *_ = modulations(self.modulation, vector, row_of)
        return modulate(self.norm1(x.to(exact_type(self.modulation.dtype))), shift, scale)


class WanHead(nn.Module):
    """Norm, modulation, projection to latents. Rows of ``head`` are (C, pt, ph, pw) here, (pt, ph, pw, C) in files."""

    def __init__(self, hidden: int, values: int) -> None:
        super().__init__()
        self.norm = plain_norm(hidden)
        self.head = nn.Linear(hidden, values)
        self.modulation = nn.Parameter(torch.empty(1, 2, hidden))

    def forward(self, x: Tensor, time: Tensor, row_of: Tensor | None = None) -> Tensor:
        """x (B, N, D), time (S, D) -> (B, N, values), in the type of the weights."""
        dtype = self.head.weight.dtype
        shift, scale = modulations(self.modulation, time[:, None], row_of)
        return self.head(modulate(self.norm(x.to(exact_type(dtype))), shift, scale).to(dtype))


class ImageEmbedder(nn.Module):
    """Tokens of a picture's encoder to the hidden size."""

    def __init__(self, image_dim: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            nn.LayerNorm(image_dim),
            nn.Linear(image_dim, image_dim),
            nn.GELU(),
            nn.Linear(image_dim, hidden),
            nn.LayerNorm(hidden),
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, K, E) -> (B, K, D)."""
        return self.proj(tokens.to(self.proj[1].weight.dtype))  # type: ignore[arg-type]


def modulations(table: Tensor, vector: Tensor, row_of: Tensor | None) -> tuple[Tensor, ...]:
    """Rows of a table (1, n, D) and of a vector (S, n, D) or (S, 1, D), added: n tensors (B, 1, D), or (B, N, D)."""
    return over_tokens((table + vector).flatten(1), table.shape[1], row_of)
