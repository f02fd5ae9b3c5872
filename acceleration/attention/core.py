"""Attention put together from parts: a kernel gives the output with its log-sum-exp, and gradients for a given one.

That pair is what lets attention over a long sequence be put together from attention over its parts: outputs are merged
by their log-sum-exps, and the gradient of a part needs the log-sum-exp of the whole (Milakov and Gimelshein,
arXiv:1805.02867; Dao, arXiv:2307.08691). Shapes are (B, L, H, Dh) for q and (B, S, H, Dh) for k and v; the log-sum-exp
is (B, H, L) in fp32 (fp64 for fp64 inputs). A query that may see no key has output 0 and log-sum-exp -inf.
"""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from acceleration.attention.kernels import Kernel, varlen
from acceleration.blocks import activation_checkpoint


def forward(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Run a kernel; what kernels cannot do alike (no key at all, a sample without one) is done here."""
    batch, length, heads, _ = q.shape
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    if q.numel() == 0 or k.shape[1] == 0:
        return torch.zeros_like(q), q.new_full((batch, heads, length), -math.inf, dtype=exact)
    if key_mask is None:
        return kernel.forward(q, k, v, None)
    out, lse = kernel.forward(q, k, v, key_mask | ~key_mask.any(dim=1, keepdim=True))
    blind = ~key_mask.any(dim=1)
    return out.masked_fill(blind[:, None, None, None], 0.0), lse.masked_fill(blind[:, None, None], -math.inf)


def backward(
    kernel: Kernel, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, key_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v for the attention of q over these keys, a part of all keys whose result is out, lse."""
    if q.numel() == 0 or k.shape[1] == 0:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    lse = lse.masked_fill(lse == -math.inf, math.inf)  # exp(score - inf): a query that saw nothing has no gradient
    if key_mask is None:
        return kernel.backward(grad, q, k, v, out, lse, None)
    sees = key_mask.any(dim=1)
    lse = lse.masked_fill(~sees[:, None, None], math.inf)
    return kernel.backward(grad, q, k, v, out, lse, key_mask | ~sees[:, None])


def merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Join the attention of the same queries over two sets of keys; both outputs in the type of ``lse``."""
    whole = torch.logaddexp(lse, part_lse)
    old, new = (_weight(x, whole) for x in (lse, part_lse))
    return out * old + part * new, whole


def _weight(lse: Tensor, whole: Tensor) -> Tensor:
    """(B, H, L) -> (B, L, H, 1): the share of a part in the whole; 0 where nothing was seen."""
    return torch.where(whole == -math.inf, 0.0, (lse - whole).exp()).transpose(1, 2)[..., None]


def attend(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
    """(B, L, H, Dh): differentiable attention by a kernel."""
    return _Attend.apply(q, k, v, key_mask, kernel)


class KernelCore(nn.Module):
    """Fills an attention slot with a kernel of this table."""

    def __init__(self, kernel: Kernel) -> None:
        super().__init__()
        self.kernel = kernel

    @torch.compiler.disable  # see compile.py
    def forward(
        self, q_BLHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor, *, key_mask: Tensor | None = None, context: Any = None
    ) -> Tensor:
        """See ``AttentionCore`` in opensora/models/base.py."""
        segments, packed = getattr(context, "segments", None), self.kernel.varlen
        if segments is None:
            return attend(self.kernel, q_BLHD, k_BLHD, v_BLHD, key_mask)
        if packed is None or key_mask is not None or q_BLHD.dtype not in varlen.DTYPES:
            return segments.apply(partial(attend, self.kernel), q_BLHD, k_BLHD, v_BLHD, key_mask)
        q, k, v = (segments.gather(x) for x in (q_BLHD, k_BLHD, v_BLHD))
        out = varlen.attend(packed, q, k, v, segments.ends, max(segments.lengths))
        return segments.scatter(out, q_BLHD.shape[0])


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, kernel: Kernel) -> Tensor:
        out, lse = activation_checkpoint.kept(lambda: forward(kernel, q, k, v, key_mask))
        ctx.save_for_backward(q, k, v, key_mask, out, lse)
        ctx.kernel = kernel
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, key_mask, out, lse = ctx.saved_tensors
        return *backward(ctx.kernel, grad, q, k, v, out, lse, key_mask), None, None
