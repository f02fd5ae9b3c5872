"""The two kinds of block of the MMDiT, and its last layer. Parameter names are those of Flux and Open-Sora 2 files."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from opensora.models.layers.attention import SDPACore, attend
from opensora.models.layers.modulation import Modulation, modulate, over_tokens
from opensora.models.layers.norm import QKNorm, RMSNorm
from opensora.models.layers.rope import RopeLayout, RopeTable, apply_rope


def _plain_norm(hidden: int) -> nn.LayerNorm:
    return nn.LayerNorm(hidden, eps=1e-6, elementwise_affine=False)


def split_in_proportion(x: Tensor, *widths: int) -> tuple[Tensor, ...]:
    """Cut the last dim at ``widths``, or at the same share of each where a process holds a share of the layer."""
    share, rest = divmod(sum(widths), x.shape[-1])
    assert not rest, (x.shape, widths)
    return x.split([width // share for width in widths], dim=-1)


def _mlp(hidden: int, inner: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(hidden, inner), nn.GELU(approximate="tanh"), nn.Linear(inner, hidden))


class StreamAttention(nn.Module):
    """One stream's share of the joint attention: its q, k, v and its output projection."""

    def __init__(self, hidden: int, heads: int, qkv_bias: bool, fused_qkv: bool) -> None:
        super().__init__()
        self.head_dim = hidden // heads
        self.fused_qkv = fused_qkv
        if fused_qkv:
            self.qkv = nn.Linear(hidden, 3 * hidden, bias=qkv_bias)
        else:
            self.q_proj = nn.Linear(hidden, hidden, bias=qkv_bias)
            self.k_proj = nn.Linear(hidden, hidden, bias=qkv_bias)
            self.v_proj = nn.Linear(hidden, hidden, bias=qkv_bias)
        self.norm = QKNorm(hidden // heads)
        self.proj = nn.Linear(hidden, hidden)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, N, D) -> q, k, v (B, N, H, Dh), q and k normalised."""
        q, k, v = self.qkv(x).chunk(3, dim=-1) if self.fused_qkv else (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in (q, k, v))
        return *self.norm(q, k), v


class ContextAttention(nn.Module):
    """Text that is read but not updated: keys and values only.

    Its queries are zeros, because a core takes as many queries as keys; what they gather is thrown away.
    """

    def __init__(self, hidden: int, heads: int, qkv_bias: bool) -> None:
        super().__init__()
        self.head_dim = hidden // heads
        self.k_proj = nn.Linear(hidden, hidden, bias=qkv_bias)
        self.v_proj = nn.Linear(hidden, hidden, bias=qkv_bias)
        self.norm = nn.ModuleDict({"key_norm": RMSNorm(hidden // heads)})

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, L, D) -> q (zeros), k, v (B, L, H, Dh), k normalised."""
        k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in (self.k_proj(x), self.v_proj(x)))
        return torch.zeros_like(k), self.norm["key_norm"](k), v


