"""Bytes that one process sends along every axis, by formula: equal to what the axes count (``Axis.bytes_sent``).

What is counted, per process, for one optimizer step:

* fsdp: FSDP2's all-gathers of weights in compute type and reduce-scatters of gradients in reduce type. Every
  parameter is padded along its first dim to a multiple of the processes.
* replicas: its all-reduces of gradients between copies, once per step.
* ulysses, ring: what an attention slot exchanges in forward, again where a block is recomputed, and in backward.
* tensor: the exchanges of cut layers likewise; once per step, the gradients that are shared and the norm.

Masks are one byte per token. Scalars of logging and clipping that go over the whole world are not counted.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import NamedTuple

from acceleration.accounting.model_profile import Attention, Layer, ModelProfile, Parameter, ShardUnit
from acceleration.blocks import activation_checkpoint
from acceleration.config import ParallelConfig
from acceleration.distributed.mesh import FSDP, REPLICATE, Mesh
from acceleration.sequence.layout import SequenceParallel, ring_groups
from acceleration.sequence.ulysses import head_shares
from acceleration.sharding.precision import DTYPES


class Rerun(NamedTuple):
    """What a block does again in backward."""

    around: bool  # exchanges on the way into and out of its attention
    attention: bool  # attention itself, with what a ring passes
    layers: bool


RERUN = {
    "none": Rerun(around=False, attention=False, layers=False),
    "full": Rerun(around=True, attention=True, layers=True),
    "selective": Rerun(around=True, attention=False, layers=True),
}


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Whole-sequence sizes of what goes through the model at once, before tokens are cut over processes."""

    samples: int
    txt: int  # text tokens of a sample
    img: int  # image tokens of a sample
    has_mask: bool = False  # the text has a padding mask
    degree: int | None = None  # processes of ulysses that cut its samples; None: the whole axis


@dataclass(frozen=True)
class RankLayout:
    """One process of a layout that need not exist, and how sharding sees it."""

    mesh: Mesh
    cfg: ParallelConfig
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

    def local_tokens(self, batch: MicroBatch) -> tuple[int, int]:
        """(text, image) tokens of a sample that this process holds."""
        seq = SequenceParallel(self.mesh.submesh(batch.degree))
        return seq.sizes(batch.txt, extra_to_last=True)[seq.rank], seq.sizes(batch.img)[seq.rank]


def step_bytes(structure: ModelProfile, place: RankLayout, batches: Sequence[MicroBatch]) -> dict[str, int]:
    """Axis -> bytes that this process sends in one optimizer step over its micro-batches; axes of degree 1 left out."""
    total: Counter[str] = Counter()
    blocks = Counter(zip(structure.like, recomputed(len(structure.blocks), place), strict=True))
    units = [(structure.blocks[index], kind, count) for (index, kind), count in blocks.items()]
    for batch, times in Counter(batches).items():
        for unit, kind, count in (*units, (structure.rest, "none", 1)):
            for axis, sent in _exchanged(unit, place, batch, kind).items():
                total[axis] += sent * count * times
    total += _sharding_bytes(structure, place, len(batches))
    total += _shared_gradients(structure, place)
    return dict(total)


