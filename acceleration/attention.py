"""Attention kernels by name: each gives the output with its log-sum-exp, and gradients for a given log-sum-exp.

That pair is what lets attention over a long sequence be put together from attention over its parts: outputs are merged
by their log-sum-exps, and the gradient of a part needs the log-sum-exp of the whole (Milakov and Gimelshein,
arXiv:1805.02867; Dao, arXiv:2307.08691). Shapes are (B, L, H, Dh) for q and (B, S, H, Dh) for k and v; the log-sum-exp
is (B, H, L) in fp32 (fp64 for fp64 inputs). A query that may see no key has output 0 and log-sum-exp -inf.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from acceleration import recompute, varlen
from acceleration.varlen import Varlen

aten = torch.ops.aten


class Kernel(NamedTuple):
    """``forward(q, k, v, key_mask) -> (o, lse)``; ``backward(grad, q, k, v, o, lse, key_mask) -> (dq, dk, dv)``."""

    forward: Callable[[Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]
    backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor, Tensor]]
    varlen: Varlen | None = None  # None: samples that share a sequence go through it length by length


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
        out, lse = recompute.kept(lambda: forward(kernel, q, k, v, key_mask))
        ctx.save_for_backward(q, k, v, key_mask, out, lse)
        ctx.kernel = kernel
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, key_mask, out, lse = ctx.saved_tensors
        return *backward(ctx.kernel, grad, q, k, v, out, lse, key_mask), None, None


def _heads_first(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.transpose(1, 2) for x in tensors)


def _bias(key_mask: Tensor | None, like: Tensor) -> Tensor | None:
    """(B, S) bool -> (B, 1, 1, S): 0 where attended, -inf elsewhere."""
    if key_mask is None:
        return None
    zeros = torch.zeros(key_mask.shape, dtype=like.dtype, device=like.device)
    return zeros.masked_fill(~key_mask, -math.inf)[:, None, None, :]


def _math_forward(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    scores, values = _scores(q, k, key_mask), v.transpose(1, 2).to(_exact(q))
    lse = scores.logsumexp(dim=-1)  # (B, H, L)
    return ((scores - lse[..., None]).exp() @ values).transpose(1, 2).to(q.dtype), lse


def _math_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, key_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    exact = _exact(q)
    dout, queries, keys, values, o = (x.transpose(1, 2).to(exact) for x in (grad, q, k, v, out))
    p = (_scores(q, k, key_mask) - lse[..., None]).exp()  # (B, H, L, S)
    dscores = p * (dout @ values.mT - (dout * o).sum(dim=-1, keepdim=True)) / math.sqrt(q.shape[-1])
    dq, dk, dv = dscores @ keys, dscores.mT @ queries, p.mT @ dout
    return dq.transpose(1, 2).to(q.dtype), dk.transpose(1, 2).to(k.dtype), dv.transpose(1, 2).to(v.dtype)


def _exact(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _scores(q: Tensor, k: Tensor, key_mask: Tensor | None) -> Tensor:
    exact = _exact(q)
    scores = q.transpose(1, 2).to(exact) @ k.transpose(1, 2).to(exact).mT / math.sqrt(q.shape[-1])
    return scores if key_mask is None else scores.masked_fill(~key_mask[:, None, None, :], -math.inf)


def _wide(*tensors: Tensor) -> tuple[Tensor, ...]:
    """torch's CPU kernel for bf16 takes ten times as long in backward as the one for fp32."""
    return tuple(x.float() if x.dtype == torch.bfloat16 else x for x in tensors)


def _cpu_forward(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    dtype = q.dtype
    q, k, v = _heads_first(*_wide(q, k, v))
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=_bias(key_mask, q))
    return out.transpose(1, 2).to(dtype), lse


def _cpu_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, key_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = q.dtype
    grad, q, k, v, out = _heads_first(*_wide(grad, q, k, v, out))
    gradients = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, q, k, v, out, lse, 0.0, False, attn_mask=_bias(key_mask, q)
    )
    dq, dk, dv = (x.transpose(1, 2).to(dtype) for x in gradients)
    return dq, dk, dv


