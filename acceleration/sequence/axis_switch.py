"""Axis switch: tokens (B, frames, places, ...) that are cut along places, made cut along frames, and back.

Attention along space wants all places of a frame, attention along time all frames of a place. One exchange over a
ulysses group on the way into the spatial half of a model and one on the way out of it give each the axis that it wants,
whatever the number of heads: per process and direction B * T * S * D * (p-1)/p^2 elements for T x S tokens of D
channels, half of what Ulysses sends for the same attention. On a ring a group has the places of one place on the ring;
along the ring they stay cut.
"""

import torch
from torch import Tensor, nn

from acceleration.distributed import collectives
from acceleration.distributed.mesh import Axis
from acceleration.protocol import TokenAxis
from acceleration.sequence.layout import SequenceContext, even_sizes, ring_groups
from acceleration.sequence.ulysses import blocks_of


class AxisExchange(nn.Module):
    """Takes the place of an identity module; ``whole`` is the axis that is whole on this process behind it."""

    def __init__(self, whole: TokenAxis, axis: Axis, ring_rank: int = 0) -> None:
        super().__init__()
        self.whole = whole
        self.axis = axis
        self.ring_rank = ring_rank

    @torch.compiler.disable  # see compile.py
    def forward(self, x: Tensor, context: SequenceContext | None = None) -> Tensor:
        """(B, T, S_local, ...) -> (B, T_local, S, ...) for space, the reverse for time; any type, any trailing dims.

        Over the part of the axis that ``context`` names, or all of it; ``x`` itself where the context says that axes
        are not exchanged. Differentiable: the gradient takes the way back.
        """
        assert context is not None, "pass SequenceParallel.factored_context(...) as the model's context"
        if not context.switches:
            return x
        axis = context.ulysses or self.axis
        assert context.frames is not None
        frames, places = even_sizes(context.frames, axis.degree), ring_groups(context.lengths, axis.degree)
        if self.whole == "space":
            return exchange(x, 1, frames, 2, places[self.ring_rank], axis)
        return exchange(x, 2, places[self.ring_rank], 1, frames, axis)


def exchange(
    x: Tensor, cut: int, outgoing: tuple[int, ...], joined: int, incoming: tuple[int, ...], axis: Axis
) -> Tensor:
    """``x``, whole along dim ``cut`` and cut along dim ``joined``, made cut along the one and whole along the other.

    Args:
        outgoing: sizes along ``cut`` that each process of the axis is to hold.
        incoming: sizes along ``joined`` that each process holds.
    """
    mine = incoming[axis.rank]
    assert (x.shape[cut], x.shape[joined]) == (sum(outgoing), mine), (x.shape, outgoing, incoming)
    shape = list(x.shape)
    shape[cut] = outgoing[axis.rank]
    parts = [[*shape[:joined], size, *shape[joined + 1 :]] for size in incoming]
    row = x.numel() // sum(outgoing) if sum(outgoing) else 0  # values per index along cut
    receive = [torch.Size(part).numel() for part in parts]
    values = collectives.all_to_all(blocks_of(x, outgoing, cut), [size * row for size in outgoing], receive, axis)
    blocks = values.split(receive)
    return torch.cat([block.view(part) for block, part in zip(blocks, parts, strict=True)], dim=joined)
