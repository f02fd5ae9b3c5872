"""Peak memory of one process in a step: what sharding keeps and moves, laid over the timeline of activations.

Walks through a step as FSDP2 does and adds up bytes by purpose. The order of its allocations (torch 2.11 to 2.13):

* forward gathers a unit into a buffer, then copies it out; the buffer of a unit stays until the next is
  copied out (``wait_for_unshard`` holds on to it while it fills the next unit).
* backward gathers the unit below ahead of time (ZeRO 3), and drops the buffer when it is copied out.
* gradients are packed into a buffer of reduce type, which stays until the next unit's; what comes out is of reduce
  type, and is cast to master type.
"""

from collections import Counter
from dataclasses import dataclass
from math import prod

from acceleration import lora
from acceleration.accounting.activation_memory import Segment, Timeline
from acceleration.accounting.comm_volume import held, padded
from acceleration.accounting.model_profile import ModelProfile, Parameter, ShardUnit
from acceleration.accounting.rank_layout import RankLayout
from acceleration.config import OptimConfig

MOMENTS = {"adamw": 2, "sgd": 0}  # values that an optimizer keeps per weight


@dataclass(frozen=True)
class Footprint:
    """Bytes of one process by purpose at the moment when they are most."""

    weights: int  # masters, in pieces
    optimizer: int
    ema: int
    gradients: int
    gathered: int  # weights in compute type
    buffers: int  # of communication
    activations: int  # with the gradients of the unit at work
    frozen: int = 0  # autoencoder and text encoder

    @property
    def total(self) -> int:
        return sum(vars(self).values())

    @property
    def state(self) -> int:
        """What stays between steps."""
        return self.weights + self.optimizer + self.ema + self.frozen


def state_of(
    structure: ModelProfile, place: RankLayout, optim: OptimConfig, frozen: int = 0, *, streams: bool = False
) -> Footprint:
    """What a process keeps on its device between steps.

    Args:
        streams: frozen weights of blocks are in CPU memory, and those outside of them whole on every process.
    """
    master, compute = place.itemsize("master"), place.itemsize("compute")
    trained = trained_values(structure, place) * master
    on_device = place.cfg.offload != "parameters"
    moves_optimizer = place.cfg.offload != "none"
    weights = sum(n * padded(trains(unit), place) for unit, n in structure.unit_counts) * master
    if streams:
        weights += whole_frozen(structure.rest, place)
    else:  # beside adapters frozen weights are kept in the type that blocks compute in
        still = compute if any(lora.is_adapter(p.name) for p in structure.parameters) else master
        weights += sum(n * padded(is_frozen(unit), place) for unit, n in structure.unit_counts) * still
    return Footprint(
        weights=weights if on_device else 0,
        optimizer=0 if moves_optimizer else trained * MOMENTS[optim.kind],
        ema=trained if optim.ema_decay and not moves_optimizer else 0,
        gradients=0,
        gathered=0,
        buffers=0,
        activations=0,
        frozen=frozen,
    )


def trains(unit: ShardUnit) -> list[Parameter]:
    """The parameters that are trained."""
    return [parameter for parameter in unit.parameters if parameter.trains]


def is_frozen(unit: ShardUnit) -> list[Parameter]:
    """The others."""
    return [parameter for parameter in unit.parameters if not parameter.trains]


def whole_frozen(unit: ShardUnit, place: RankLayout) -> int:
    """Bytes of a unit's frozen weights where sharding leaves them whole."""
    tensor = place.mesh["tensor"].degree
    return sum(prod(p.cut(tensor)) for p in is_frozen(unit)) * place.itemsize("compute")


def trained_values(structure: ModelProfile, place: RankLayout) -> int:
    """Values of gradients that a process holds when the optimizer steps."""
    return sum(n * held((p for p in unit.parameters if p.trains), place) for unit, n in structure.unit_counts)


def peak(
    structure: ModelProfile,
    place: RankLayout,
    optim: OptimConfig,
    first: Timeline,
    more: Timeline | None = None,
    *,
    batches: int = 1,
    frozen: int = 0,
    streams: bool = False,
) -> Footprint:
    """The moment of a step with ``batches`` micro-batches when this process holds most.

    Args:
        first: a micro-batch, blocks as in ``structure``.
        more: a later micro-batch, where whole gradients are accumulated (ZeRO 0 and 1); None: as the first.
        streams: see ``state_of``.
    """
    walk = _Walk(structure, place, state_of(structure, place, optim, frozen, streams=streams), streams=streams)
    for index in range(batches):
        whole = place.cfg.zero < 2 and index > 0  # gradients of all micro-batches so far are there, whole
        walk.micro_batch(more if whole and more else first, last=index == batches - 1, is_first=index == 0)
    return walk.worst


