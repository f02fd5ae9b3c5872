"""Differentiable exchanges between the processes of one axis; every one adds its bytes to the axis.

Sizes may differ between processes, and may be zero. The backward of an exchange is the reverse exchange, so sums of
shares stay sums of shares: nothing here divides. Bytes are those this process sends when every collective is carried
out at its lower bound (an all-reduce as a reduce-scatter and an all-gather), whatever algorithm a backend prefers.

Meta tensors get their shapes and are counted, but nothing is sent: that is how a layout is planned.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from acceleration.distributed.comm_timer import WAITING
from acceleration.distributed.mesh import Axis


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
    if not x.is_meta:
        with WAITING.on(f"all_gather over {axis.name}"):
            dist.all_gather(received, padded, group=axis.group)
    axis.bytes_sent += nbytes(padded) * (axis.degree - 1)
    parts = [part[:size] for part, size in zip(received, sizes, strict=True)]
    return torch.cat(parts).movedim(0, dim).contiguous()


def all_reduce_(x: Tensor, axis: Axis) -> Tensor:
    """Sum ``x`` over the axis, in place. Not differentiable."""
    if axis.degree > 1 and x.numel():
        if not x.is_meta:
            with WAITING.on(f"all_reduce over {axis.name}"):
                dist.all_reduce(x, group=axis.group)
        count_all_reduce(x, axis)
    return x


def count_all_reduce(x: Tensor, axis: Axis) -> None:
    """Add the bytes of an all-reduce of ``x`` that somebody else carries out."""
    axis.bytes_sent += 2 * nbytes(x) * (axis.degree - 1) // axis.degree


@torch.compiler.disable  # see compile.py
def sum_shares(x: Tensor, axis: Axis) -> Tensor:
    """Each process's share -> the sum, on every process; the gradient, the same everywhere, is passed on."""
    return x if axis.degree == 1 else _SumShares.apply(x, axis)


@torch.compiler.disable  # see compile.py
def share_out(x: Tensor, axis: Axis) -> Tensor:
    """What every process holds alike, for each to use in its own way: backward sums the gradients of all uses."""
    return x if axis.degree == 1 else _ShareOut.apply(x, axis)


@torch.compiler.disable  # see compile.py
def join(x: Tensor, sizes: Sequence[int], axis: Axis) -> Tensor:
    """Concatenate along the last dim; the gradient, the same everywhere, is cut again."""
    return x if axis.degree == 1 else _Join.apply(x, tuple(sizes), axis)


class Shift:
    """One tensor on its way to the next process of the axis, while another comes from the previous one."""

    def __init__(self, x: Tensor, shape: Sequence[int], axis: Axis, *, tag: int = 0) -> None:
        """Start. ``x``: contiguous, not to be written before ``wait``; ``shape``: of what comes."""
        assert x.is_contiguous()
        self._x, self._out = x, x.new_empty(tuple(shape))
        self._axis = axis
        self._pending: list[dist.Work] = []
        if x.is_meta:
            axis.bytes_sent += nbytes(x)
            return
        assert axis.group is not None
        after, before = ((axis.rank + hop) % axis.degree for hop in (1, -1))
        peer = dist.get_process_group_ranks(axis.group)
        transfers = []
        if x.numel():
            transfers.append(dist.P2POp(dist.isend, x, peer[after], axis.group, tag))
            axis.bytes_sent += nbytes(x)
        if self._out.numel():
            transfers.append(dist.P2POp(dist.irecv, self._out, peer[before], axis.group, tag))
        if transfers:
            self._pending = dist.batch_isend_irecv(transfers)

    def wait(self) -> Tensor:
        """What came."""
        with WAITING.on(f"shift along {self._axis.name}"):
            for work in self._pending:
                work.wait()
        return self._out


def nbytes(x: Tensor) -> int:
    """Bytes of the values of ``x``."""
    return x.numel() * x.element_size()


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, send: tuple[int, ...], receive: tuple[int, ...], axis: Axis) -> Tensor:
        ctx.send, ctx.receive, ctx.axis = send, receive, axis
        return _exchange(x, send, receive, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchange(grad, ctx.receive, ctx.send, ctx.axis), None, None, None


class _SumShares(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        return all_reduce_(x.contiguous().clone(), axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _ShareOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return x.detach()  # no view of x, which would keep it

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_reduce_(grad.contiguous().clone(), ctx.axis), None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: tuple[int, ...], axis: Axis) -> Tensor:
        ctx.sizes, ctx.axis = sizes, axis
        return all_gather(x, x.dim() - 1, sizes, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        start = sum(ctx.sizes[: ctx.axis.rank])
        return grad.narrow(-1, start, ctx.sizes[ctx.axis.rank]).contiguous(), None, None


def _exchange(x: Tensor, send: tuple[int, ...], receive: tuple[int, ...], axis: Axis) -> Tensor:
    # Contiguous before empty_like: gloo writes wrong data into a non-contiguous output without an error.
    x = x.contiguous()
    out = x.new_empty((sum(receive), *x.shape[1:]))
    if not x.is_meta:
        with WAITING.on(f"all_to_all over {axis.name}"):
            dist.all_to_all_single(out, x, list(receive), list(send), group=axis.group)
    row_bytes = x.element_size() * (x[0].numel() if len(x) else 0)
    axis.bytes_sent += (len(x) - send[axis.rank]) * row_bytes
    return out
