"""The two kinds of block of HunyuanVideo. Parameter names are those of its files."""

from collections.abc import Callable
from typing import Any

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
from opensora.models.layers.modulation import modulate, over_tokens
from opensora.models.layers.norm import HeadRMSNorm, plain_norm
from opensora.models.layers.rope import RopeTable
from opensora.models.layers.transformer import Mlp


class PatchEmbed(nn.Module):
    """Latents of a token, (c, pt, ph, pw), to the hidden size: the published convolution over patches as a product."""

    def __init__(self, values: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(values, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x.to(self.proj.weight.dtype))


class Modulation(nn.Module):
    """(S, D) -> ``parts`` tensors, in the order (shift, scale, gate), (shift, scale, gate); see ``over_tokens``."""

    def __init__(self, hidden: int, parts: int) -> None:
        super().__init__()
        self.parts = parts
        self.act = nn.SiLU()
        self.linear = nn.Linear(hidden, parts * hidden)

    def forward(self, vec: Tensor, sample_of: Tensor | None = None) -> tuple[Tensor, ...]:
        return over_tokens(self.linear(self.act(vec.to(self.linear.weight.dtype))), self.parts, sample_of)


class DoubleBlock(nn.Module):
    """Text and image with weights of their own, joined in one attention."""

    def __init__(self, hidden: int, heads: int, mlp_hidden: int) -> None:
        super().__init__()
        self.head_dim = hidden // heads
        self.img_mod: Modulation
        self.img_norm1: nn.Module
        for stream in ("img", "txt"):
            layers = {
                "mod": Modulation(hidden, parts=6),
                "norm1": plain_norm(hidden),
                "attn_qkv": nn.Linear(hidden, 3 * hidden),
                "attn_q_norm": HeadRMSNorm(self.head_dim),
                "attn_k_norm": HeadRMSNorm(self.head_dim),
                "attn_proj": nn.Linear(hidden, hidden),
                "norm2": plain_norm(hidden),
                "mlp": Mlp(hidden, mlp_hidden, hidden),
            }
            for name, layer in layers.items():
                self.add_module(f"{stream}_{name}", layer)
        self.core = SDPACore()

    def _stream(self, name: str) -> JointStream:
        def layer(part: str) -> Any:
            return getattr(self, f"{name}_{part}")

        def project(x: Tensor) -> Heads:
            q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in layer("attn_qkv")(x).chunk(3, dim=-1))
            return layer("attn_q_norm")(q), layer("attn_k_norm")(k), v

        update = Residuals(layer("attn_proj"), layer("norm2"), layer("mlp"))
        return JointStream(layer("mod"), layer("norm1"), project, update)

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
        """img (B, N, D), txt (B, L, D), vec (S, D) -> img, txt of the same shapes; N or L may be 0.

        ``rope`` and ``key_mask`` (B, L + N) are of text, then image. ``sample_of`` (B, L), (B, N): the row of vec that
        a token is modulated by; None: sequence b by row b.
        """
        dtype = self.img_mod.linear.weight.dtype
        txt, img = attend_jointly(
            self.core,
            (self._stream("txt"), self._stream("img")),
            (txt.to(dtype), img.to(dtype)),
            vec,
            rope,
            "interleaved",
            key_mask=key_mask,
            context=context,
            sample_of=sample_of,
        )
        return img, txt

    def modulated(self, img: Tensor, vec: Tensor, img_rows: Tensor | None = None) -> Tensor:
        """(B, N, D), the image tokens that attention starts from, before any projection; vec and rows as in forward."""
        shift, scale, *_ = self.img_mod(vec, img_rows)
        return modulate(self.img_norm1(img.to(self.img_mod.linear.weight.dtype)), shift, scale)


class SingleBlock(JointSingleBlock):
    """Text and image as one stream; attention and MLP side by side behind one norm."""

    def __init__(self, hidden: int, heads: int, mlp_hidden: int) -> None:
        super().__init__()
        self.head_dim, self.rope_layout = hidden // heads, "interleaved"
        self.widths = (hidden, hidden, hidden, mlp_hidden)  # q, k, v and the MLP's inner layer
        self.modulation = Modulation(hidden, parts=3)
        self.pre_norm = plain_norm(hidden)
        self.linear1 = nn.Linear(hidden, sum(self.widths))
        self.q_norm, self.k_norm = HeadRMSNorm(self.head_dim), HeadRMSNorm(self.head_dim)
        self.linear2 = nn.Linear(hidden + mlp_hidden, hidden)
        self.core = SDPACore()

    def first_layer(self, h: Tensor) -> tuple[Callable[[], tuple[Tensor, Tensor]], Tensor, Tensor]:
        q, k, v, inner = split_in_proportion(self.linear1(h), *self.widths)
        return lambda: (q, k), v, inner

    def normalised(self, q_BLHD: Tensor, k_BLHD: Tensor) -> tuple[Tensor, Tensor]:
        return self.q_norm(q_BLHD), self.k_norm(k_BLHD)
