"""Who owns which tokens.

A sequence of n tokens is cut into p = ring x ulysses contiguous parts that differ by at most one token; parts may be
empty. Text and image tokens are cut separately, so that every process runs both streams of a double-stream block.
Attention sees the parts in rank order, [txt_0, img_0, txt_1, img_1, ...]: after RoPE full attention does not depend on
token order. Where a sequence holds several samples, attention must know of which one each of these tokens is.

Models that keep time and space apart have frames x places. Places are cut as above, and all processes of a ulysses
group exchange them for frames where attention along space begins, and back where it ends (axis_switch.py). Fewer frames
than processes would leave some without any: then nothing is exchanged there, and attention along space is spread by
heads, as attention over one sequence is (ulysses.py).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from acceleration.distributed import collectives
from acceleration.distributed.mesh import Axis, Mesh
from acceleration.sequence.segments import Segments


@dataclass(frozen=True)
class SequenceContext:
    """What an attention slot must know of one micro-batch; travels through the model's ``context`` argument.

    An argument and not a state of the slot: recomputation in backward sees the same value as forward did.
    """

    lengths: tuple[int, ...]  # of each process that shares the sequence, in rank order: tokens, text and image; where
    # frames are given, places of a frame
    ulysses: Axis | None = None  # the part of the axis that cuts these samples; None: the whole axis
    segments: Segments | None = None  # of the tokens of all; None: every sequence is one sample
    frames: int | None = None  # of models that keep time and space apart: all frames
    switches: bool = False  # axis switches exchange places for frames; False: they leave tokens as they are
    text: tuple[int, int] | None = None  # first and end of this process's text tokens, for models that are given all of
    # them and cut them themselves; None: not cut


def exchanges_axes(frames: int, heads: int, degree: int) -> bool:
    """Whether ``degree`` processes exchange places for frames, so that attention along space is each one's own.

    Not if there would be fewer frames than processes, as in stills; unless heads are too few as well, and some
    processes have to wait in either case.
    """
    return degree > 1 and (frames >= degree or heads < degree)


class SequenceParallel:
    """Cuts tokens over ring x ulysses on the way into the model and joins them on the way out.

    Of a submesh (``Mesh.submesh``): tokens of samples that belong to a part of ulysses alone.
    """

    def __init__(self, mesh: Mesh) -> None:
        self.ring, self.ulysses = mesh["ring"], mesh["ulysses"]
        self.degree = self.ring.degree * self.ulysses.degree
        self.rank = self.ring.rank * self.ulysses.degree + self.ulysses.rank
        self.cuts = self.degree > 1 or self.ulysses.parent is not None  # some micro-batches, though maybe not this one
        self._tensor = mesh["tensor"].degree

    def sizes(self, tokens: int, *, extra_to_last: bool = False) -> tuple[int, ...]:
        """Tokens per process; the surplus of an uneven cut goes to the first processes, or to the last."""
        sizes = even_sizes(tokens, self.degree)
        return sizes[::-1] if extra_to_last else sizes

    def shard(self, x: Tensor, dim: int = 1, *, extra_to_last: bool = False) -> Tensor:
        """This process's part of ``x`` along ``dim``. Text uses ``extra_to_last``, which evens out the sums."""
        if not self.cuts:
            return x
        sizes = self.sizes(x.shape[dim], extra_to_last=extra_to_last)
        return x.narrow(dim, sum(sizes[: self.rank]), sizes[self.rank]).contiguous()

    def gather(self, x: Tensor, total: int, dim: int = 1) -> Tensor:
        """The whole tensor, ``total`` long along ``dim``, on every process. Not differentiable."""
        groups = ring_groups(self.sizes(total), self.ulysses.degree)
        x = collectives.all_gather(x, dim, groups[self.ring.rank], self.ulysses)
        return collectives.all_gather(x, dim, [sum(group) for group in groups], self.ring)

    def total(self, x: Tensor) -> Tensor:
        """The sum of what all processes have that share the sequence, on each of them. Not differentiable."""
        return collectives.all_reduce_(collectives.all_reduce_(x.clone(), self.ulysses), self.ring)

    def context(self, txt_tokens: int, img_tokens: int) -> SequenceContext | None:
        """What to pass as the model's ``context`` for these whole-sequence lengths; None where slots never cut."""
        if not self.cuts:
            return None
        part = self.ulysses if self.ulysses.parent else None
        txt, img = self.sizes(txt_tokens, extra_to_last=True), self.sizes(img_tokens)
        lengths = tuple(a + b for a, b in zip(txt, img, strict=True))
        return SequenceContext(lengths, part, text=self._mine(txt))

    def factored_context(self, frames: int, places: int, heads: int) -> SequenceContext | None:
        """The same for models that keep ``frames`` x ``places`` tokens apart: these are cut along places.

        ``heads``: of attention along space, before they are cut over tensor.
        """
        if not self.cuts:
            return None
        part = self.ulysses if self.ulysses.parent else None
        switches = exchanges_axes(frames, heads // self._tensor, self.ulysses.degree)
        return SequenceContext(self.sizes(places), part, frames=frames, switches=switches)

    def packed_context(self, txt: Tensor, img: Tensor, device: torch.device | str) -> SequenceContext:
        """The same for sequences that hold several samples; not for a ring.

        Args:
            txt: (B, L) int64 on the CPU, the number of the sample that each text token of the whole sequences is of;
                samples are counted over all sequences.
            img: (B, N), of each image token.
        """
        assert self.ring.degree == 1, "a ring knows no segments"
        sizes = self.sizes(txt.shape[1], extra_to_last=True), self.sizes(img.shape[1])
        parts = zip(txt.split(sizes[0], dim=1), img.split(sizes[1], dim=1), strict=True)
        held = [torch.cat(part, dim=1) for part in parts]  # of each process, text before image
        segments = Segments.of(torch.cat(held, dim=1), device)
        return SequenceContext(tuple(part.shape[1] for part in held), segments=segments, text=self._mine(sizes[0]))

    def _mine(self, sizes: tuple[int, ...]) -> tuple[int, int]:
        """First and end of this process's tokens, of those that the processes have."""
        first = sum(sizes[: self.rank])
        return first, first + sizes[self.rank]


def even_sizes(count: int, degree: int) -> tuple[int, ...]:
    """Contiguous parts that differ by at most one; the first ones take the surplus."""
    base, surplus = divmod(count, degree)
    return tuple(base + (rank < surplus) for rank in range(degree))


def ring_groups(lengths: tuple[int, ...], ulysses: int) -> list[tuple[int, ...]]:
    """Lengths of all processes -> for each place on the ring, those of its ulysses group."""
    return [lengths[i : i + ulysses] for i in range(0, len(lengths), ulysses)]
