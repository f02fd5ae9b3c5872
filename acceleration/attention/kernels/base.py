"""What an attention kernel is, and ways to make one of two, or of any differentiable attention.

Shapes are (B, L, H, Dh) for q and (B, S, H, Dh) for k and v; key masks are (B, S), True where attended, with at least
one key a sample (attention/core.py sees to it); the log-sum-exp is (B, H, L) in fp32, or fp64 for fp64 inputs.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from acceleration.attention.kernels.varlen import Varlen

Forward = Callable[[Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]
Backward = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor, Tensor]]


class Kernel(NamedTuple):
    """``forward(q, k, v, key_mask) -> (o, lse)``; ``backward(grad, q, k, v, o, lse, key_mask) -> (dq, dk, dv)``.

    Backward is for keys that are a part of all keys: o and lse are those of the whole.
    """

    forward: Forward
    backward: Backward
    varlen: Varlen | None = None  # None: samples that share a sequence go through it length by length


def either(first: Kernel, second: Kernel, fits: Callable[[Tensor, Tensor | None], bool]) -> Kernel:
    """``first`` where ``fits(q, key_mask)``, else ``second``."""

    def forward(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        return (first if fits(q, key_mask) else second).forward(q, k, v, key_mask)

    def backward(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, key_mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        return (first if fits(q, key_mask) else second).backward(grad, q, k, v, out, lse, key_mask)

    return Kernel(forward, backward, first.varlen or second.varlen)


def by_autograd(run: Forward) -> Kernel:
    """A kernel of a ``run`` that autograd can differentiate in output and log-sum-exp; backward runs it again.

    A whole o = sum of w_i o_i with w_i = exp(lse_i - lse) has the gradients w_i grad for a part's o_i, and
    w_i <grad, o_i - o> for its lse_i.
    """

    @torch.no_grad()
    def forward(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        return run(q, k, v, key_mask)

    def backward(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, key_mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        with torch.enable_grad():
            part, part_lse = run(q, k, v, key_mask)
        weight = (part_lse.detach() - lse).exp()  # (B, H, L)
        grad_part = grad * weight.transpose(1, 2)[..., None]
        grad_lse = weight * (grad * (part.detach() - out)).sum(dim=-1).transpose(1, 2)
        gradients = (grad_part.to(part.dtype), grad_lse.to(part_lse.dtype))
        dq, dk, dv = torch.autograd.grad((part, part_lse), (q, k, v), gradients)
        return dq, dk, dv

    return Kernel(forward, backward)


def heads_first(*tensors: Tensor) -> tuple[Tensor, ...]:
    """(B, L, H, Dh) -> (B, H, L, Dh)."""
    return tuple(x.transpose(1, 2) for x in tensors)


def bias(key_mask: Tensor | None, like: Tensor) -> Tensor | None:
    """(B, S) bool -> (B, 1, 1, S): 0 where attended, -inf elsewhere."""
    if key_mask is None:
        return None
    zeros = torch.zeros(key_mask.shape, dtype=like.dtype, device=like.device)
    return zeros.masked_fill(~key_mask, -math.inf)[:, None, None, :]
