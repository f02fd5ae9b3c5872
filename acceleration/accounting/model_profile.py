"""What a model is made of, as far as bytes and memory depend on it: found by running it on the meta device.

Nothing is computed and nothing allocated, so a model of any size takes a second. Counts are linear in the text and
image tokens of a sample, which three small runs determine exactly.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from acceleration import protocol

# Runs the model's forward on meta tensors: (model, text tokens, image tokens), one sample.
Forward = Callable[[nn.Module, int, int], Tensor]

TXT, IMG = 16, 64  # tokens of the runs; any that are positive do


@dataclass(frozen=True)
class Linear:
    """A count that is linear in the tokens of a sample."""

    txt: int
    img: int
    once: int

    def at(self, txt: int, img: int) -> int:
        return self.txt * txt + self.img * img + self.once


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
    rows: Linear  # of its input, per sample
    input_trains: bool  # a gradient flows to its input
    reruns: bool  # a recomputed block gets as far as the layer's exchange before it has all that backward needs


@dataclass(frozen=True)
class Attention:
    """One attention slot."""

    heads: int
    head_dim: int
    tokens: Linear


@dataclass(frozen=True)
class ShardUnit:
    """What sharding gathers and reduces as one: a block, or the rest of the model."""

    parameters: tuple[Parameter, ...]
    layers: tuple[Layer, ...]
    attentions: tuple[Attention, ...]


@dataclass(frozen=True)
class ModelProfile:
    """Blocks in order, then what is left."""

    blocks: tuple[ShardUnit, ...]
    rest: ShardUnit

    @property
    def units(self) -> tuple[ShardUnit, ...]:
        return (*self.blocks, self.rest)

    @cached_property
    def like(self) -> tuple[int, ...]:
        """For every block the number of the first one that is like it but for its names."""
        first: dict[tuple[Any, ...], int] = {}
        shapes = (tuple((p.shape, p.trains, p.cut_dim, p.is_shared) for p in unit.parameters) for unit in self.blocks)
        keys = ((unit.layers, unit.attentions, shape) for unit, shape in zip(self.blocks, shapes, strict=True))
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


def profile_of(model: nn.Module, forward: Forward) -> ModelProfile:
    """What ``model``, whole and on the meta device, is made of."""
    assert isinstance(model, protocol.Shardable), type(model)
    runs = [_run(model, forward, *tokens) for tokens in ((TXT, IMG), (2 * TXT, IMG), (TXT, 2 * IMG))]
    calls = [_linear_calls(*same) for same in zip(*runs, strict=True)]
    owner = {id(module): index for index, block in enumerate(protocol.blocks(model)) for module in block.modules()}
    rest = len(protocol.blocks(model))
    units = [ShardUnit((), (), ()) for _ in range(rest + 1)]
    for module, call in calls:
        index = owner.get(id(module), rest)
        unit = units[index]
        if isinstance(call, Layer):
            units[index] = replace(unit, layers=(*unit.layers, call))
        else:
            units[index] = replace(unit, attentions=(*unit.attentions, call))
    for index, parameters in _parameters(model, owner, rest).items():
        units[index] = replace(units[index], parameters=tuple(parameters))
    return ModelProfile(tuple(units[:-1]), units[-1])


@dataclass
class _Call:
    """One call of a layer or a slot in one run."""

    module: nn.Module
    kind: str | None  # of a layer; None: an attention slot
    shape: tuple[int, ...]
    input_trains: bool
    at: int  # how many tensors had been kept for backward when it ended
    kept_in_block: int = 0  # and when its block ended


class _Slot(nn.Module):
    """Stands in an attention slot and notes the call."""

    def __init__(self, note: Callable[[nn.Module, Tensor], None]) -> None:
        super().__init__()
        self.note = note

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None, context: Any = None
    ) -> Tensor:
        self.note(self, q)
        return q + k * v


def _run(model: nn.Module, forward: Forward, txt: int, img: int) -> list[_Call]:
    """Every call of a linear layer and of a slot, in order."""
    calls: list[_Call] = []
    kept = 0
    block_start = 0

    def note(module: nn.Module, kind: str | None, x: Tensor) -> None:
        calls.append(_Call(module, kind, tuple(x.shape), x.requires_grad, kept))

    def keep(x: Tensor) -> Tensor:
        nonlocal kept
        kept += 1
        return x

    def begin(*_: Any) -> None:
        nonlocal block_start
        block_start = len(calls)

    def end(*_: Any) -> None:
        for call in calls[block_start:]:
            call.kept_in_block = kept

    handles = []
    kinds = planned_kinds(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            kind = kinds.get(name, "whole")
            handles.append(module.register_forward_hook(lambda m, args, out, kind=kind: note(m, kind, args[0])))
    for block in protocol.blocks(model):
        handles += [block.register_forward_pre_hook(begin), block.register_forward_hook(end)]
    slots = list(protocol.slots(model, model.attention_cores))  # type: ignore[arg-type]
    for parent, attribute, _ in slots:
        setattr(parent, attribute, _Slot(lambda m, q: note(m, None, q)))
    stand_ins = [getattr(parent, attribute) for parent, attribute, _ in slots]
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            forward(model, txt, img)
    finally:
        for handle in handles:
            handle.remove()
        for parent, attribute, own in slots:
            setattr(parent, attribute, own)
    real = {id(stand_in): own for stand_in, (_, _, own) in zip(stand_ins, slots, strict=True)}
    for call in calls:
        call.module = real.get(id(call.module), call.module)
    return calls


def _linear_calls(first: _Call, more_txt: _Call, more_img: _Call) -> tuple[nn.Module, Layer | Attention]:
    """One call of three runs -> what it is at any number of tokens."""
    module = first.module
    assert module is more_txt.module is more_img.module
    if first.kind is None:
        tokens = _fit(*(call.shape[1] for call in (first, more_txt, more_img)))
        return module, Attention(first.shape[2], first.shape[3], tokens)
    rows = _fit(*(torch.Size(call.shape[:-1]).numel() for call in (first, more_txt, more_img)))
    assert isinstance(module, nn.Linear)
    reruns = first.kept_in_block > first.at
    return module, Layer(first.kind, module.in_features, module.out_features, rows, first.input_trains, reruns)


def _fit(first: int, more_txt: int, more_img: int) -> Linear:
    txt, img = (more_txt - first) // TXT, (more_img - first) // IMG
    return Linear(txt, img, first - txt * TXT - img * IMG)


def planned_kinds(model: nn.Module) -> dict[str, str]:
    """Name of every linear layer that tensor parallelism cuts -> how."""
    patterns: dict[str, protocol.LayerPlan] = model.tensor_plan()  # type: ignore[operator]
    return {
        name: kind
        for pattern, (kind, _) in patterns.items()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and protocol.matches(name, pattern)
    }


def _parameters(model: nn.Module, owner: dict[int, int], rest: int) -> dict[int, list[Parameter]]:
    kinds = planned_kinds(model)
    shared: tuple[str, ...] = model.tensor_shared  # type: ignore[assignment]
    found: dict[int, list[Parameter]] = {}
    for prefix, module in model.named_modules():
        kind = kinds.get(prefix)
        for key, value in module.named_parameters(recurse=False):
            name = f"{prefix}.{key}" if prefix else key
            cut_dim = None if kind is None or (kind == "row" and key == "bias") else int(kind == "row")
            is_shared = any(protocol.matches(name, pattern) for pattern in shared)
            parameter = Parameter(name, tuple(value.shape), value.requires_grad, cut_dim, is_shared)
            found.setdefault(owner.get(id(module), rest), []).append(parameter)
    return found
