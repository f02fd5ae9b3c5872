"""The two kinds of block of the MMDiT. Parameter names are those of Flux and Open-Sora 2 files."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from opensora.models.layers.attention import SDPACore
from opensora.models.layers.joint_blocks import (
    Heads,
    JointSingleBlock,
    JointStream,
    Residuals,
    attend_jointly,
    split_in_proportion,
)
from opensora.models.layers.modulation import Modulation, modulate
from opensora.models.layers.norm import QKNorm, RMSNorm, plain_norm
from opensora.models.layers.rope import RopeLayout, RopeTable


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

    def project(self, x: Tensor) -> Heads:
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

    def project(self, x: Tensor) -> Heads:
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
        self.img_norm1 = plain_norm(hidden)
        self.img_attn = StreamAttention(hidden, heads, qkv_bias, fused_qkv)
        self.img_norm2 = plain_norm(hidden)
        self.img_mlp = _mlp(hidden, mlp_hidden)
        self.txt_mod = Modulation(hidden, parts=6 if updates_text else 2)
        self.txt_norm1 = plain_norm(hidden)
        self.txt_attn: StreamAttention | ContextAttention
        if updates_text:
            self.txt_attn = StreamAttention(hidden, heads, qkv_bias, fused_qkv)
            self.txt_norm2 = plain_norm(hidden)
            self.txt_mlp = _mlp(hidden, mlp_hidden)
        else:
            self.txt_attn = ContextAttention(hidden, heads, qkv_bias)
        self.core = SDPACore()

    def _streams(self) -> tuple[JointStream, JointStream]:
        update = None
        if isinstance(self.txt_attn, StreamAttention):
            update = Residuals(self.txt_attn.proj, self.txt_norm2, self.txt_mlp)
        image = Residuals(self.img_attn.proj, self.img_norm2, self.img_mlp)
        return (
            JointStream(self.txt_mod, self.txt_norm1, self.txt_attn.project, update),
            JointStream(self.img_mod, self.img_norm1, self.img_attn.project, image),
        )

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
        txt, img = attend_jointly(
            self.core,
            self._streams(),
            (txt.to(dtype), img.to(dtype)),
            vec,
            rope,
            self.rope_layout,
            key_mask=key_mask,
            context=context,
            sample_of=sample_of,
        )
        return img, txt

    def modulated(self, img: Tensor, vec: Tensor, img_rows: Tensor | None = None) -> Tensor:
        """(B, N, D), the image tokens that attention starts from, before any projection; vec and rows as in forward."""
        shift, scale, *_ = self.img_mod(vec, img_rows)
        return modulate(self.img_norm1(img.to(self.img_mod.lin.weight.dtype)), shift, scale)


class SingleStreamBlock(JointSingleBlock):
    """cat(txt, img) as one stream; attention and MLP side by side behind one norm."""

    def __init__(
        self, hidden: int, heads: int, mlp_hidden: int, *, qkv_bias: bool, fused_qkv: bool, rope_layout: RopeLayout
    ) -> None:
        super().__init__()
        self.head_dim = hidden // heads
        self.fused_qkv = fused_qkv
        self.rope_layout = rope_layout
        self.widths = (hidden, hidden, hidden, mlp_hidden)  # q, k, v and the MLP's inner layer
        self.modulation = Modulation(hidden, parts=3)
        self.pre_norm = plain_norm(hidden)
        if fused_qkv:
            self.linear1 = nn.Linear(hidden, sum(self.widths), bias=qkv_bias)
        else:
            self.q_proj = nn.Linear(hidden, self.widths[0], bias=qkv_bias)
            self.k_proj = nn.Linear(hidden, self.widths[1], bias=qkv_bias)
            self.v_mlp = nn.Linear(hidden, sum(self.widths[2:]), bias=qkv_bias)
        self.norm = QKNorm(hidden // heads)
        self.linear2 = nn.Linear(hidden + mlp_hidden, hidden)
        self.core = SDPACore()

    def first_layer(self, h: Tensor) -> tuple[Callable[[], tuple[Tensor, Tensor]], Tensor, Tensor]:
        """Of separate projections those of q and k are made where attention is."""
        if self.fused_qkv:
            q, k, v, inner = split_in_proportion(self.linear1(h), *self.widths)
            return lambda: (q, k), v, inner
        v, inner = split_in_proportion(self.v_mlp(h), *self.widths[2:])
        return lambda: (self.q_proj(h), self.k_proj(h)), v, inner

    def normalised(self, q_BLHD: Tensor, k_BLHD: Tensor) -> tuple[Tensor, Tensor]:
        q, k = self.norm(q_BLHD, k_BLHD)
        return q, k