class DoubleStreamBlock(nn.Module):
    """Image and text with weights of their own, joined in one attention over cat(txt, img).

    With ``updates_text=False`` the text is only read: the last double block of a model without single blocks, where
    nothing would use the new text and its parameters would never get a gradient.
    """

    def __init__(
        self,
        hidden: int,
        heads: int,
        mlp_hidden: int,
        *,
        qkv_bias: bool,
        fused_qkv: bool,
        rope_layout: RopeLayout,
        updates_text: bool = True,
    ) -> None:
        super().__init__()
        self.rope_layout: RopeLayout = rope_layout
        self.img_mod = Modulation(hidden, parts=6)
        self.img_norm1 = _plain_norm(hidden)
        self.img_attn = StreamAttention(hidden, heads, qkv_bias, fused_qkv)
        self.img_norm2 = _plain_norm(hidden)
        self.img_mlp = _mlp(hidden, mlp_hidden)
        self.txt_mod = Modulation(hidden, parts=6 if updates_text else 2)
        self.txt_norm1 = _plain_norm(hidden)
        self.txt_attn: StreamAttention | ContextAttention
        if updates_text:
            self.txt_attn = StreamAttention(hidden, heads, qkv_bias, fused_qkv)
            self.txt_norm2 = _plain_norm(hidden)
            self.txt_mlp = _mlp(hidden, mlp_hidden)
        else:
            self.txt_attn = ContextAttention(hidden, heads, qkv_bias)
        self.core = SDPACore()

    def forward(
        self,
        img: Tensor,
        txt: Tensor,
        vec: Tensor,
        rope: RopeTable,
        key_mask: Tensor | None = None,
        context: Any = None,
        sample_of: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """img (B, N, D), txt (B, L, D), vec (B, D) -> img, txt of the same shapes; N or L may be 0.

        With ``sample_of`` (B, L), (B, N), vec has a row per sample, and they say which of them a token is modulated by.
        """
        dtype = self.img_mod.lin.weight.dtype
        img, txt = img.to(dtype), txt.to(dtype)
        txt_rows, img_rows = sample_of or (None, None)
        img_parts, txt_parts = self.img_mod(vec, img_rows), self.txt_mod(vec, txt_rows)

        def project() -> tuple[Tensor, Tensor, Tensor]:
            of_img = self.img_attn.project(modulate(self.img_norm1(img), *img_parts[:2]))
            of_txt = self.txt_attn.project(modulate(self.txt_norm1(txt), *txt_parts[:2]))
            q_BLHD, k_BLHD, v_BLHD = (torch.cat(pair, dim=1) for pair in zip(of_txt, of_img, strict=True))
            return apply_rope(q_BLHD, rope, self.rope_layout), apply_rope(k_BLHD, rope, self.rope_layout), v_BLHD

        o_BLHD = attend(self.core, project, key_mask=key_mask, context=context)
        txt_o, img_o = o_BLHD.flatten(2).split((txt.shape[1], img.shape[1]), dim=1)
        img = self._residuals(img, self.img_attn.proj(img_o), self.img_norm2, self.img_mlp, img_parts)
        if isinstance(self.txt_attn, StreamAttention):
            txt = self._residuals(txt, self.txt_attn.proj(txt_o), self.txt_norm2, self.txt_mlp, txt_parts)
        return img, txt

    def modulated(self, img: Tensor, vec: Tensor, img_rows: Tensor | None = None) -> Tensor:
        """(B, N, D), the image tokens that attention starts from, before any projection; vec and rows as in forward."""
        shift, scale, *_ = self.img_mod(vec, img_rows)
        return modulate(self.img_norm1(img.to(self.img_mod.lin.weight.dtype)), shift, scale)

    @staticmethod
    def _residuals(x: Tensor, attended: Tensor, norm: nn.Module, mlp: nn.Module, parts: tuple[Tensor, ...]) -> Tensor:
        _, _, attention_gate, shift, scale, mlp_gate = parts
        x = torch.addcmul(x, attention_gate, attended)
        return torch.addcmul(x, mlp_gate, mlp(modulate(norm(x), shift, scale)))


class SingleStreamBlock(nn.Module):
    """cat(txt, img) as one stream; attention and MLP side by side behind one norm (ViT-22B, arXiv 2302.05442)."""

    def __init__(
        self, hidden: int, heads: int, mlp_hidden: int, *, qkv_bias: bool, fused_qkv: bool, rope_layout: RopeLayout
    ) -> None:
        super().__init__()
        self.head_dim = hidden // heads
        self.fused_qkv = fused_qkv
        self.rope_layout: RopeLayout = rope_layout
        self.widths = (hidden, hidden, hidden, mlp_hidden)  # q, k, v and the MLP's inner layer
        self.modulation = Modulation(hidden, parts=3)
        self.pre_norm = _plain_norm(hidden)
        if fused_qkv:
            self.linear1 = nn.Linear(hidden, sum(self.widths), bias=qkv_bias)
        else:
            self.q_proj = nn.Linear(hidden, self.widths[0], bias=qkv_bias)
            self.k_proj = nn.Linear(hidden, self.widths[1], bias=qkv_bias)
            self.v_mlp = nn.Linear(hidden, sum(self.widths[2:]), bias=qkv_bias)
        self.norm = QKNorm(hidden // heads)
        self.linear2 = nn.Linear(hidden + mlp_hidden, hidden)
        self.core = SDPACore()

    def forward(
        self,
        x: Tensor,
        vec: Tensor,
        rope: RopeTable,
        key_mask: Tensor | None = None,
        context: Any = None,
        sample_of: Tensor | None = None,
    ) -> Tensor:
        """x (B, L+N, D), vec (B, D) -> (B, L+N, D); with ``sample_of`` (B, L+N) as in a double block."""
        x = x.to(self.linear2.weight.dtype)
        shift, scale, gate = self.modulation(vec, sample_of)
        h = modulate(self.pre_norm(x), shift, scale)
        q: Tensor | None = None
        k: Tensor | None = None
        if self.fused_qkv:
            q, k, v, inner = split_in_proportion(self.linear1(h), *self.widths)
        else:
            v, inner = split_in_proportion(self.v_mlp(h), *self.widths[2:])

        def project() -> tuple[Tensor, Tensor, Tensor]:
            pair = (self.q_proj(h), self.k_proj(h)) if q is None or k is None else (q, k)
            q_BLHD, k_BLHD, v_BLHD = (part.unflatten(-1, (-1, self.head_dim)) for part in (*pair, v))
            q_BLHD, k_BLHD = self.norm(q_BLHD, k_BLHD)
            return apply_rope(q_BLHD, rope, self.rope_layout), apply_rope(k_BLHD, rope, self.rope_layout), v_BLHD

        o_BLHD = attend(self.core, project, key_mask=key_mask, context=context)
        joined = torch.cat((o_BLHD.flatten(2), gelu(inner, approximate="tanh")), dim=-1)
        return torch.addcmul(x, gate, self.linear2(joined))


class FinalLayer(nn.Module):
    """Norm, modulation, projection: (B, N, D) -> (B, N, out_channels)."""

    def __init__(self, hidden: int, out_channels: int) -> None:
        super().__init__()
        self.norm_final = _plain_norm(hidden)
        self.linear = nn.Linear(hidden, out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden, 2 * hidden))

    def forward(self, x: Tensor, vec: Tensor, sample_of: Tensor | None = None) -> Tensor:
        dtype = self.linear.weight.dtype
        shift, scale = over_tokens(self.adaLN_modulation(vec.to(dtype)), 2, sample_of)
        return self.linear(modulate(self.norm_final(x.to(dtype)), shift, scale))
