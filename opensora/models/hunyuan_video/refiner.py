"""The token refiner of HunyuanVideo: attention among text tokens, before they meet the image.

A causal language model has made the text, so its tokens know only those before them; here they get to know the rest.
The refiner runs on the whole text of a sample, wherever its tokens go afterwards.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu

from opensora.models.layers.embedding import TimestepEmbedder
from opensora.models.layers.modulation import over_tokens
from opensora.models.layers.transformer import Mlp


class TextProjection(nn.Module):
    """Linear, SiLU, Linear: (S, in_dim) -> (S, hidden)."""

    def __init__(self, in_dim: int, hidden: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_dim, hidden)
        self.linear_2 = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(silu(self.linear_1(x.to(self.linear_1.weight.dtype))))


class RefinerBlock(nn.Module):
    """Attention and MLP behind norms that are learned; the vector only gates. No norm of q and k, no positions."""

    def __init__(self, hidden: int, heads: int, mlp_hidden: int) -> None:
        super().__init__()
        self.head_dim = hidden // heads
        self.norm1 = nn.LayerNorm(hidden, eps=1e-6)
        self.self_attn_qkv = nn.Linear(hidden, 3 * hidden)
        self.self_attn_proj = nn.Linear(hidden, hidden)
        self.norm2 = nn.LayerNorm(hidden, eps=1e-6)
        self.mlp = Mlp(hidden, mlp_hidden, hidden, nn.SiLU())
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden, 2 * hidden))

    def forward(self, text: Tensor, vec: Tensor, visible: Tensor | None, sample_of: Tensor | None) -> Tensor:
        """text (B, L, D), vec (S, D), visible (B, 1, 1 or L, L) bool -> (B, L, D)."""
        attention_gate, mlp_gate = over_tokens(self.adaLN_modulation(vec), 2, sample_of)
        qkv = self.self_attn_qkv(self.norm1(text)).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in qkv)  # (B, H, L, Dh)
        attended = scaled_dot_product_attention(q, k, v, attn_mask=visible).transpose(1, 2).flatten(2)
        text = torch.addcmul(text, attention_gate, self.self_attn_proj(attended))
        return torch.addcmul(text, mlp_gate, self.mlp(self.norm2(text)))


class TokenRefiner(nn.Module):
    """Text of a frozen encoder to the hidden size. Time and the mean of the text gate its blocks."""

    def __init__(self, text_dim: int, hidden: int, heads: int, mlp_hidden: int, depth: int) -> None:
        super().__init__()
        self.input_embedder = nn.Linear(text_dim, hidden)
        self.t_embedder = TimestepEmbedder(hidden)
        self.c_embedder = TextProjection(text_dim, hidden)
        blocks = nn.ModuleList(RefinerBlock(hidden, heads, mlp_hidden) for _ in range(depth))
        self.individual_token_refiner = nn.ModuleDict({"blocks": blocks})

    def forward(self, text: Tensor, t: Tensor, mask: Tensor | None = None, sample_of: Tensor | None = None) -> Tensor:
        """(B, L, text_dim) -> (B, L, D).

        Args:
            t: (S,) in [0, 1000].
            mask: (B, L) bool, True for text that counts; what becomes of the rest is of no use.
            sample_of: (B, L) int64, the row of t that a token belongs to; None: all of sequence b to row b.
        """
        vec = self.t_embedder(t) + self.c_embedder(_mean(text, mask, sample_of, len(t)))  # (S, D)
        can_see = visible(mask, sample_of)
        text = self.input_embedder(text.to(self.input_embedder.weight.dtype))
        for block in self.individual_token_refiner["blocks"].children():
            text = block(text, vec, can_see, sample_of)
        return text


def _mean(text: Tensor, mask: Tensor | None, sample_of: Tensor | None, samples: int) -> Tensor:
    """(S, text_dim), fp32 at least: the mean of each sample's tokens that count; zeros of none."""
    text = text.to(torch.promote_types(text.dtype, torch.float32))
    counts = text.new_ones(text.shape[:2], dtype=torch.bool) if mask is None else mask  # (B, L)
    if sample_of is not None:
        of = torch.arange(samples, device=text.device)[:, None] == sample_of.flatten()  # (S, B * L)
        counts = of & counts.flatten()
        total = counts.to(text.dtype) @ text.flatten(0, 1)
    else:
        total = (text * counts[..., None]).sum(dim=1)
    return total / counts.sum(dim=1, keepdim=True).clamp(min=1)


def visible(mask: Tensor | None, sample_of: Tensor | None) -> Tensor | None:
    """(B, 1, 1 or L, L) bool, which tokens see which; None: all.

    The first token of a sample is always seen, as in the published model: there may be no other.
    """
    if mask is not None:
        begins = torch.zeros_like(mask) if sample_of is None else sample_of != sample_of.roll(1, dims=1)
        begins = torch.cat((torch.ones_like(mask[:, :1]), begins[:, 1:]), dim=1)  # (B, L)
        mask = (mask | begins)[:, None, None]
    if sample_of is None:
        return mask
    alike = (sample_of[:, :, None] == sample_of[:, None, :])[:, None]  # (B, 1, L, L)
    return alike if mask is None else alike & mask