def sampling_bytes(
    structure: ModelProfile, place: RankLayout, batch: MicroBatch, passes: Sequence[int], channels: int
) -> dict[str, int]:
    """Axis -> bytes of integrating the latents of a batch, on a model that has not run before; decoding not counted.

    Args:
        passes: evaluations of the model in every step; processes along cfg take one each and exchange the velocities.
        channels: values of an image token.
    """
    mesh, (_, img), total = place.mesh, place.local_tokens(batch), Counter[str]()
    turns = Counter(-(-count // mesh["cfg"].degree) for count in passes)
    forwards = sum(turn * steps for turn, steps in turns.items())
    gathered = forwards if place.cfg.zero == 3 else min(forwards, 1)
    for gathers, times in ((True, gathered), (False, forwards - gathered)):
        for axis, sent in forward_bytes(structure, place, batch, gathers=gathers).items():
            total[axis] += sent * times
    velocity = batch.samples * img * channels * place.itemsize("compute")
    total["cfg"] = forwards * velocity * (mesh["cfg"].degree - 1)
    groups = ring_groups(SequenceParallel(mesh).sizes(batch.img), mesh["ulysses"].degree)
    token = batch.samples * channels * max(place.itemsize("compute"), 4)  # sums of steps are kept in fp32 at least
    total["ulysses"] += max(groups[mesh["ring"].rank]) * token * (mesh["ulysses"].degree - 1)
    total["ring"] += max(map(sum, groups)) * token * (mesh["ring"].degree - 1)
    return dict(+total)


def forward_bytes(
    structure: ModelProfile, place: RankLayout, batch: MicroBatch, *, gathers: bool = True
) -> dict[str, int]:
    """Axis -> bytes of one forward without gradient.

    ``gathers``: weights are gathered; with ZeRO 1 and 2 only the first forward does so.
    """
    total: Counter[str] = Counter()
    for unit in structure.units:
        total += _forward(unit, place, batch)
        if gathers and place.fsdp_degree > 1:
            total[FSDP] += gather_bytes(unit, place)
    return dict(total)


def recomputed(blocks: int, place: RankLayout) -> tuple[str, ...]:
    """How every block is recomputed, as a key of ``RERUN``."""
    cfg = place.cfg.recompute
    chosen = activation_checkpoint.chosen(cfg, blocks)
    kind = "selective" if cfg.kind == "selective" else "full"
    return tuple(kind if index in chosen else "none" for index in range(blocks))


def padded(parameters: Iterable[Parameter], place: RankLayout) -> int:
    """Values that one piece of these parameters has, padding included."""
    return sum(-(-shape[0] // place.fsdp_degree) * prod(shape[1:]) for shape in _cut(parameters, place))


def held(parameters: Iterable[Parameter], place: RankLayout) -> int:
    """Values of these parameters that this process really holds."""
    return sum(_rows(shape[0], place) * prod(shape[1:]) for shape in _cut(parameters, place))


def gather_bytes(unit: ShardUnit, place: RankLayout) -> int:
    """Sent in one all-gather of a unit's weights."""
    return padded(unit.parameters, place) * place.itemsize("compute") * (place.fsdp_degree - 1)


def all_reduce_bytes(nbytes: int, degree: int) -> int:
    """Sent in one all-reduce, as a reduce-scatter and an all-gather."""
    return 2 * nbytes * (degree - 1) // degree


def gathers_per_step(zero: int, batches: int) -> int:
    """How often a unit's weights are gathered: ZeRO 3 for forward and for backward, 2 once, 1 once per step."""
    return {0: 0, 1: 1, 2: batches, 3: 2 * batches}[zero]


def reductions_per_step(zero: int, batches: int) -> int:
    """How often a unit's gradients are reduce-scattered."""
    return batches if zero >= 2 else 1


def _sharding_bytes(structure: ModelProfile, place: RankLayout, batches: int) -> Counter[str]:
    zero, total = place.cfg.zero, Counter[str]()
    for unit, count in structure.unit_counts:
        trained = padded((p for p in unit.parameters if p.trains), place) * place.itemsize("reduce")
        if place.fsdp_degree > 1:
            total[FSDP] += count * gathers_per_step(zero, batches) * gather_bytes(unit, place)
            total[FSDP] += count * reductions_per_step(zero, batches) * trained * (place.fsdp_degree - 1)
        if place.replicas > 1:
            total[REPLICATE] += count * all_reduce_bytes(trained, place.replicas)
    return total


def _shared_gradients(structure: ModelProfile, place: RankLayout) -> Counter[str]:
    """Once per step along tensor: gradients of what all hold but use for their own heads, and the norm's square."""
    tensor = place.mesh["tensor"].degree
    if tensor == 1:
        return Counter()
    shared = sum(
        n * held((p for p in u.parameters if p.is_shared and p.trains), place) for u, n in structure.unit_counts
    )
    is_cut = any(p.cut_dim is not None and p.trains for unit, _ in structure.unit_counts for p in unit.parameters)
    sizes = (shared, int(is_cut))
    return Counter(tensor=sum(all_reduce_bytes(n * place.itemsize("master"), tensor) for n in sizes))


def _exchanged(unit: ShardUnit, place: RankLayout, batch: MicroBatch, kind: str) -> Counter[str]:
    """Forward and backward of one micro-batch; what is recomputed goes through forward twice."""
    again = RERUN[kind]
    total = Counter[str]()
    for slot in unit.attentions:
        total += _attention_forward(slot, place, batch)
        if again.around:
            total += _attention_forward(slot, place, batch, inside=again.attention)
        total += _attention_backward(slot, place, batch)
    for layer in unit.layers:
        total["tensor"] += _layer_forward(layer, place, batch) * (1 + (again.layers and layer.reruns))
        total["tensor"] += _layer_backward(layer, place, batch)
    return +total


def _forward(unit: ShardUnit, place: RankLayout, batch: MicroBatch) -> Counter[str]:
    total = Counter[str]()
    for slot in unit.attentions:
        total += _attention_forward(slot, place, batch)
    total["tensor"] += sum(_layer_forward(layer, place, batch) for layer in unit.layers)
    return +total


@dataclass(frozen=True)
class _Share:
    """One process's part in an attention slot: tokens and heads here, in its ulysses group, and on the ring."""

    heads: int  # before ulysses cuts them
    mine: int  # heads of this process inside attention
    local: int  # tokens of this process
    group: tuple[int, ...]  # tokens of each process of its ulysses group
    ring: tuple[int, ...]  # tokens of each place on the ring


def _share(slot: Attention, place: RankLayout, batch: MicroBatch) -> _Share:
    mesh = place.mesh.submesh(batch.degree)
    ring, ulysses, sequence = mesh["ring"], mesh["ulysses"], SequenceParallel(mesh)
    txt, img = sequence.sizes(batch.txt, extra_to_last=True), sequence.sizes(batch.img)
    lengths = tuple(slot.tokens.at(*pair) for pair in zip(txt, img, strict=True))
    groups = ring_groups(lengths, ulysses.degree)
    heads = slot.heads // place.mesh["tensor"].degree
    return _Share(
        heads=heads,
        mine=head_shares(heads, ulysses.degree)[ulysses.rank],
        local=lengths[sequence.rank],
        group=groups[ring.rank],
        ring=tuple(sum(group) for group in groups),
    )


def _attention_forward(slot: Attention, place: RankLayout, batch: MicroBatch, *, inside: bool = True) -> Counter[str]:
    """q, k, v of other heads go out and come back as outputs; keys and values of every part but one are passed on.

    ``inside``: False where attention itself is kept, and with it what the ring has passed.
    """
    share, size = _share(slot, place, batch), place.itemsize("compute") * batch.samples * slot.head_dim
    ring, ulysses = place.mesh["ring"], place.mesh.submesh(batch.degree)["ulysses"]
    sent = Counter[str]()
    if ulysses.degree > 1:
        elsewhere = sum(share.group) - share.local
        sent["ulysses"] = (3 * share.local * (share.heads - share.mine) + elsewhere * share.mine) * size
        if batch.has_mask:
            sent["ulysses"] += max(share.group) * batch.samples * (ulysses.degree - 1)
    if ring.degree > 1:
        stays = share.ring[(ring.rank + 1) % ring.degree]  # what the next process had at the start
        sent["ring"] = 2 * (sum(share.ring) - stays) * share.mine * size * inside
        if batch.has_mask:
            sent["ring"] += max(share.ring) * batch.samples * (ring.degree - 1)
    return sent


def _attention_backward(slot: Attention, place: RankLayout, batch: MicroBatch) -> Counter[str]:
    """Ulysses in reverse; the ring passes keys and values again, and the gradients of every part, in fp32 at least."""
    share, compute = _share(slot, place, batch), place.itemsize("compute")
    ring, ulysses = place.mesh["ring"], place.mesh.submesh(batch.degree)["ulysses"]
    per_head = batch.samples * slot.head_dim
    sent = Counter[str]()
    if ulysses.degree > 1:
        elsewhere = sum(share.group) - share.local
        sent["ulysses"] = (share.local * (share.heads - share.mine) + 3 * elsewhere * share.mine) * per_head * compute
    if ring.degree > 1:
        stays = share.ring[(ring.rank + 1) % ring.degree]
        values = 2 * share.mine * per_head
        sent["ring"] = values * ((sum(share.ring) - stays) * compute + sum(share.ring) * max(compute, 4))
    return sent


def _layer_forward(layer: Layer, place: RankLayout, batch: MicroBatch) -> int:
    degree, rows = place.mesh["tensor"].degree, batch.samples * layer.rows.at(*place.local_tokens(batch))
    if degree == 1 or layer.kind in ("column", "whole"):
        return 0
    out = rows * layer.outputs * place.itemsize("compute")
    return all_reduce_bytes(out, degree) if layer.kind == "row" else out // degree * (degree - 1)


def _layer_backward(layer: Layer, place: RankLayout, batch: MicroBatch) -> int:
    degree, rows = place.mesh["tensor"].degree, batch.samples * layer.rows.at(*place.local_tokens(batch))
    if degree == 1 or layer.kind in ("row", "whole") or not layer.input_trains:
        return 0
    return all_reduce_bytes(rows * layer.inputs * place.itemsize("compute"), degree)


def _cut(parameters: Iterable[Parameter], place: RankLayout) -> Iterable[tuple[int, ...]]:
    return (p.cut(place.mesh["tensor"].degree) for p in parameters)


def _rows(rows: int, place: RankLayout) -> int:
    """Of a dim of ``rows``: torch.chunk gives the first processes ceil(rows / n) each."""
    chunk = -(-rows // place.fsdp_degree)
    return max(0, min(rows, chunk * (place.fsdp_rank + 1)) - chunk * place.fsdp_rank)
