"""What a model is made of, as far as bytes and memory depend on it (profiling.py finds it).

How often something is done per sample is a polynomial in the sizes of the sample: of its text and image tokens, or of
its text, frames and places. Between two axis switches frames and places have names of their own, as they
have other sizes there; and so has text, ``txt_here``, where a model that is given all of it goes on with a part.
``picture`` are the tokens of a picture that is read beside the text.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from typing import Any

import torch

from acceleration.protocol import SHARE_INPUT, AttentionAxis, TokenAxis

Sizes = Mapping[str, int]
Subset = frozenset[str]


@dataclass(frozen=True)
class Count:
    """A polynomial in the sizes of a sample: {names that are multiplied: factor}. A factor is no whole number where
    some of what is counted stand for several, as keys of a coarser grid."""

    terms: tuple[tuple[tuple[str, ...], int | Fraction], ...]

    @staticmethod
    def of(terms: Mapping[str | tuple[str, ...], int | Fraction]) -> "Count":
        """``{"txt": 1, ("frames", "places"): 2, (): 3}`` is txt + 2 frames places + 3."""
        named = (((names,) if isinstance(names, str) else tuple(sorted(names)), n) for names, n in terms.items())
        return Count(tuple(sorted((names, n) for names, n in named if n)))

    def at(self, sizes: Sizes) -> int:
        total: int | Fraction = 0
        for names, factor in self.terms:
            for name in names:
                factor *= sizes[name]
            total += factor
        return int(total)

    @property
    def fixed(self) -> int:
        """What depends on no size."""
        return int(sum(factor for names, factor in self.terms if not names))

    @property
    def names(self) -> Subset:
        """The sizes that it depends on."""
        return frozenset(name for names, _ in self.terms for name in names)


@dataclass(frozen=True)
class Parameter:
    """One parameter as every process would hold it without sharding."""

    name: str
    shape: tuple[int, ...]
    trains: bool
    cut_dim: int | None = None  # which dim tensor parallelism cuts; None: held whole by all
    is_shared: bool = False  # its gradient is summed over the tensor axis

    def cut(self, tensor: int) -> tuple[int, ...]:
        """Its shape on one of ``tensor`` processes."""
        return tuple(n // tensor if dim == self.cut_dim else n for dim, n in enumerate(self.shape))


@dataclass(frozen=True)
class Layer:
    """A linear layer."""

    kind: str  # column, row or gather, as tensor parallelism cuts it (see tensor_parallel.py); whole: not cut
    inputs: int
    outputs: int
    rows: Count  # of its input, per sample
    input_trains: bool  # a gradient flows to its input
    reruns: bool  # a recomputed block gets as far as the layer's exchange before it has all that backward needs
    trains: bool = True  # its weight gets a gradient
    reads_again: bool = False  # an earlier cut layer of the unit has read the same: their gradients are summed as one

    @property
    def sums_input(self) -> bool:
        """Whether cut layers exchange the gradient of their input in its backward."""
        return self.kind in SHARE_INPUT and self.input_trains and not self.reads_again


@dataclass(frozen=True)
class Norm:
    """A norm over all heads, whose squares the processes sum that tensor parallelism gives some heads each."""

    rows: Count  # of its input, per sample
    input_trains: bool  # as of a layer
    reruns: bool


@dataclass(frozen=True)
class Attention:
    """One call of an attention slot; or of attention in no slot, each process's own, which counts as ``cross``."""

    axis: AttentionAxis
    heads: int
    head_dim: int
    batch: Count  # sequences per sample; of windows its frames, each of which queries by its places
    queries: Count  # of a sequence
    keys: Count
    is_masked: bool  # keys are masked where text is


@dataclass(frozen=True)
class Switch:
    """One call of an axis switch."""

    whole: TokenAxis  # behind it
    values: int  # of a frame and place
    dtype: torch.dtype  # bfloat16: what the model computes in; float32: that, but fp32 at least
    trains: bool  # a gradient flows through it
    reruns: bool  # as of a layer


@dataclass(frozen=True)
class ShardUnit:
    """What sharding gathers and reduces as one: a block, or the rest of the model."""

    parameters: tuple[Parameter, ...]
    layers: tuple[Layer, ...]
    attentions: tuple[Attention, ...]
    switches: tuple[Switch, ...] = ()
    norms: tuple[Norm, ...] = ()


@dataclass(frozen=True)
class ModelProfile:
    """Blocks in the order in which they run, then what is left."""

    blocks: tuple[ShardUnit, ...]
    rest: ShardUnit
    is_factored: bool = False  # time and space are kept apart

    @property
    def units(self) -> tuple[ShardUnit, ...]:
        return (*self.blocks, self.rest)

    @cached_property
    def like(self) -> tuple[int, ...]:
        """For every block the number of the first one that is like it but for its names."""
        first: dict[tuple[Any, ...], int] = {}
        shapes = (tuple((p.shape, p.trains, p.cut_dim, p.is_shared) for p in unit.parameters) for unit in self.blocks)
        keys = (
            (unit.layers, unit.attentions, unit.switches, unit.norms, shape)
            for unit, shape in zip(self.blocks, shapes, strict=True)
        )
        return tuple(first.setdefault(key, index) for index, key in enumerate(keys))

    @cached_property
    def unit_counts(self) -> tuple[tuple[ShardUnit, int], ...]:
        """Units that differ, and how many there are of each."""
        blocks = Counter(self.like)
        return (*((self.blocks[index], count) for index, count in blocks.items()), (self.rest, 1))

    @property
    def parameters(self) -> Iterator[Parameter]:
        return (parameter for unit in self.units for parameter in unit.parameters)

    @property
    def count(self) -> int:
        """Parameters in all."""
        return sum(torch.Size(parameter.shape).numel() for parameter in self.parameters)

    def without_frozen(self) -> "ModelProfile":
        """With the parameters alone that are trained: where frozen ones stream, sharding moves no others."""

        def of(unit: ShardUnit) -> ShardUnit:
            return replace(unit, parameters=tuple(p for p in unit.parameters if p.trains))

        return replace(self, blocks=tuple(map(of, self.blocks)), rest=of(self.rest))

    @cached_property
    def heads_along_space(self) -> int:
        """Of the attention that axis switches are for."""
        found = [slot.heads for unit, _ in self.unit_counts for slot in unit.attentions if slot.axis == "space"]
        return min(found, default=1)

    @cached_property
    def cuts_text(self) -> bool:
        """Whether text is a part of the sequence that is cut over processes; else every process has all of it."""
        return not self._of_sequence.isdisjoint({"txt", "txt_here"})

    @cached_property
    def cuts_text_itself(self) -> bool:
        """Whether the model is given all of the text on every process, and cuts it afterwards."""
        return "txt_here" in self._of_sequence

    @cached_property
    def _of_sequence(self) -> Subset:
        """The sizes that the length of the whole sequence depends on."""
        slots = (slot for unit, _ in self.unit_counts for slot in unit.attentions)
        return frozenset(name for slot in slots if slot.axis == "joint" for name in slot.queries.names)
