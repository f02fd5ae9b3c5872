"""Who owns which tokens.

A sequence of n tokens is cut into p = ring x ulysses contiguous parts that differ by at most one token; parts may be
empty. Text and image tokens are cut separately, so that every process runs both streams of a double-stream block.
Attention sees the parts in rank order, [txt_0, img_0, txt_1, img_1, ...]: after RoPE full attention does not depend on
token order.
"""

from dataclasses import dataclass

from torch import Tensor

from acceleration import collectives
from acceleration.mesh import Axis, Mesh


@dataclass(frozen=True)
class SequenceContext:
    """What an attention slot must know of one micro-batch; travels through the model's ``context`` argument.

    An argument and not a state of the slot: recomputation in backward sees the same value as forward did.
    """

    lengths: tuple[int, ...]  # tokens (text and image) of each process that shares the sequence, in rank order
    ulysses: Axis | None = None  # the part of the axis that cuts these samples; None: the whole axis


class SequenceParallel:
    """Cuts tokens over ring x ulysses on the way into the model and joins them on the way out.

    Of a narrowed mesh (``Mesh.narrow``): tokens of samples that belong to a part of ulysses alone.
    """

    def __init__(self, mesh: Mesh) -> None:
        self.ring, self.ulysses = mesh["ring"], mesh["ulysses"]
        self.degree = self.ring.degree * self.ulysses.degree
        self.rank = self.ring.rank * self.ulysses.degree + self.ulysses.rank
        self.cuts = self.degree > 1 or self.ulysses.whole is not None  # some micro-batches, though maybe not this one

    def sizes(self, tokens: int, *, surplus_last: bool = False) -> tuple[int, ...]:
        """Tokens per process; the surplus of an uneven cut goes to the first processes, or to the last."""
        base, surplus = divmod(tokens, self.degree)
        sizes = tuple(base + (rank < surplus) for rank in range(self.degree))
        return sizes[::-1] if surplus_last else sizes

    def shard(self, x: Tensor, dim: int = 1, *, surplus_last: bool = False) -> Tensor:
        """This process's part of ``x`` along ``dim``. Text uses ``surplus_last``, which evens out the sums."""
        if not self.cuts:
            return x
        sizes = self.sizes(x.shape[dim], surplus_last=surplus_last)
        return x.narrow(dim, sum(sizes[: self.rank]), sizes[self.rank]).contiguous()

    def gather(self, x: Tensor, total: int, dim: int = 1) -> Tensor:
        """The whole tensor, ``total`` long along ``dim``, on every process. Not differentiable."""
        groups = ring_groups(self.sizes(total), self.ulysses.degree)
        x = collectives.all_gather(x, dim, groups[self.ring.rank], self.ulysses)
        return collectives.all_gather(x, dim, [sum(group) for group in groups], self.ring)

    def context(self, txt_tokens: int, img_tokens: int) -> SequenceContext | None:
        """What to pass as the model's ``context`` for these whole-sequence lengths; None where slots never cut."""
        if not self.cuts:
            return None
        part = self.ulysses if self.ulysses.whole else None
        txt, img = self.sizes(txt_tokens, surplus_last=True), self.sizes(img_tokens)
        return SequenceContext(tuple(a + b for a, b in zip(txt, img, strict=True)), part)


def ring_groups(lengths: tuple[int, ...], ulysses: int) -> list[tuple[int, ...]]:
    """Lengths of all processes -> for each place on the ring, those of its ulysses group."""
    return [lengths[i : i + ulysses] for i in range(0, len(lengths), ulysses)]
