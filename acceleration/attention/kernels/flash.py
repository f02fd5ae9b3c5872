"""The package flash-attn: 2 on any recent GPU, 3 on Hopper. Key masks go to torch's kernels. Not run on a GPU yet."""

import torch
from torch import Tensor

from acceleration.attention.kernels.base import Kernel, either
from acceleration.attention.kernels.sdpa import CUDA
from acceleration.attention.kernels.varlen import Varlen


def _forward2(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    from flash_attn.flash_attn_interface import _flash_attn_forward as run

    scale, softcap, alibi = q.shape[-1] ** -0.5, 0.0, None
    out, lse, *_ = run(q.contiguous(), k.contiguous(), v.contiguous(), 0.0, scale, False, -1, -1, softcap, alibi, False)
    return out, lse


def _backward2(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, key_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    from flash_attn.flash_attn_interface import _flash_attn_backward as run

    d, a, b, c, o, le = (x.contiguous() for x in (grad, q, k, v, out, lse))
    dq, dk, dv = (torch.empty_like(x) for x in (a, b, c))
    scale, softcap, alibi, deterministic = q.shape[-1] ** -0.5, 0.0, None, False
    run(d, a, b, c, o, le, dq, dk, dv, 0.0, scale, False, -1, -1, softcap, alibi, deterministic, None)
    return dq, dk, dv


def _varlen_forward2(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    from flash_attn.flash_attn_interface import _flash_attn_varlen_forward as run

    out, lse, *_ = run(q, k, v, ends, ends, longest, longest, 0.0, q.shape[-1] ** -0.5, False)
    return out, lse


def _varlen_backward2(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, ends: Tensor, longest: int
) -> tuple[Tensor, Tensor, Tensor]:
    from flash_attn.flash_attn_interface import _flash_attn_varlen_backward as run

    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    lengths, scale = (ends, ends, longest, longest), q.shape[-1] ** -0.5
    run(grad, q, k, v, out, lse, dq, dk, dv, *lengths, 0.0, scale, False, -1, -1, 0.0, None, False)
    return dq, dk, dv


def _forward3(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    from flash_attn_interface import _flash_attn_forward as run

    out, lse, *_ = run(q.contiguous(), k.contiguous(), v.contiguous(), softmax_scale=q.shape[-1] ** -0.5)
    return out, lse


def _backward3(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, key_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    from flash_attn_interface import _flash_attn_backward as run

    d, a, b, c, o, le = (x.contiguous() for x in (grad, q, k, v, out, lse))
    dq, dk, dv = (torch.empty_like(x) for x in (a, b, c))
    run(d, a, b, c, o, le, dq=dq, dk=dk, dv=dv, softmax_scale=q.shape[-1] ** -0.5)
    return dq, dk, dv


def _unmasked(q: Tensor, key_mask: Tensor | None) -> bool:
    return key_mask is None


FLASH2 = either(Kernel(_forward2, _backward2, Varlen(_varlen_forward2, _varlen_backward2)), CUDA, _unmasked)
FLASH3 = either(Kernel(_forward3, _backward3), CUDA, _unmasked)
