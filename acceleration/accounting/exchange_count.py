"""How many exchanges a process takes part in, one after the other, along every axis in one optimizer step, by formula.

Beside its bytes every exchange takes time: processes wait for the slowest one, and messages are on their way. Counted
as bytes are in comm_volume.py, of which this is the other half. Exchanges of a few bytes (the norm, the loss, gradients
that tensor parallelism shares) are left out here.
"""

from collections import Counter
from collections.abc import Sequence

from acceleration.accounting import comm_volume
from acceleration.accounting.comm_volume import RERUN
from acceleration.accounting.model_profile import Layer, ModelProfile, ShardUnit
from acceleration.accounting.rank_layout import MicroBatch, RankLayout, TokenShares
from acceleration.distributed.mesh import FSDP, REPLICATE
from acceleration.sequence.install import IS_SPREAD


def step_exchanges(structure: ModelProfile, place: RankLayout, batches: Sequence[MicroBatch]) -> dict[str, int]:
    """Axis -> exchanges; axes of degree 1 left out."""
    total: Counter[str] = Counter()
    kinds = zip(structure.like, comm_volume.recomputed(len(structure.blocks), place), strict=True)
    units = [(structure.blocks[index], kind, count) for (index, kind), count in Counter(kinds).items()]
    for batch, times in Counter(batches).items():
        shares = TokenShares(structure, place, batch)
        for unit, kind, count in (*units, (structure.rest, "none", 1)):
            for axis, number in _of_unit(unit, shares, kind).items():
                total[axis] += number * count * times
    return dict(total + _of_sharding(structure, place, len(batches)))


def _of_unit(unit: ShardUnit, shares: TokenShares, kind: str) -> Counter[str]:
    """Forward and backward of one micro-batch."""
    again, ring, total = RERUN[kind], shares.ring.degree, Counter[str]()
    for slot in unit.attentions:
        if not IS_SPREAD[slot.axis]:
            continue
        if slot.axis == "window":  # all at once there, and back
            for axis in (shares.ulysses, shares.ring):
                total[axis.name] += (2 * (1 + again.around) + 2) * (axis.degree > 1)
            continue
        has_mask = shares.batch.has_mask and slot.is_masked
        if shares.ulysses.degree > 1 and not (slot.axis == "space" and shares.switches):
            total["ulysses"] += (2 + has_mask) * (1 + again.around) + 2
        if ring > 1:  # keys and values, and on the way back their gradients, which go all the way round
            total["ring"] += (ring - 1) * (1 + again.attention) + 2 * ring - 1 + has_mask * (1 + again.around)
    if shares.switches:
        for switch in unit.switches:
            total["ulysses"] += 1 + (again.around and switch.reruns) + switch.trains
    if shares.tensor > 1:
        total["tensor"] += sum(_of_layer(layer, again.layers) for layer in unit.layers)
        total["tensor"] += sum(1 + (again.layers and norm.reruns) + norm.input_trains for norm in unit.norms)
    return total


def _of_layer(layer: Layer, runs_again: bool) -> int:
    forward = (1 + (runs_again and layer.reruns)) * (layer.kind not in ("column", "whole"))
    return forward + layer.sums_input


def _of_sharding(structure: ModelProfile, place: RankLayout, batches: int) -> Counter[str]:
    zero, total = place.cfg.zero, Counter[str]()
    for unit, count in structure.unit_counts:
        trains = any(parameter.trains for parameter in unit.parameters)
        if place.fsdp_degree > 1:
            total[FSDP] += count * comm_volume.gathers_per_step(zero, batches)
            total[FSDP] += count * comm_volume.reductions_per_step(zero, batches) * trains
        if place.replicas > 1:
            total[REPLICATE] += count * trains
    return total
