"""Ring attention: queries stay, keys and values pass from process to process (arXiv:2310.01889).

Outputs over parts are merged by their log-sum-exps. While a process works on one part, the next is on its way. Backward
passes keys and values around once more, and their gradients one step behind, until they are home. Per process and layer
forward sends the keys and values of every part but one: 2 * B * N * D * (p-1)/p elements for N tokens in all; backward
sends as many again, and 2 * B * N * D elements of gradients, in fp32 (fp64 for fp64 inputs).
"""

from typing import Any

import torch
from torch import Tensor, nn

from acceleration.attention import core
from acceleration.attention.kernels import Kernel
from acceleration.blocks import activation_checkpoint
from acceleration.distributed import collectives
from acceleration.distributed.collectives import Shift
from acceleration.distributed.mesh import Axis
from acceleration.sequence.layout import SequenceContext, ring_groups

KEYS_VALUES, GRADIENTS = 1, 2  # tags: two transfers between the same processes at the same time


class RingAttention(nn.Module):
    """Fills an attention slot, or the inside of a Ulysses one (``ulysses`` processes to a place on the ring)."""

    def __init__(self, kernel: Kernel, axis: Axis, ulysses: int = 1) -> None:
        super().__init__()
        self.kernel = kernel
        self.axis = axis
        self.ulysses = ulysses

    @torch.compiler.disable  # see compile.py
    def forward(
        self,
        q_BLHD: Tensor,
        k_BLHD: Tensor,
        v_BLHD: Tensor,
        *,
        key_mask: Tensor | None = None,
        context: SequenceContext | None = None,
    ) -> Tensor:
        """(B, L_local, H, Dh) each -> (B, L_local, H, Dh), attending to all tokens; key_mask (B, L_local)."""
        assert context is not None, "pass SequenceParallel.context(...) as the model's context"
        assert context.segments is None, "a ring knows no segments"
        lengths = tuple(sum(group) for group in ring_groups(context.lengths, self.ulysses))
        assert q_BLHD.shape[1] == lengths[self.axis.rank], (q_BLHD.shape, lengths)
        masks = None
        if key_mask is not None:
            masks = collectives.all_gather(key_mask, 1, lengths, self.axis).split(lengths, dim=1)
        return _Ring.apply(q_BLHD, k_BLHD, v_BLHD, masks, lengths, self.axis, self.kernel)


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        masks: tuple[Tensor, ...] | None,
        lengths: tuple[int, ...],
        axis: Axis,
        kernel: Kernel,
    ) -> Tensor:
        out, lse = activation_checkpoint.kept(lambda: _attend(q, k, v, masks, lengths, axis, kernel))
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.masks, ctx.lengths, ctx.axis, ctx.kernel = masks, lengths, axis, kernel
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        masks, lengths, axis = ctx.masks, ctx.lengths, ctx.axis
        held = torch.stack((k, v))
        dq = torch.zeros_like(q, dtype=lse.dtype)
        returning: Shift | None = None  # gradients of what is held, from those that held it before
        for hop in range(axis.degree):
            owner = (axis.rank - hop) % axis.degree
            coming = _pass_on(held, lengths, owner, axis) if hop < axis.degree - 1 else None
            mask = masks[owner] if masks else None
            part = core.backward(ctx.kernel, grad, q, held[0], held[1], out, lse, mask)
            dq += part[0]
            dkv = torch.stack(part[1:]).to(lse.dtype)
            if returning:
                dkv = dkv + returning.wait()
            returning = _pass_on(dkv, lengths, owner, axis, tag=GRADIENTS)
            if coming:
                held = coming.wait()
        assert returning is not None
        dk, dv = returning.wait()
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None, None


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    masks: tuple[Tensor, ...] | None,
    lengths: tuple[int, ...],
    axis: Axis,
    kernel: Kernel,
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp over the keys of all processes."""
    held = torch.stack((k, v))  # (2, B, L, H, Dh)
    out = lse = None
    for hop in range(axis.degree):
        owner = (axis.rank - hop) % axis.degree
        coming = _pass_on(held, lengths, owner, axis) if hop < axis.degree - 1 else None
        part, part_lse = core.forward(kernel, q, held[0], held[1], masks[owner] if masks else None)
        if out is None or lse is None:
            out, lse = part.to(part_lse.dtype), part_lse
        else:
            out, lse = core.merge(out, lse, part, part_lse)
        if coming:
            held = coming.wait()
    assert out is not None and lse is not None
    return out.to(q.dtype), lse


def _pass_on(x: Tensor, lengths: tuple[int, ...], owner: int, axis: Axis, *, tag: int = KEYS_VALUES) -> Shift:
    """Send what belongs to ``owner`` (2, B, L_owner, H, Dh); what comes belongs to the one before it."""
    previous = lengths[(owner - 1) % axis.degree]
    return Shift(x.contiguous(), (*x.shape[:2], previous, *x.shape[3:]), axis, tag=tag)
