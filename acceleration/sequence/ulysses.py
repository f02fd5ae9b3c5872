"""Ulysses: tokens are cut outside attention, heads inside (DeepSpeed-Ulysses, arXiv:2309.14509).

One packed exchange turns q, k, v of this process's tokens and all heads into all tokens of its ulysses group and this
process's heads; the wrapped core attends as on one process (or goes on over a ring of groups); one exchange turns the
result back. Per process and layer forward sends 4 * B * L * D * (p-1)/p^2 elements for L tokens of the group and D
channels. Heads that p does not divide are cut as tokens are: the first processes take one more.

In attention along space the sequence is the places of a frame, and the frames are samples. Where an axis switch has
made them whole on this process there is nothing to exchange.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from acceleration.distributed import collectives
from acceleration.distributed.mesh import Axis
from acceleration.sequence.layout import SequenceContext, even_sizes, ring_groups


class UlyssesAttention(nn.Module):
    """Fills an attention slot; ``core`` sees the whole sequence of this process's ulysses group."""

    def __init__(self, core: nn.Module, axis: Axis, ring_rank: int = 0) -> None:
        super().__init__()
        self.core = core
        self.axis = axis
        self.ring_rank = ring_rank

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
        """(B, L_local, H, Dh) each -> (B, L_local, H, Dh); key_mask (B, L_local).

        Over the part of the axis that ``context`` names, or all of it.

        Raises:
            ValueError: fewer heads than processes.
        """
        assert context is not None, "pass SequenceParallel.context(...) as the model's context"
        axis = context.ulysses or self.axis
        lengths = ring_groups(context.lengths, axis.degree)[self.ring_rank]
        if axis.degree == 1 or context.switches:  # not cut, or no more: the places of this process's frames
            assert q_BLHD.shape[1] == sum(lengths), (q_BLHD.shape, lengths)
            return self.core(q_BLHD, k_BLHD, v_BLHD, key_mask=key_mask, context=context)
        batch, local, heads, dim = q_BLHD.shape
        assert local == lengths[axis.rank], (local, lengths)
        shares = head_shares(heads, axis.degree)
        mine, whole = shares[axis.rank], sum(lengths)

        by_token = torch.stack((q_BLHD, k_BLHD, v_BLHD)).permute(2, 1, 0, 3, 4)  # (L_local, B, 3, H, Dh)
        send = [local * batch * 3 * share * dim for share in shares]
        receive = [length * batch * 3 * mine * dim for length in lengths]
        values = collectives.all_to_all(blocks_of(by_token, shares, 3), send, receive, axis)
        q, k, v = values.view(whole, batch, 3, mine, dim).transpose(0, 1).unbind(2)  # (B, L, H_mine, Dh) each
        if key_mask is not None:
            key_mask = collectives.all_gather(key_mask, 1, lengths, axis)
        out = self.core(q, k, v, key_mask=key_mask, context=context)

        send, receive = ([n // 3 for n in counts] for counts in (receive, send))
        values = collectives.all_to_all(blocks_of(out.transpose(0, 1), lengths, 0), send, receive, axis)
        by_peer = zip(values.split(receive), shares, strict=True)
        parts = [part.view(local, batch, share, dim) for part, share in by_peer]
        return torch.cat(parts, dim=2).transpose(0, 1)


def blocks_of(x: Tensor, sizes: Sequence[int], dim: int) -> Tensor:
    """The values of ``x`` as one block per peer, where ``sizes`` cut ``dim``."""
    return torch.cat([part.flatten() for part in x.split(list(sizes), dim)])


def head_shares(heads: int, degree: int) -> tuple[int, ...]:
    """Heads per process.

    Raises:
        ValueError: fewer heads than processes.
    """
    if heads < degree:
        raise ValueError(f"{heads} attention heads cannot be split over ulysses={degree}")
    return even_sizes(heads, degree)
