"""Differentiable exchanges between the processes of one axis; every one adds its bytes to the axis.

Sizes may differ between processes, and may be zero. The backward of an exchange is the reverse exchange, so sums of
shares stay sums of shares: nothing here divides.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from acceleration.mesh import Axis


def all_to_all(x: Tensor, send: Sequence[int], receive: Sequence[int], axis: Axis) -> Tensor:
    """(sum(send), ...) -> (sum(receive), ...): ``send[j]`` rows of ``x`` go to peer j, ``receive[j]`` come from it."""
    return _AllToAll.apply(x, tuple(send), tuple(receive), axis)


def all_gather(x: Tensor, dim: int, sizes: Sequence[int], axis: Axis) -> Tensor:
    """Concatenate every process's ``x`` along ``dim``, where process j holds ``sizes[j]``. Not differentiable."""
    if axis.degree == 1:
        return x
    # Equal parts on the wire (gloo knows no uneven all-gather), the padding cut off on arrival.
    longest = max(sizes)
    padded = x.new_zeros((longest, *x.movedim(dim, 0).shape[1:]))
    padded[: x.shape[dim]] = x.detach().movedim(dim, 0)
    received = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(received, padded, group=axis.group)
    axis.bytes_sent += padded.numel() * padded.element_size() * (axis.degree - 1)
    parts = [part[:size] for part, size in zip(received, sizes, strict=True)]
    return torch.cat(parts).movedim(0, dim).contiguous()


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, send: tuple[int, ...], receive: tuple[int, ...], axis: Axis) -> Tensor:
        ctx.send, ctx.receive, ctx.axis = send, receive, axis
        return _exchange(x, send, receive, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchange(grad, ctx.receive, ctx.send, ctx.axis), None, None, None


def _exchange(x: Tensor, send: tuple[int, ...], receive: tuple[int, ...], axis: Axis) -> Tensor:
    # Contiguous before empty_like: gloo writes wrong data into a non-contiguous output without an error.
    x = x.contiguous()
    out = x.new_empty((sum(receive), *x.shape[1:]))
    dist.all_to_all_single(out, x, list(receive), list(send), group=axis.group)
    row_bytes = x.element_size() * (x[0].numel() if len(x) else 0)
    axis.bytes_sent += (len(x) - send[axis.rank]) * row_bytes
    return out
