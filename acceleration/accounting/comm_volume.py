"""Bytes that one process sends along every axis, by formula: equal to what the axes count (``Axis.bytes_sent``).

What is counted, per process, for one optimizer step:

* fsdp: FSDP2's all-gathers of weights in compute type and reduce-scatters of gradients in reduce type. Every
  parameter is padded along its first dim to a multiple of the processes.
* replicas: its all-reduces of gradients between copies, once per step.
* ulysses, ring: what an attention slot and an axis switch exchange in forward, again where a block is recomputed, and
  in backward. Text that is read by cross-attention is whole on every process, and nothing of it is exchanged.
* tensor: the exchanges of cut layers and norms likewise, one for the gradient of an input that several layers of a
  block read; once per step, the gradients that are shared and the norm.

Masks are one byte per token, also on their way through a switch. Scalars of logging and clipping that go over the whole
world are not counted. ``RankLayout.peers`` counts the bytes to some of the others alone, as host_traffic.py does.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import compress
from math import prod
from typing import NamedTuple

import torch

from acceleration.accounting.model_profile import (
    Attention,
    Layer,
    ModelProfile,
    Norm,
    Parameter,
    ShardUnit,
    Switch,
)
from acceleration.accounting.rank_layout import MicroBatch, RankLayout, TokenShares
from acceleration.blocks import activation_checkpoint
from acceleration.distributed.mesh import FSDP, REPLICATE, Axis
from acceleration.sequence.install import IS_SPREAD
from acceleration.sequence.layout import SequenceParallel, even_sizes, ring_groups
from acceleration.sequence.ulysses import head_shares


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


def step_bytes(structure: ModelProfile, place: RankLayout, batches: Sequence[MicroBatch]) -> dict[str, int]:
    """Axis -> bytes that this process sends in one optimizer step over its micro-batches; axes of degree 1 left out."""
    total: Counter[str] = Counter()
    blocks = Counter(zip(structure.like, recomputed(len(structure.blocks), place), strict=True))
    units = [(structure.blocks[index], kind, count) for (index, kind), count in blocks.items()]
    for batch, times in Counter(batches).items():
        shares = TokenShares(structure, place, batch)
        for unit, kind, count in (*units, (structure.rest, "none", 1)):
            for axis, sent in _exchanged(unit, shares, kind).items():
                total[axis] += sent * count * times
    total += _sharding_bytes(structure, place, len(batches))
    total += _shared_gradients(structure, place)
    return dict(total)


def sampling_bytes(
    structure: ModelProfile,
    place: RankLayout,
    batch: MicroBatch,
    passes: Sequence[int],
    channels: int,
    outputs: int = 1,
    sums: Sequence[int] = (),
) -> dict[str, int]:
    """Axis -> bytes of integrating the latents of a batch, on a model that has not run before; decoding not counted.

    Args:
        passes: evaluations of the model in every step; processes along cfg take one each and exchange the predictions.
        channels: values of an image token.
        outputs: values that the model predicts for each of them.
        sums: bytes of each tensor that all processes of a sample add up.
    """
    mesh, (_, img), total = place.mesh, place.local_tokens(structure, batch), Counter[str]()
    turns = Counter(-(-count // mesh["cfg"].degree) for count in passes)
    forwards = sum(turn * steps for turn, steps in turns.items())
    gathered = forwards if place.cfg.zero == 3 else min(forwards, 1)
    for gathers, times in ((True, gathered), (False, forwards - gathered)):
        for axis, sent in forward_bytes(structure, place, batch, gathers=gathers).items():
            total[axis] += sent * times
    prediction = batch.samples * img * outputs * channels * place.itemsize("compute")
    total["cfg"] = forwards * prediction * (mesh["cfg"].degree - 1)
    rows, frames = (batch.places, batch.img // batch.places) if structure.is_factored else (batch.img, 1)
    groups = ring_groups(SequenceParallel(mesh).sizes(rows), mesh["ulysses"].degree)
    exact = max(place.itemsize("compute"), 4)  # sums of steps are kept in fp32 at least
    token = batch.samples * frames * channels * exact
    total["ulysses"] += max(groups[mesh["ring"].rank]) * token * (mesh["ulysses"].degree - 1)
    total["ring"] += max(map(sum, groups)) * token * (mesh["ring"].degree - 1)
    for axis in ("ulysses", "ring"):
        total[axis] += sum(2 * size * (mesh[axis].degree - 1) // mesh[axis].degree for size in sums)
    return dict(+total)


def forward_bytes(
    structure: ModelProfile, place: RankLayout, batch: MicroBatch, *, gathers: bool = True
) -> dict[str, int]:
    """Axis -> bytes of one forward without gradient.

    ``gathers``: weights are gathered; with ZeRO 1 and 2 only the first forward does so.
    """
    total: Counter[str] = Counter()
    shares = TokenShares(structure, place, batch)
    for unit in structure.units:
        total += _forward(unit, shares)
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
    return sum(-(-rows // place.fsdp_degree) * values for rows, values in _matrices(parameters, place))


def held(parameters: Iterable[Parameter], place: RankLayout) -> int:
    """Values of these parameters that this process really holds."""
    return sum(_rows(rows, place) * values for rows, values in _matrices(parameters, place))


def gather_bytes(unit: ShardUnit, place: RankLayout) -> int:
    """Sent in one all-gather of a unit's weights."""
    sent = padded(unit.parameters, place) * place.itemsize("compute") * (place.fsdp_degree - 1)
    return sent * place.peers.follows(FSDP)


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
            reductions = count * reductions_per_step(zero, batches) * place.peers.reductions
            total[FSDP] += reductions * trained * (place.fsdp_degree - 1) * place.peers.follows(FSDP)
        if place.replicas > 1 and place.peers.follows(REPLICATE):
            total[REPLICATE] += count * all_reduce_bytes(trained, place.replicas)
    return total


