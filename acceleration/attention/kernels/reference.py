"""Attention as it is written in a book; in fp32 at least, and fp64 for fp64. What the others are compared with."""

import math

import torch
from torch import Tensor

from acceleration.attention.kernels.base import Kernel


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


MATH = Kernel(_math_forward, _math_backward)
