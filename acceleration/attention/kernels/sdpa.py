"""torch's own fused kernels, by the operators behind ``scaled_dot_product_attention``, which hides the log-sum-exp."""

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from acceleration.attention.kernels import varlen
from acceleration.attention.kernels.base import Kernel, bias, either, heads_first
from acceleration.attention.kernels.reference import MATH

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


def _flash_forward(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    out, lse, *_ = aten._scaled_dot_product_flash_attention(*heads_first(q, k, v))
    return out.transpose(1, 2), lse[..., : q.shape[1]]  # padded to its own alignment


def _flash_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, key_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    d, a, b, c, o = _contiguous(grad, q, k, v, out)
    seed = offset = torch.zeros((), dtype=torch.uint64, device=q.device)  # no dropout: nothing was drawn
    gradients = aten._scaled_dot_product_flash_attention_backward(
        d, a, b, c, o, lse.contiguous(), None, None, q.shape[1], k.shape[1], 0.0, False, seed, offset
    )
    dq, dk, dv = (x.transpose(1, 2) for x in gradients)
    return dq, dk, dv


def _efficient_forward(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    mask = _aligned_bias(key_mask, q)
    out, lse, *_ = aten._scaled_dot_product_efficient_attention(*heads_first(q, k, v), mask, True)
    return out.transpose(1, 2), lse[..., : q.shape[1]]  # padded to its own alignment


def _efficient_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, key_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    d, a, b, c, o = _contiguous(grad, q, k, v, out)
    padded = pad(lse, (0, -lse.shape[-1] % 32), value=math.inf).contiguous()
    seed = offset = torch.zeros((), dtype=torch.int64, device=q.device)
    gradients = aten._scaled_dot_product_efficient_attention_backward(
        d, a, b, c, _aligned_bias(key_mask, q), o, padded, seed, offset, 0.0, [True, True, True, False]
    )
    dq, dk, dv = (x.transpose(1, 2) for x in gradients[:3])
    return dq, dk, dv


def _cudnn_forward(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    out, lse, *_ = aten._scaled_dot_product_cudnn_attention(*heads_first(q, k, v), None, True)
    return out.transpose(1, 2), lse[..., 0]  # (B, H, L, 1)


def _cudnn_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, key_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    d, a, b, c, o = _contiguous(grad, q, k, v, out)
    seed = offset = torch.zeros((), dtype=torch.int64, device=q.device)
    gradients = aten._scaled_dot_product_cudnn_attention_backward(
        d, a, b, c, o, lse[..., None].contiguous(), seed, offset, None, None, None, q.shape[1], k.shape[1], 0.0, False
    )
    dq, dk, dv = (x.transpose(1, 2) for x in gradients)
    return dq, dk, dv


def _contiguous(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.contiguous() for x in heads_first(*tensors))


def _unmasked_half(q: Tensor, key_mask: Tensor | None) -> bool:
    return key_mask is None and q.dtype in (torch.bfloat16, torch.float16)


def _aligned(q: Tensor, key_mask: Tensor | None) -> bool:
    """The fused kernels read 16 bytes at a time, and know no fp64."""
    return q.dtype != torch.float64 and q.shape[-1] * q.element_size() % 16 == 0


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
# None of these has been run on a GPU yet.
_FLASH = Kernel(_flash_forward, _flash_backward, varlen.CUDA)
_EFFICIENT = Kernel(_efficient_forward, _efficient_backward)
CUDA = either(either(_FLASH, _EFFICIENT, _unmasked_half), MATH, _aligned)
CUDNN = either(
    Kernel(_cudnn_forward, _cudnn_backward), CUDA, lambda q, mask: _unmasked_half(q, mask) and _aligned(q, mask)
)