def _shared_gradients(structure: ModelProfile, place: RankLayout) -> Counter[str]:
    """Once per step along tensor: gradients of what all hold but use for their own heads, and the norm's square."""
    tensor = place.mesh["tensor"].degree
    if tensor == 1 or not place.peers.follows("tensor"):
        return Counter()
    shared = sum(
        n * held((p for p in u.parameters if p.is_shared and p.trains), place) for u, n in structure.unit_counts
    )
    is_cut = any(p.cut_dim is not None and p.trains for unit, _ in structure.unit_counts for p in unit.parameters)
    sizes = (shared, int(is_cut))
    return Counter(tensor=sum(all_reduce_bytes(n * place.itemsize("master"), tensor) for n in sizes))


def _exchanged(unit: ShardUnit, shares: TokenShares, kind: str) -> Counter[str]:
    """Forward and backward of one micro-batch; what is recomputed goes through forward twice."""
    again = RERUN[kind]
    total = Counter[str]()
    for slot in unit.attentions:
        total += _attention_forward(slot, shares)
        if again.around:
            total += _attention_forward(slot, shares, inside=again.attention)
        total += _attention_backward(slot, shares)
    for switch in unit.switches:
        sent, returned = _switch_bytes(switch, shares)
        total["ulysses"] += sent * (1 + (again.around and switch.reruns)) + returned * switch.trains
    for layer in unit.layers:
        total["tensor"] += _layer_forward(layer, shares) * (1 + (again.layers and layer.reruns))
        total["tensor"] += _layer_backward(layer, shares)
    for norm in unit.norms:
        total["tensor"] += _norm_bytes(norm, shares) * (1 + (again.layers and norm.reruns) + norm.input_trains)
    return +total


