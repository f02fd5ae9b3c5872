"""torch's own fused kernels, by the operators behind ``scaled_dot_product_attention``, which hides the log-sum-exp."""

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from acceleration.kernels.base import Kernel, bias, heads_first
from acceleration.kernels.plain import MATH

aten = torch.ops.aten


def _wide(*tensors: Tensor) -> tuple[Tensor, ...]:
    """torch's CPU kernel for bf16 takes ten times as long in backward as the one for fp32."""
    return tuple(x.float() if x.dtype == torch.bfloat16 else x for x in tensors)


def _cpu_forward(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    dtype = q.dtype
    q, k, v = heads_first(*_wide(q, k, v))
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=bias(key_mask, q))
    return out.transpose(1, 2).to(dtype), lse


def _cpu_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, key_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = q.dtype
    grad, q, k, v, out = heads_first(*_wide(grad, q, k, v, out))
    gradients = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, q, k, v, out, lse, 0.0, False, attn_mask=bias(key_mask, q)
    )
    dq, dk, dv = (x.transpose(1, 2).to(dtype) for x in gradients)
    return dq, dk, dv


def _cuda_forward(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Flash attention where it can, the memory-efficient kernel for masks and fp32; not run on a GPU yet."""
    if not _fits(q):
        return MATH.forward(q, k, v, key_mask)
    queries, keys, values = heads_first(q, k, v)
    if key_mask is None and _is_half(q):
        out, lse, *_ = aten._scaled_dot_product_flash_attention(queries, keys, values)
    else:
        out, lse, *_ = aten._scaled_dot_product_efficient_attention(
            queries, keys, values, _aligned_bias(key_mask, q), True
        )
    return out.transpose(1, 2), lse[..., : q.shape[1]]  # padded to its own alignment


def _cuda_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, key_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    if not _fits(q):
        return MATH.backward(grad, q, k, v, out, lse, key_mask)
    d, a, b, c, o = (x.contiguous() for x in heads_first(grad, q, k, v, out))
    if key_mask is None and _is_half(q):
        seed = offset = torch.zeros((), dtype=torch.uint64, device=q.device)  # no dropout: nothing was drawn
        gradients = aten._scaled_dot_product_flash_attention_backward(
            d, a, b, c, o, lse.contiguous(), None, None, q.shape[1], k.shape[1], 0.0, False, seed, offset
        )
    else:
        padded = pad(lse, (0, -lse.shape[-1] % 32), value=math.inf).contiguous()
        seed = offset = torch.zeros((), dtype=torch.int64, device=q.device)
        gradients = aten._scaled_dot_product_efficient_attention_backward(
            d, a, b, c, _aligned_bias(key_mask, q), o, padded, seed, offset, 0.0, [True, True, True, False]
        )[:3]
    dq, dk, dv = (x.transpose(1, 2) for x in gradients)
    return dq, dk, dv


def _cudnn_forward(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """cuDNN's kernel, for 16 bits without a mask; the rest as ``cuda``. Not run on a GPU yet."""
    if key_mask is not None or not _is_half(q) or not _fits(q):
        return _cuda_forward(q, k, v, key_mask)
    out, lse, *_ = aten._scaled_dot_product_cudnn_attention(*heads_first(q, k, v), None, True)
    return out.transpose(1, 2), lse[..., 0]  # (B, H, L, 1)


def _cudnn_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, key_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    if key_mask is not None or not _is_half(q) or not _fits(q):
        return _cuda_backward(grad, q, k, v, out, lse, key_mask)
    d, a, b, c, o = (x.contiguous() for x in heads_first(grad, q, k, v, out))
    seed = offset = torch.zeros((), dtype=torch.int64, device=q.device)  # no dropout: nothing was drawn
    gradients = aten._scaled_dot_product_cudnn_attention_backward(
        d, a, b, c, o, lse[..., None].contiguous(), seed, offset, None, None, None, q.shape[1], k.shape[1], 0.0, False
    )
    dq, dk, dv = (x.transpose(1, 2) for x in gradients)
    return dq, dk, dv


def _is_half(x: Tensor) -> bool:
    return x.dtype in (torch.bfloat16, torch.float16)


def _fits(x: Tensor) -> bool:
    """The fused kernels read 16 bytes at a time, and know no fp64."""
    return x.dtype != torch.float64 and x.shape[-1] * x.element_size() % 16 == 0


def _aligned_bias(key_mask: Tensor | None, q: Tensor) -> Tensor | None:
    """The bias over all queries and heads; the kernel wants rows that start at multiples of 16 elements."""
    flat = bias(key_mask, q)
    if key_mask is None or flat is None:
        return None
    batch, keys = key_mask.shape
    room = q.new_zeros(batch, 1, 1, -(-keys // 16) * 16)
    room[..., :keys] = flat
    return room[..., :keys].expand(batch, q.shape[2], q.shape[1], keys)


CPU = Kernel(_cpu_forward, _cpu_backward)
CUDA = Kernel(_cuda_forward, _cuda_backward)
CUDNN = Kernel(_cudnn_forward, _cudnn_backward)