def _cuda_forward(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Flash attention where it can, the memory-efficient kernel for masks and fp32; not run on a GPU yet."""
    heads_first = _heads_first(q, k, v)
    if key_mask is None and q.dtype in (torch.bfloat16, torch.float16):
        out, lse, *_ = aten._scaled_dot_product_flash_attention(*heads_first)
    else:
        bias = _aligned_bias(key_mask, q)
        out, lse, *_ = aten._scaled_dot_product_efficient_attention(*heads_first, bias, True)
    return out.transpose(1, 2), lse[..., : q.shape[1]]  # padded to its own alignment


def _cuda_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, key_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    d, a, b, c, o = (x.contiguous() for x in _heads_first(grad, q, k, v, out))
    seed = offset = torch.zeros((), dtype=torch.uint64, device=q.device)  # no dropout: nothing was drawn
    if key_mask is None and q.dtype in (torch.bfloat16, torch.float16):
        gradients = aten._scaled_dot_product_flash_attention_backward(
            d, a, b, c, o, lse.contiguous(), None, None, q.shape[1], k.shape[1], 0.0, False, seed, offset
        )
    else:
        padded = torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32), value=math.inf).contiguous()
        seed = offset = torch.zeros((), dtype=torch.int64, device=q.device)
        gradients = aten._scaled_dot_product_efficient_attention_backward(
            d, a, b, c, _aligned_bias(key_mask, q), o, padded, seed, offset, 0.0, [True, True, True, False]
        )[:3]
    dq, dk, dv = (x.transpose(1, 2) for x in gradients)
    return dq, dk, dv


def _aligned_bias(key_mask: Tensor | None, q: Tensor) -> Tensor | None:
    """The bias over all queries and heads; the kernel wants rows that start at multiples of 16 elements."""
    bias = _bias(key_mask, q)
    if key_mask is None or bias is None:
        return None
    batch, keys = key_mask.shape
    room = q.new_zeros(batch, 1, 1, -(-keys // 16) * 16)
    room[..., :keys] = bias
    return room[..., :keys].expand(batch, q.shape[2], q.shape[1], keys)


def _flash_attn_forward(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The package flash-attn 2; masks go to torch's kernel. Not run on a GPU yet."""
    if key_mask is not None:
        return _cuda_forward(q, k, v, key_mask)
    from flash_attn.flash_attn_interface import _flash_attn_forward as run

    out, lse, *_ = run(
        q.contiguous(), k.contiguous(), v.contiguous(), 0.0, q.shape[-1] ** -0.5, False, -1, -1, 0.0, None, False
    )
    return out, lse


def _flash_attn_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, key_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    if key_mask is not None:
        return _cuda_backward(grad, q, k, v, out, lse, key_mask)
    from flash_attn.flash_attn_interface import _flash_attn_backward as run

    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    run(
        grad.contiguous(),
        q,
        k,
        v,
        out.contiguous(),
        lse.contiguous(),
        dq,
        dk,
        dv,
        0.0,
        q.shape[-1] ** -0.5,
        False,
        -1,
        -1,
        0.0,
        None,
        False,
        None,
    )
    return dq, dk, dv


def _flash_attn_varlen_forward(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """Not run on a GPU yet."""
    from flash_attn.flash_attn_interface import _flash_attn_varlen_forward as run

    out, lse, *_ = run(q, k, v, ends, ends, longest, longest, 0.0, q.shape[-1] ** -0.5, False)
    return out, lse


def _flash_attn_varlen_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, ends: Tensor, longest: int
) -> tuple[Tensor, Tensor, Tensor]:
    from flash_attn.flash_attn_interface import _flash_attn_varlen_backward as run

    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    lengths, scale = (ends, ends, longest, longest), q.shape[-1] ** -0.5
    run(grad, q, k, v, out, lse, dq, dk, dv, *lengths, 0.0, scale, False, -1, -1, 0.0, None, False)
    return dq, dk, dv


KERNELS = {
    "math": Kernel(_math_forward, _math_backward),
    "cpu": Kernel(_cpu_forward, _cpu_backward),
    "cuda": Kernel(_cuda_forward, _cuda_backward, varlen.CUDA),
    "flash_attn": Kernel(
        _flash_attn_forward, _flash_attn_backward, Varlen(_flash_attn_varlen_forward, _flash_attn_varlen_backward)
    ),
}


def kernel_for(name: str, device: torch.device) -> Kernel:
    """The kernel that ``parallel.attention`` names; ``auto`` is torch's own for the device."""
    if name == "auto":
        name = device.type if device.type in KERNELS else "math"
    return KERNELS[name]