def _forward(unit: ShardUnit, shares: TokenShares) -> Counter[str]:
    total = Counter[str]()
    for slot in unit.attentions:
        total += _attention_forward(slot, shares)
    total["ulysses"] += sum(_switch_bytes(switch, shares)[0] for switch in unit.switches)
    total["tensor"] += sum(_layer_forward(layer, shares) for layer in unit.layers)
    total["tensor"] += sum(_norm_bytes(norm, shares) for norm in unit.norms)
    return +total


@dataclass(frozen=True)
class _Share:
    """One process's part in an attention slot: tokens and heads here, in its ulysses group, and on the ring."""

    sequences: int  # of all samples
    mine: int  # heads of this process inside attention
    away: int  # heads of the others that bytes are counted to
    local: int  # tokens of this process
    group: tuple[int, ...]  # tokens of each process of its ulysses group
    ring: tuple[int, ...]  # tokens of each place on the ring
    elsewhere: int  # tokens of the others of that group that bytes are counted to
    ulysses: Axis | None  # None: nothing is exchanged for heads


def _share(slot: Attention, shares: TokenShares) -> _Share:
    ring, ulysses = shares.ring, shares.ulysses
    is_whole = ulysses.degree == 1 or (slot.axis == "space" and shares.switches)
    lengths = shares.lengths(slot.queries)
    groups = ring_groups(lengths, ulysses.degree)
    heads = slot.heads // shares.tensor
    counted, group = shares.counted, groups[ring.rank]
    by_process = (heads,) * ulysses.degree if is_whole else head_shares(heads, ulysses.degree)
    return _Share(
        sequences=slot.batch.at(shares.local) * shares.batch.samples,
        mine=by_process[ulysses.rank],
        away=sum(compress(by_process, counted)),
        local=lengths[shares.rank],
        group=group,
        elsewhere=sum(compress(group, counted)),
        ring=tuple(group[0] if is_whole else sum(group) for group in groups),
        ulysses=None if is_whole else ulysses,
    )


def _attention_forward(slot: Attention, shares: TokenShares, *, inside: bool = True) -> Counter[str]:
    """q, k, v of other heads go out and come back as outputs; keys and values of every part but one are passed on.

    ``inside``: False where attention itself is kept, and with it what the ring has passed.
    """
    sent = Counter[str]()
    if not IS_SPREAD[slot.axis]:
        return sent
    if slot.axis == "window":
        return _window_bytes(slot, shares, there=3, back=1)
    share, ring = _share(slot, shares), shares.ring
    size = shares.itemsize() * share.sequences * slot.head_dim
    has_mask = shares.batch.has_mask and slot.is_masked
    if share.ulysses is not None:
        sent["ulysses"] = (3 * share.local * share.away + share.elsewhere * share.mine) * size
        if has_mask and shares.follows("ulysses"):
            sent["ulysses"] += max(share.group) * share.sequences * (share.ulysses.degree - 1)
    if ring.degree > 1 and shares.follows("ring"):
        stays = share.ring[(ring.rank + 1) % ring.degree]  # what the next process had at the start
        sent["ring"] = 2 * (sum(share.ring) - stays) * share.mine * size * inside
        if has_mask:
            sent["ring"] += max(share.ring) * share.sequences * (ring.degree - 1)
    return sent


def _attention_backward(slot: Attention, shares: TokenShares) -> Counter[str]:
    """Ulysses in reverse; the ring passes keys and values again, and the gradients of every part, in fp32 at least."""
    sent = Counter[str]()
    if not IS_SPREAD[slot.axis]:
        return sent
    if slot.axis == "window":
        return _window_bytes(slot, shares, there=1, back=3)
    share, ring, compute = _share(slot, shares), shares.ring, shares.itemsize()
    per_head = share.sequences * slot.head_dim
    if share.ulysses is not None:
        sent["ulysses"] = (share.local * share.away + 3 * share.elsewhere * share.mine) * per_head * compute
    if ring.degree > 1 and shares.follows("ring"):
        stays = share.ring[(ring.rank + 1) % ring.degree]
        values = 2 * share.mine * per_head
        sent["ring"] = values * ((sum(share.ring) - stays) * compute + sum(share.ring) * shares.itemsize(torch.float32))
    return sent


