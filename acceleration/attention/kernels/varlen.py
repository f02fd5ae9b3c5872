"""Attention kernels that take samples of any lengths at once, laid end to end: (T, H, Dh), in fp16 or bf16.

As in ``base.py`` each gives its output with the log-sum-exp, here (H, T), and gradients for a given one.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from acceleration.blocks import activation_checkpoint

aten = torch.ops.aten
DTYPES = (torch.bfloat16, torch.float16)


class Varlen(NamedTuple):
    """``forward(q, k, v, ends, longest) -> (o, lse)`` and ``backward(grad, q, k, v, o, lse, ends, longest)``.

    ``ends`` (samples + 1,) int32: where each sample begins, and the end of the last; ``longest``: tokens of that with
    most. Backward gives (dq, dk, dv).
    """

    forward: Callable[[Tensor, Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]]
    backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor, Tensor]]


def attend(kernel: Varlen, q: Tensor, k: Tensor, v: Tensor, ends: Tensor, longest: int) -> Tensor:
    """(T, H, Dh): differentiable attention within each sample."""
    return _Attend.apply(q, k, v, ends, longest, kernel)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, ends: Tensor, longest: int, kernel: Varlen) -> Tensor:
        out, lse = activation_checkpoint.kept(lambda: kernel.forward(q, k, v, ends, longest))
        ctx.save_for_backward(q, k, v, ends, out, lse)
        ctx.kernel, ctx.longest = kernel, longest
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, ends, out, lse = ctx.saved_tensors
        return *ctx.kernel.backward(grad.contiguous(), q, k, v, out, lse, ends, ctx.longest), None, None, None


def _cuda_forward(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """torch's flash attention; not run on a GPU yet."""
    out, lse, *_ = aten._flash_attention_forward(q, k, v, ends, ends, longest, longest, 0.0, False, False)
    return out, lse


def _cuda_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, ends: Tensor, longest: int
) -> tuple[Tensor, Tensor, Tensor]:
    drawn = torch.zeros(2, dtype=torch.uint64, device=q.device)  # no dropout: nothing was
    unused = torch.empty(0, device=q.device)
    dq, dk, dv = aten._flash_attention_backward(
        grad, q, k, v, out, lse, ends, ends, longest, longest, 0.0, False, drawn, unused
    )
    return dq, dk, dv


CUDA = Varlen(_cuda_forward, _cuda_backward)
