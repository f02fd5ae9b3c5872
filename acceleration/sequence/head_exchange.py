"""Exchange of places for heads around attention that is neither within a frame nor along time alone, as in windows.

Windows span places and frames, so both must be whole where they are gathered. Time is whole outside of axis switches;
one packed exchange over the ulysses group, and on a ring one more over the ring, turns q, k, v of this process's places
and all heads into all places and this process's heads, and one each turns the result back: per process 4 * B * T * S *
D * (p-1)/p^2 elements for T x S tokens of D channels over p processes. Any number of heads will do: with fewer heads
than processes some attend with none.
"""

from typing import Any

import torch
from torch import Tensor, nn

from acceleration.distributed.mesh import Axis
from acceleration.sequence.axis_switch import exchange
from acceleration.sequence.layout import SequenceContext, even_sizes, ring_groups

PLACES, HEADS = 2, -2


class HeadExchange(nn.Module):
    """Fills an attention slot; ``core`` sees all places of all frames."""

    def __init__(self, core: nn.Module, ring: Axis, ulysses: Axis) -> None:
        super().__init__()
        self.core = core
        self.ring, self.ulysses = ring, ulysses

    @torch.compiler.disable  # see compile.py
    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, context: SequenceContext | None = None, **of_core: Any
    ) -> Tensor:
        """(B, T, S_local, H, Dh) each -> (B, T, S_local, H, Dh); ``of_core`` is handed to the core."""
        assert context is not None, "pass SequenceParallel.factored_context(...) as the model's context"
        ulysses = context.ulysses or self.ulysses
        groups = ring_groups(context.lengths, ulysses.degree)
        heads = even_sizes(q.shape[HEADS], ulysses.degree)
        over_ring = tuple(sum(group) for group in groups), even_sizes(heads[ulysses.rank], self.ring.degree)
        both = ((ulysses, groups[self.ring.rank], heads), (self.ring, *over_ring))
        steps = [step for step in both if step[0].degree > 1]

        packed = torch.stack((q, k, v), dim=3)  # (B, T, S_local, 3, H, Dh)
        for axis, places, shares in steps:
            packed = exchange(packed, packed.ndim + HEADS, shares, PLACES, places, axis)
        parts = packed.unbind(3)
        if parts[0].shape[HEADS]:
            out = self.core(*parts, context=context, **of_core)
        else:  # kernels know no attention without heads
            out = parts[0] + parts[1] + parts[2]
        for axis, places, shares in reversed(steps):
            out = exchange(out, PLACES, places, out.ndim + HEADS, shares, axis)
        return out