def _window_bytes(slot: Attention, shares: TokenShares, *, there: int, back: int) -> Counter[str]:
    """Heads of the others go out, ``there`` tensors of them, and their places ``back``; over ulysses, then the ring."""
    ring, ulysses = shares.ring, shares.ulysses
    size = slot.batch.at(shares.local) * shares.batch.samples * slot.head_dim * shares.itemsize()
    groups = ring_groups(shares.lengths(slot.queries), ulysses.degree)
    heads, places, sent = slot.heads // shares.tensor, groups[ring.rank], Counter[str]()
    steps = ((ulysses, places), (ring, tuple(sum(group) for group in groups)))
    for axis, lengths in steps:
        parts, counted = even_sizes(heads, axis.degree), shares.place.peers.counted(axis)
        mine = parts[axis.rank]
        away, elsewhere = sum(compress(parts, counted)), sum(compress(lengths, counted))
        sent[axis.name] += (there * lengths[axis.rank] * away + back * elsewhere * mine) * size
        heads = mine
    return +sent


def _switch_bytes(switch: Switch, shares: TokenShares) -> tuple[int, int]:
    """(sent in forward, in backward): tokens of other frames go out, and places of other processes come back."""
    if not shares.switches:
        return 0, 0
    here = shares.local
    value = switch.values * shares.batch.samples * shares.itemsize(switch.dtype)
    there = list(compress(shares.group, shares.counted))
    to_space = sum(peer["frames_inside"] for peer in there) * here["places"] * value
    to_time = sum(peer["places"] for peer in there) * here["frames_inside"] * value
    return (to_space, to_time) if switch.whole == "space" else (to_time, to_space)


def _layer_forward(layer: Layer, shares: TokenShares) -> int:
    degree = shares.tensor
    if degree == 1 or layer.kind in ("column", "whole") or not shares.follows("tensor"):
        return 0
    out = shares.rows(layer.rows) * layer.outputs * shares.itemsize()
    return all_reduce_bytes(out, degree) if layer.kind == "row" else out // degree * (degree - 1)


def _layer_backward(layer: Layer, shares: TokenShares) -> int:
    degree = shares.tensor
    if degree == 1 or not layer.sums_input or not shares.follows("tensor"):
        return 0
    return all_reduce_bytes(shares.rows(layer.rows) * layer.inputs * shares.itemsize(), degree)


def _norm_bytes(norm: Norm, shares: TokenShares) -> int:
    """A number per row, in fp32 at least; as many in backward."""
    if shares.tensor == 1 or not shares.follows("tensor"):
        return 0
    return all_reduce_bytes(shares.rows(norm.rows) * shares.itemsize(torch.float32), shares.tensor)


def _matrices(parameters: Iterable[Parameter], place: RankLayout) -> Iterable[tuple[int, int]]:
    return _merged(tuple(parameters), place.mesh["tensor"].degree)


@lru_cache(maxsize=256)
def _merged(parameters: tuple[Parameter, ...], tensor: int) -> tuple[tuple[int, int], ...]:
    """(rows, values of a row) of parameters on one of ``tensor`` processes, those with as many rows together: a search
    over layouts asks for the same ones thousands of times."""
    found: dict[int, int] = {}
    for parameter in parameters:
        rows, *row = parameter.cut(tensor)
        found[rows] = found.get(rows, 0) + prod(row)
    return tuple(found.items())


def _rows(rows: int, place: RankLayout) -> int:
    """Of a dim of ``rows``: torch.chunk gives the first processes ceil(rows / n) each."""
    chunk = -(-rows // place.fsdp_degree)
    return max(0, min(rows, chunk * (place.fsdp_rank + 1)) - chunk * place.fsdp_rank)
