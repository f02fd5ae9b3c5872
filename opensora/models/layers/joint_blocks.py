"""Blocks of transformers whose streams of tokens, as text and image, attend to one another (MMDiT, arXiv 2403.03206).

First blocks in which every stream has weights of its own, then blocks that take all streams for one. What the layers
are called is left to each family: it says which of its modules are what (``JointStream``), or makes them by the names
that are used here (``JointSingleBlock``).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from opensora.models.layers.attention import attend
from opensora.models.layers.modulation import modulate, over_tokens
from opensora.models.layers.norm import plain_norm
from opensora.models.layers.rope import RopeLayout, RopeTable, apply_rope

Heads: TypeAlias = tuple[Tensor, Tensor, Tensor]  # q, k, v (B, L, H, Dh) each, q and k normalised


class Residuals(NamedTuple):
    """What a stream makes of what it has attended to."""

    out: nn.Module
    norm2: nn.Module
    mlp: nn.Module

    def __call__(self, x: Tensor, attended: Tensor, parts: Sequence[Tensor]) -> Tensor:
        """x, attended (B, L, D), six modulations -> (B, L, D)."""
        _, _, attention_gate, shift, scale, mlp_gate = parts
        x = torch.addcmul(x, attention_gate, self.out(attended))
        return torch.addcmul(x, mlp_gate, self.mlp(modulate(self.norm2(x), shift, scale)))


class JointStream(NamedTuple):
    """The layers of one stream in a block."""

    modulation: nn.Module  # to (shift, scale, gate) of attention, and of the MLP where there is one
    norm1: nn.Module
    project: Callable[[Tensor], Heads]  # (B, L, D) -> q, k, v
    update: Residuals | None  # None: the stream is read, not updated


def split_in_proportion(x: Tensor, *widths: int) -> tuple[Tensor, ...]:
    """Cut the last dim at ``widths``, or at the same share of each where a process holds a share of the layer."""
    share, rest = divmod(sum(widths), x.shape[-1])
    assert not rest, (x.shape, widths)
    return x.split([width // share for width in widths], dim=-1)


def attend_jointly(
    core: nn.Module,
    streams: Sequence[JointStream],
    tokens: Sequence[Tensor],
    vec: Tensor,
    rope: RopeTable,
    rope_layout: RopeLayout,
    *,
    key_mask: Tensor | None,
    context: Any,
    sample_of: Sequence[Tensor] | None,
) -> list[Tensor]:
    """Every stream behind attention over all of them, in this order, and behind its own MLP.

    Args:
        tokens: (B, L, D) of each stream; L may be 0.
        vec: (S, D), what modulates.
        rope: of the tokens of all streams.
        sample_of: (B, L) of each stream, the row of vec that a token is modulated by; None: sequence b by row b.
    """
    rows: Sequence[Tensor | None] = sample_of or [None] * len(streams)
    parts = [stream.modulation(vec, row) for stream, row in zip(streams, rows, strict=True)]

    def project() -> Heads:
        each = [
            stream.project(modulate(stream.norm1(x), *part[:2]))
            for stream, x, part in zip(streams, tokens, parts, strict=True)
        ]
        q_BLHD, k_BLHD, v_BLHD = (torch.cat(of_all, dim=1) for of_all in zip(*each, strict=True))
        return apply_rope(q_BLHD, rope, rope_layout), apply_rope(k_BLHD, rope, rope_layout), v_BLHD

    attended = attend(core, project, key_mask=key_mask, context=context).flatten(2)
    shares = attended.split([x.shape[1] for x in tokens], dim=1)
    found = zip(streams, tokens, shares, parts, strict=True)
    return [stream.update(x, share, part) if stream.update else x for stream, x, share, part in found]


class JointSingleBlock(nn.Module):
    """All streams as one; attention and MLP side by side behind one norm (ViT-22B, arXiv 2302.05442).

    A family makes ``modulation`` of three parts, ``pre_norm``, ``linear2``, ``core``, and what the two methods need.
    """

    modulation: nn.Module
    pre_norm: nn.Module
    linear2: nn.Linear
    core: nn.Module
    head_dim: int
    rope_layout: RopeLayout

    def first_layer(self, h: Tensor) -> tuple[Callable[[], tuple[Tensor, Tensor]], Tensor, Tensor]:
        """(B, L, D) -> what makes q and k (B, L, H Dh), v as these, and the inner layer of the MLP (B, L, mlp)."""
        raise NotImplementedError

    def normalised(self, q_BLHD: Tensor, k_BLHD: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys behind their norms."""
        raise NotImplementedError

    def forward(
        self,
        x: Tensor,
        vec: Tensor,
        rope: RopeTable,
        key_mask: Tensor | None = None,
        context: Any = None,
        sample_of: Tensor | None = None,
    ) -> Tensor:
        """x (B, L, D), vec (S, D) -> (B, L, D); ``sample_of`` (B, L) as in ``attend_jointly``."""
        x = x.to(self.linear2.weight.dtype)
        shift, scale, gate = self.modulation(vec, sample_of)
        pair, v, inner = self.first_layer(modulate(self.pre_norm(x), shift, scale))

        def project() -> Heads:
            q_BLHD, k_BLHD, v_BLHD = (part.unflatten(-1, (-1, self.head_dim)) for part in (*pair(), v))
            q_BLHD, k_BLHD = self.normalised(q_BLHD, k_BLHD)
            return apply_rope(q_BLHD, rope, self.rope_layout), apply_rope(k_BLHD, rope, self.rope_layout), v_BLHD

        o_BLHD = attend(self.core, project, key_mask=key_mask, context=context)
        joined = torch.cat((o_BLHD.flatten(2), gelu(inner, approximate="tanh")), dim=-1)
        return torch.addcmul(x, gate, self.linear2(joined))


class JointLastLayer(nn.Module):
    """Norm, modulation, projection: (B, N, D) -> (B, N, values)."""

    def __init__(self, hidden: int, values: int) -> None:
        super().__init__()
        self.norm_final = plain_norm(hidden)
        self.linear = nn.Linear(hidden, values)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden, 2 * hidden))

    def forward(self, x: Tensor, vec: Tensor, sample_of: Tensor | None = None) -> Tensor:
        """vec (S, D); ``sample_of`` (B, N) as in ``attend_jointly``."""
        dtype = self.linear.weight.dtype
        shift, scale = over_tokens(self.adaLN_modulation(vec.to(dtype)), 2, sample_of)
        return self.linear(modulate(self.norm_final(x.to(dtype)), shift, scale))
