"""One process of a layout that need not exist, and the parts of a micro-batch that it and its peers hold."""

from dataclasses import dataclass, field

import torch

from acceleration.accounting.model_profile import Count, ModelProfile, Sizes
from acceleration.config import ParallelConfig
from acceleration.distributed.mesh import Axis, Mesh
from acceleration.sequence.layout import SequenceParallel, even_sizes, exchanges_axes, ring_groups
from acceleration.sharding.precision import DTYPES


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Whole-sequence sizes of what goes through the model at once, before tokens are cut over processes."""

    samples: int
    txt: int  # text tokens of a sample
    img: int  # image tokens of a sample
    frames: int | None = None  # among which these are divided, for models that keep time and space apart
    has_mask: bool = False  # the text has a padding mask
    degree: int | None = None  # processes of ulysses that cut its samples; None: the whole axis
    packed: int = 0  # samples of equal length in a sequence, of which txt and img are all tokens; 0: nothing is packed
    picture: int = 0  # tokens of a picture beside the text of a sample

    @property
    def places(self) -> int:
        """Tokens of a frame."""
        assert self.frames is not None, "a model that keeps time and space apart needs MicroBatch.frames"
        return self.img // self.frames

    @property
    def count(self) -> int:
        """Samples in all."""
        return self.samples * max(1, self.packed)

    def sizes(self, profile: ModelProfile) -> Sizes:
        """Of a whole sample, as the counts of a profile want them."""
        if not profile.is_factored:
            txt, img = (tokens // max(1, self.packed) for tokens in (self.txt, self.img))
            return {"txt": txt, "txt_here": txt, "img": img, "picture": self.picture}
        assert self.frames is not None, "a model that keeps time and space apart needs MicroBatch.frames"
        return _factored_sizes(self.txt, self.frames, self.places, self.frames, self.places)


class Peers:
    """To which of its peers the bytes of a process are counted: to all of them.

    Exchanges go round (all-gather, reduce-scatter, all-reduce, a ring's shifts: a process sends to the next one alone,
    as gloo does it and NCCL's rings) or from each to each (all-to-all).
    """

    def __init__(self, reductions: int = 1) -> None:
        """``reductions``: how often a reduce-scatter sends what it has to send."""
        self.reductions = reductions

    def follows(self, axis: str, degree: int | None = None) -> bool:
        """Whether the next process of the axis, or of its part of this degree, is one of them."""
        return True

    def counted(self, axis: Axis) -> tuple[bool, ...]:
        """Of every process of the axis, or of a part of it, whether it is one of them; this one is not."""
        return tuple(rank != axis.rank for rank in range(axis.degree))


ALL_PEERS = Peers()


@dataclass(frozen=True)
class RankLayout:
    """One process of a layout that need not exist, and how sharding sees it."""

    mesh: Mesh
    cfg: ParallelConfig
    peers: Peers = ALL_PEERS
    fsdp_degree: int = field(init=False)
    fsdp_rank: int = field(init=False)
    replicas: int = field(init=False)

    def __post_init__(self) -> None:
        members = self.mesh.world_size // self.mesh["tensor"].degree
        copies = members if self.cfg.zero == 0 else self.mesh["replicate"].degree
        object.__setattr__(self, "replicas", copies)
        object.__setattr__(self, "fsdp_degree", members // copies)
        rank = 0  # on the mesh without tensor, tensor being the fastest axis
        for name in ("replicate", "shard", "cfg", "ring", "ulysses"):
            rank = rank * self.mesh[name].degree + self.mesh[name].rank
        object.__setattr__(self, "fsdp_rank", rank % self.fsdp_degree)

    def itemsize(self, which: str) -> int:
        """Bytes of a value in ``compute``, ``reduce`` or ``master`` type."""
        return DTYPES[getattr(self.cfg.precision, which)].itemsize

    def local_sizes(self, profile: ModelProfile, batch: MicroBatch) -> Sizes:
        """Of the part of a sample that this process holds, as the counts of a profile want them."""
        return TokenShares(profile, self, batch).local

    def local_tokens(self, profile: ModelProfile, batch: MicroBatch) -> tuple[int, int]:
        """(text, image) tokens of a sample that this process holds."""
        sizes = self.local_sizes(profile, batch)
        txt = sizes["txt_here" if profile.cuts_text_itself else "txt"]
        return txt, sizes["frames"] * sizes["places"] if profile.is_factored else sizes["img"]


class TokenShares:
    """The parts of a sample that the processes have that cut it."""

    def __init__(self, profile: ModelProfile, place: RankLayout, batch: MicroBatch) -> None:
        mesh = place.mesh.submesh(batch.degree)
        sequence = SequenceParallel(mesh)
        self.place, self.batch = place, batch
        self.ring, self.ulysses, self.rank = mesh["ring"], mesh["ulysses"], sequence.rank
        self.tensor, self.switches = place.mesh["tensor"].degree, False
        if profile.is_factored:
            self.all = self._factored(profile, sequence)
        else:
            cut, img = sequence.sizes(batch.txt, extra_to_last=True), sequence.sizes(batch.img)
            given = cut if profile.cuts_text and not profile.cuts_text_itself else (batch.txt,) * sequence.degree
            names = ("txt", "txt_here", "img", "picture")
            parts = zip(given, cut, img, (batch.picture,) * sequence.degree, strict=True)
            self.all = [dict(zip(names, sizes, strict=True)) for sizes in parts]
        self.local = self.all[self.rank]
        first = self.ring.rank * self.ulysses.degree
        self.group = self.all[first : first + self.ulysses.degree]  # of each process of its ulysses group
        self.counted = place.peers.counted(self.ulysses)  # of whom bytes are counted to
        self._lengths: dict[Count, tuple[int, ...]] = {}

    def lengths(self, count: Count) -> tuple[int, ...]:
        """What ``count`` is on every process."""
        if count not in self._lengths:
            self._lengths[count] = tuple(count.at(sizes) for sizes in self.all)
        return self._lengths[count]

    def rows(self, count: Count) -> int:
        """What ``count``, per sample, is here of all samples; of a packed sequence those that are no tokens, as a
        modulation, are as many as it has samples."""
        alone = max(0, self.batch.packed - 1) * count.fixed
        return self.batch.samples * (count.at(self.local) + alone)

    def follows(self, axis: str) -> bool:
        """Whether bytes to the next process of ring, ulysses or tensor are counted."""
        return self.place.peers.follows(axis, self.ulysses.degree if axis == "ulysses" else None)

    def _factored(self, profile: ModelProfile, sequence: SequenceParallel) -> list[Sizes]:
        batch, degree = self.batch, self.ulysses.degree
        assert batch.frames is not None, "a model that keeps time and space apart needs MicroBatch.frames"
        places = sequence.sizes(batch.places)
        self.switches = exchanges_axes(batch.frames, profile.heads_along_space // self.tensor, degree)
        if not self.switches:
            return [_factored_sizes(batch.txt, batch.frames, here, batch.frames, here) for here in places]
        frames, whole = even_sizes(batch.frames, degree), [sum(group) for group in ring_groups(places, degree)]
        return [
            _factored_sizes(batch.txt, batch.frames, here, frames[rank % degree], whole[rank // degree])
            for rank, here in enumerate(places)
        ]

    def itemsize(self, dtype: torch.dtype = torch.bfloat16) -> int:
        """Bytes of a value of this type in a profile, see ``Switch``."""
        compute = self.place.itemsize("compute")
        return {torch.bfloat16: compute, torch.float32: max(compute, 4)}.get(dtype, dtype.itemsize)


def _factored_sizes(txt: int, frames: int, places: int, frames_inside: int, places_inside: int) -> Sizes:
    return {
        "txt": txt,
        "frames": frames,
        "places": places,
        "frames_inside": frames_inside,
        "places_inside": places_inside,
    }
