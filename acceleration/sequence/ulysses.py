"""Ulysses: tokens are cut outside attention, heads inside (DeepSpeed-Ulysses, arXiv:2309.14509).

One packed exchange turns q, k, v of this process's tokens and all heads into all tokens and this process's heads; the
wrapped core attends as on one process; one exchange turns the result back. Per process and layer forward sends
4 * B * L * D * (p-1)/p^2 elements for L tokens in all and hidden size D.
"""

import torch
from torch import Tensor, nn

from acceleration import collectives, plan
from acceleration.mesh import Axis
from acceleration.sequence.layout import SequenceContext


class UlyssesAttention(nn.Module):
    """Fills an attention slot; ``core`` is the attention it found there and sees whole sequences."""

    def __init__(self, core: nn.Module, axis: Axis) -> None:
        super().__init__()
        self.core = core
        self.axis = axis

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

        Raises:
            ValueError: heads that the degree does not divide.
        """
        assert context is not None, "pass SequenceParallel.context(...) as the model's context"
        batch, local, heads, dim = q_BLHD.shape
        degree, lengths = self.axis.degree, context.lengths
        assert local == lengths[self.axis.rank], (local, lengths)
        if heads % degree:
            raise ValueError(f"{heads} attention heads cannot be split over ulysses={degree}")

        packed = torch.stack((q_BLHD, k_BLHD, v_BLHD)).unflatten(3, (degree, heads // degree))
        by_peer = packed.permute(3, 2, 1, 0, 4, 5).flatten(0, 1)  # (p * L_local, B, 3, H/p, Dh), rows grouped by peer
        whole = collectives.all_to_all(by_peer, [local] * degree, lengths, self.axis)  # (L, B, 3, H/p, Dh)
        q, k, v = whole.transpose(0, 1).unbind(2)
        if key_mask is not None:
            key_mask = collectives.all_gather(key_mask, 1, lengths, self.axis)
        out = self.core(q, k, v, key_mask=key_mask)  # (B, L, H/p, Dh)
        by_peer = collectives.all_to_all(out.transpose(0, 1), lengths, [local] * degree, self.axis)
        return by_peer.unflatten(0, (degree, local)).permute(2, 1, 0, 3, 4).reshape(batch, local, heads, dim)


def fill_slots(model: nn.Module, axis: Axis) -> None:
    """Put a wrapper into every attention slot of the model. Nothing to do for an axis of degree 1."""
    if axis.degree == 1:
        return
    for parent, attribute, core in list(plan.slots(model, model.attention_cores)):  # type: ignore[arg-type]
        setattr(parent, attribute, UlyssesAttention(core, axis))
