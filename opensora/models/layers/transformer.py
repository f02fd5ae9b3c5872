"""Attention among tokens, attention to the text, MLP: the layers of DiT, PixArt and Open-Sora 1.x, named as there."""

from typing import Any

from torch import Tensor, nn

from opensora.models.layers.attention import SDPACore, attend
from opensora.models.layers.norm import HeadRMSNorm
from opensora.models.layers.rope import RopeTable, apply_rope


class Mlp(nn.Module):
    """Linear, GELU (tanh) or another function, Linear."""

    def __init__(self, in_dim: int, inner: int, out_dim: int, act: nn.Module | None = None) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_dim, inner)
        self.act = nn.GELU(approximate="tanh") if act is None else act
        self.fc2 = nn.Linear(inner, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class SelfAttention(nn.Module):
    """Attention among the tokens of a sequence, whatever axis of a clip it runs along.

    With tensor parallelism a process has some of the heads; nothing here knows how many.
    """

    def __init__(self, hidden: int, heads: int, *, qk_norm: bool = False, norm_after_rope: bool = False) -> None:
        """``norm_after_rope``: q and k are rotated before they are normalised, as Open-Sora 1.1 did."""
        super().__init__()
        self.head_dim = hidden // heads
        self.norm_after_rope = norm_after_rope
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.q_norm: nn.Module = HeadRMSNorm(self.head_dim) if qk_norm else nn.Identity()
        self.k_norm: nn.Module = HeadRMSNorm(self.head_dim) if qk_norm else nn.Identity()
        self.core = SDPACore()
        self.proj = nn.Linear(hidden, hidden)

    def forward(
        self, x: Tensor, *, rope: RopeTable | None = None, key_mask: Tensor | None = None, context: Any = None
    ) -> Tensor:
        """(B, L, D) -> (B, L, D). ``rope``: of interleaved pairs. ``key_mask`` (B, L) is True where a key counts."""

        def project() -> tuple[Tensor, Tensor, Tensor]:
            q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in self.qkv(x).chunk(3, dim=-1))
            if self.norm_after_rope:
                return self.q_norm(_rotated(q, rope)), self.k_norm(_rotated(k, rope)), v
            return _rotated(self.q_norm(q), rope), _rotated(self.k_norm(k), rope), v

        return self.proj(attend(self.core, project, key_mask=key_mask, context=context).flatten(2))


class CrossAttention(nn.Module):
    """Every token of a sample over the text of this sample, which is whole on every process.

    Text that ``mask`` hides is not attended to: that is attention within blocks of a sequence of all samples' texts.
    """

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.head_dim = hidden // heads
        self.q_linear = nn.Linear(hidden, hidden)
        self.kv_linear = nn.Linear(hidden, 2 * hidden)
        self.core = SDPACore()
        self.proj = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor, text: Tensor, mask: Tensor | None = None, context: Any = None) -> Tensor:
        """x (B, N, D) or (B, T, S, D), text (B, L, D), mask (B, L) bool -> as x."""
        sizes = x.shape[1:-1]
        tokens = x if x.ndim == 3 else x.flatten(1, 2)

        def project() -> tuple[Tensor, Tensor, Tensor]:
            q = self.q_linear(tokens).unflatten(-1, (-1, self.head_dim))
            k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in self.kv_linear(text).chunk(2, dim=-1))
            return q, k, v

        out = self.proj(attend(self.core, project, key_mask=mask, context=context).flatten(2))
        return out if x.ndim == 3 else out.unflatten(1, sizes)


def within_frames(attention: SelfAttention, x: Tensor, **given: Any) -> Tensor:
    """Attention among the places of every frame: (B, T, S, D) -> (B, T, S, D)."""
    return attention(x.flatten(0, 1), **given).unflatten(0, x.shape[:2])


def along_time(attention: SelfAttention, x: Tensor, **given: Any) -> Tensor:
    """Attention among the frames of every place: (B, T, S, D) -> (B, T, S, D)."""
    swapped = x.transpose(1, 2)
    return attention(swapped.flatten(0, 1), **given).unflatten(0, swapped.shape[:2]).transpose(1, 2)


def _rotated(x: Tensor, rope: RopeTable | None) -> Tensor:
    return x if rope is None else apply_rope(x, rope, "interleaved")
