"""Attention between queries, keys and values that are ready: no weights, no positions.

Every attention layer owns one core as a child module named ``core``. A core is the only place where tokens meet, so
whatever spreads tokens over processes replaces this module and nothing else.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from opensora.models.base import Segments


def attend(
    core: nn.Module,
    project: Callable[[], tuple[Tensor, Tensor, Tensor]],
    *,
    key_mask: Tensor | None,
    context: Any,
    **more: Any,
) -> Tensor:
    """What a core makes of the queries, keys and values of ``project()``, which are not made where it gives again what
    it gave before (``sampling/caches/attention.py``). ``more``: what cores of this kind are given beside."""
    kept: Callable[[], Tensor | None] | None = getattr(core, "kept", None)
    if kept is not None and (output := kept()) is not None:
        return output
    attended: Tensor = core(*project(), key_mask=key_mask, context=context, **more)
    return attended


class SDPACore(nn.Module):
    """Full attention by torch's fused kernels."""

    def forward(
        self, q_BLHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor, *, key_mask: Tensor | None = None, context: Any = None
    ) -> Tensor:
        """(B, L, H, Dh) queries over (B, S, H, Dh) keys and values -> (B, L, H, Dh).

        ``key_mask`` (B, S) is True where a key may be attended. A sample with no such key gets zeros, with zero
        gradients to q, k and v (a softmax over nothing is NaN in some kernels, in backward too). With
        ``context.segments`` each sample of a sequence attends to itself alone.
        """
        segments = getattr(context, "segments", None)
        if segments is None:
            return _attend(q_BLHD, k_BLHD, v_BLHD, key_mask)
        return _within(segments, q_BLHD, k_BLHD, v_BLHD, key_mask)


@torch.compiler.disable  # segments have other lengths in every micro-batch: each would be a graph of its own
def _within(segments: Segments, q_BLHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor, key_mask: Tensor | None) -> Tensor:
    return segments.apply(_attend, q_BLHD, k_BLHD, v_BLHD, key_mask)


def _attend(q_BLHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor, key_mask: Tensor | None) -> Tensor:
    if k_BLHD.shape[1] == 0:
        return q_BLHD * 0 + (k_BLHD + v_BLHD).sum(dim=1, keepdim=True)  # zeros in the graph of q, k and v
    mask = any_key = None
    if key_mask is not None:
        any_key = key_mask.any(dim=1)[:, None]  # (B, 1)
        mask = (key_mask | ~any_key)[:, None, None, :]  # (B, 1, 1, S)
    dtype = v_BLHD.dtype
    if v_BLHD.device.type == "cpu" and dtype == torch.bfloat16:
        # torch's CPU kernel for bf16 takes ten times as long in backward as the one for fp32.
        q_BLHD, k_BLHD, v_BLHD = q_BLHD.float(), k_BLHD.float(), v_BLHD.float()
    o_BLHD = scaled_dot_product_attention(
        q_BLHD.transpose(1, 2), k_BLHD.transpose(1, 2), v_BLHD.transpose(1, 2), attn_mask=mask
    )
    o_BLHD = o_BLHD.transpose(1, 2).to(dtype)
    return o_BLHD if any_key is None else o_BLHD.masked_fill(~any_key[:, :, None, None], 0.0)