def forward_peak(structure: ModelProfile, place: RankLayout, line: Timeline) -> Footprint:
    """The moment of a forward without gradients when this process holds most, on a model whose weights are kept in the
    type that they compute in. Below ZeRO 3 what was gathered stays, for the next forward."""
    on_device = place.cfg.offload != "parameters"
    weights = sum(n * padded(unit.parameters, place) for unit, n in structure.unit_counts) * place.itemsize("compute")
    state = Footprint(weights * on_device, *[0] * 6)
    walk = _Walk(structure, place, state, streams=False)
    walk.gather(walk.rest, forward=True)
    walk.run(line.before)
    for index, segment in enumerate(line.forward):
        walk.gather(index, forward=True)
        walk.run(segment, moving=walk.beside(index, 1))
        if place.cfg.zero == 3:
            walk.free(index)
    walk.run(line.between)
    return walk.worst


class _Walk:
    def __init__(self, structure: ModelProfile, place: RankLayout, state: Footprint, *, streams: bool) -> None:
        self.place, self.state = place, state
        self.now: Counter[str] = Counter()
        self.worst = state
        self.gathered: set[int] = set()
        self.packed = 0  # the buffer of the unit reduced last
        self.copied = 0  # the buffer of the unit gathered last
        self.rest = len(structure.blocks)
        like = (*structure.like, self.rest)
        units = {index: structure.units[index].parameters for index in set(like)}
        gathered = {i: [p for p in unit if p.trains or not streams] for i, unit in units.items()}
        pieces = {index: padded(parameters, place) for index, parameters in gathered.items()}
        trained = {index: padded((p for p in parameters if p.trains), place) for index, parameters in units.items()}
        self.weights = [pieces[index] for index in like]  # values of a piece of every unit
        self.trained = [trained[index] for index in like]  # and of a piece of its gradient
        frozen = {index: whole_frozen(structure.units[index], place) if streams else 0 for index in set(like)}
        self.streamed = [*(frozen[index] for index in structure.like), 0]  # bytes of every block; the next one: none
        self.ahead = place.cfg.prefetch if place.cfg.zero == 3 and self.place.fsdp_degree > 1 else 0

    def micro_batch(self, timeline: Timeline, *, last: bool, is_first: bool) -> None:
        zero = self.place.cfg.zero
        accumulates = zero < 2 and not is_first
        self.gather(self.rest, forward=True)
        self.run(timeline.before)
        for index, segment in enumerate(timeline.forward):
            self.gather(index, forward=True)
            self.run(segment, moving=self.beside(index, 1))
            if zero == 3:
                self.free(index)
        self.now["buffers"] -= self.copied
        self.copied = 0
        spent = 0  # gradients of blocks that the timeline still holds, and sharding has taken
        if zero == 3:
            self.free(self.rest)
            self.gather(self.rest, below=self.rest - 1)
        self.run(timeline.between, moving=self.streamed[self.rest - 1] if self.rest else 0)
        for index in reversed(range(self.rest)):
            if zero == 3:
                self.gather(index, below=index - 1)
            self.run(timeline.backward[index], spent, self.beside(index, -1))
            if last or zero >= 2:
                self.free(index)
            grads = self.compute_gradients(index)
            if not accumulates:
                spent += grads
            self.take(index, grads, timeline.backward[index].end - spent, last=last, accumulates=accumulates)
        self.run(timeline.after, spent)
        if last or zero >= 2:
            self.free(self.rest)
        rest = self.compute_gradients(self.rest)
        self.take(self.rest, rest, 0, last=last, accumulates=accumulates)
        self.now["activations"] = 0
        if last:
            self.now["buffers"] -= self.packed
            self.packed = 0

    def compute_gradients(self, index: int) -> int:
        """Bytes of a unit's whole gradients as backward makes them."""
        return self.trained[index] * self.place.fsdp_degree * self.place.itemsize("compute")

    def gather(self, index: int, *, below: int = -1, forward: bool = False) -> None:
        """All-gather into a buffer, and copy out. ``below``: the unit whose buffer is filled ahead of time."""
        if index in self.gathered:
            return
        size = self.whole_weights(index)
        self.gathered.add(index)
        if self.place.fsdp_degree == 1:
            self.now["gathered"] += size
            self.look()
            return
        self.now["buffers"] += size - self.now.pop("ahead", 0)
        self.look()
        self.now["gathered"] += size
        self.look()
        self.now["buffers"] -= self.copied
        self.copied = size if forward else 0
        self.now["buffers"] -= size - self.copied
        if below >= 0 and below not in self.gathered:
            self.now["ahead"] = self.whole_weights(below)
            self.now["buffers"] += self.now["ahead"]
            self.look()

    def whole_weights(self, index: int) -> int:
        """Bytes of a unit's weights in compute type, padded to equal pieces."""
        return self.weights[index] * self.place.fsdp_degree * self.place.itemsize("compute")

    def free(self, index: int) -> None:
        if index in self.gathered:
            self.now["gathered"] -= self.whole_weights(index)
            self.gathered.discard(index)

    def beside(self, index: int, way: int) -> int:
        """Bytes of blocks that are there or on their way while one runs, beside what ``gather`` counts: those that
        stream, and those that ``prefetch`` gathers earlier than FSDP2 by itself; ``way``: 1 in forward, -1 in backward.
        """
        streamed = self.streamed[index] + (self.streamed[index + way] if 0 <= index + way < self.rest else 0)
        first = 1 if way > 0 else 2  # in backward the next one is counted
        later = (index + way * n for n in range(first, self.ahead + 1))
        return streamed + sum(self.whole_weights(i) for i in later if 0 <= i < self.rest and i not in self.gathered)

    def run(self, segment: Segment, spent: int = 0, moving: int = 0) -> None:
        """``moving``: bytes of weights that are there for this segment alone."""
        self.now["activations"] = segment.peak - spent
        self.now["gathered"] += moving
        self.look()
        self.now["gathered"] -= moving
        self.now["activations"] = segment.end - spent

    def take(self, index: int, grads: int, left: int, *, last: bool, accumulates: bool) -> None:
        """After backward of a unit: its whole gradients are kept, or reduced. ``left``: activations without them."""
        place, trained, zero = self.place, self.trained[index], self.place.cfg.zero
        whole = trained * place.fsdp_degree
        wide = place.itemsize("reduce") if place.cfg.precision.reduce != place.cfg.precision.compute else 0
        kept = whole * (wide or place.itemsize("compute"))  # of a unit, between micro-batches
        self.now["activations"] = left
        if zero < 2 and not last:
            if not accumulates:
                self.now["gradients"] += kept
                self.look()
            return
        source = kept if accumulates else grads
        if not accumulates:
            self.now["gradients"] += grads
        self.now["buffers"] -= self.packed
        self.packed = whole * place.itemsize("reduce")
        self.now["buffers"] += self.packed
        self.look()
        self.now["gradients"] -= source
        reduced = trained * place.itemsize("reduce")
        self.now["buffers"] += reduced + (self.packed if place.fsdp_degree == 1 else 0)  # divided by 1 on its way
        self.look()
        self.now["buffers"] -= self.packed if place.fsdp_degree == 1 else 0
        cast = trained * place.itemsize("master")
        on_host = place.cfg.offload == "parameters"  # so is the gradient
        partial = place.replicas > 1 and not last
        if partial or place.cfg.precision.reduce == place.cfg.precision.master:
            self.now["buffers"] -= reduced
            if f"sharded {index}" not in self.now and not on_host:
                self.now["gradients"] += reduced
                self.now[f"sharded {index}"] = 0
        else:
            self.now["buffers"] += cast
            self.look()
            self.now["buffers"] -= cast + reduced
            if f"sharded {index}" not in self.now and not on_host:
                self.now["gradients"] += cast
                self.now[f"sharded {index}"] = 0
        self.look()

    def look(self) -> None:
        """Compare with the worst moment so far."""
        parts = {name: self.now[name] for name in ("gradients", "gathered", "buffers", "activations")}
        if sum(parts.values()) + self.state.total > self.worst.total:
            self.worst = Footprint(**(vars(self.state) | parts))
