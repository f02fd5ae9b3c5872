"""A profile of a model, found by running it on the meta device: every call of a layer, a slot and a switch is noted.

Nothing is computed and nothing allocated, so a model of any size takes a second. What stands in a slot or for a switch
notes its call and gives something of the right shape, behind a switch of other sizes than before. The polynomials of
all counts follow exactly from a few small runs.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import combinations
from math import prod
from types import MappingProxyType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from acceleration import lora, protocol
from acceleration.accounting.model_profile import (
    Attention,
    Count,
    Layer,
    ModelProfile,
    Norm,
    Parameter,
    ShardUnit,
    Sizes,
    Subset,
    Switch,
)
from acceleration.sharding import tensor_parallel
from acceleration.sharding.shared_inputs import Reads

Found: TypeAlias = Layer | Norm | Attention | Switch

# Runs the model's forward on meta tensors for one sample with masked text: (model, **sizes), those that enter the model
Forward = Callable[..., Tensor]

# Sizes of the runs; any that are positive do.
JOINT = {"txt": 16, "img": 64}
FACTORED = {"txt": 16, "frames": 5, "places": 12, "frames_inside": 3, "places_inside": 7}
OUTSIDE, INSIDE = ("frames", "places"), ("frames_inside", "places_inside")  # of the switches


def profile_of(model: nn.Module, forward: Forward, more: Sizes = MappingProxyType({})) -> ModelProfile:
    """What ``model``, whole and on the meta device, is made of.

    Args:
        more: sizes that the forward of a joint model takes beside text and image tokens, and what they are at first.

    Raises:
        ValueError: blocks run in another order than ``block_lists`` says, or a count is no polynomial in the sizes.
    """
    assert isinstance(model, protocol.Parallelizable), type(model)
    is_factored = bool(model.axis_switches) or not {"space", "time", "window"}.isdisjoint(
        model.attention_cores.values()
    )
    owner, rest = protocol.block_numbers(model), len(protocol.blocks(model))
    units = [ShardUnit((), (), ()) for _ in range(rest + 1)]
    for module, call in _calls(model, forward, FACTORED if is_factored else JOINT | dict(more), is_factored):
        index = owner.get(id(module), rest)
        field = {Layer: "layers", Attention: "attentions", Switch: "switches", Norm: "norms"}[type(call)]
        units[index] = replace(units[index], **{field: (*getattr(units[index], field), call)})
    found = ModelProfile(tuple(units[:-1]), units[-1], is_factored)
    return extended(found, model, range(rest))


def extended(profile: ModelProfile, model: nn.Module, shown: Sequence[int]) -> ModelProfile:
    """The same with the parameters of ``model``, which has more blocks.

    Args:
        shown: for every block of ``model`` the number of one in ``profile`` that is called alike.
    """
    parameters = _parameters(model, protocol.block_numbers(model), len(shown))
    units = [replace(profile.blocks[like], parameters=tuple(parameters.get(i, ()))) for i, like in enumerate(shown)]
    return replace(
        profile, blocks=tuple(units), rest=replace(profile.rest, parameters=tuple(parameters.get(len(shown), ())))
    )


def _calls(model: nn.Module, forward: Forward, base: Sizes, is_factored: bool) -> list[tuple[nn.Module, Found]]:
    """Every call of a layer, a norm over all heads, a slot, attention outside of slots or a switch, in order."""
    runs: dict[Subset, list[_Call]] = {}

    def run(changed: Subset, factor: int = 2) -> list[_Call]:
        return _run(model, forward, {name: size * (factor if name in changed else 1) for name, size in base.items()})

    for changed in (frozenset[str](), *(frozenset([name]) for name in base)):
        runs[changed] = run(changed)
    if is_factored:  # the counts of joint models know no products
        for changed in _products(runs):
            runs[changed] = run(changed)
    changes = list(runs)
    found = []
    for same in zip(*runs.values(), strict=True):
        fit = _Fit(base, changes, same)
        found.append((same[0].module, same[0].as_found(fit)))
        assert all(call.module is same[0].module for call in same)
    if is_factored:
        _check(found, run(frozenset(base), 3), {name: size * 3 for name, size in base.items()})
    return found


def _products(runs: Mapping[Subset, "list[_Call]"]) -> list[Subset]:
    """Sizes that have to be changed together, as some count depends on all of them."""
    _, *singles = runs
    found: dict[Subset, None] = {}
    for same in zip(*runs.values(), strict=True):
        for counts in zip(*(call.counts for call in same), strict=True):
            names = [name for (name,), count in zip(singles, counts[1:], strict=True) if count != counts[0]]
            found |= {frozenset(s): None for size in range(2, len(names) + 1) for s in combinations(names, size)}
    return sorted(found, key=len)


def _check(found: "list[tuple[nn.Module, Any]]", seen: "list[_Call]", sizes: Sizes) -> None:
    """That counts are what another run sees.

    Raises:
        ValueError: one is not.
    """
    for (module, call), other in zip(found, seen, strict=True):
        counts: tuple[Count, ...] = (call.rows,) if isinstance(call, Layer | Norm) else ()
        counts = (call.batch, call.queries, call.keys) if isinstance(call, Attention) else counts
        if tuple(count.at(sizes) for count in counts) != other.counts:
            raise ValueError(f"{type(module).__name__}: its calls are no polynomial in {', '.join(sizes)}: {counts}")


@dataclass(frozen=True)
class _Fit:
    """The runs that a call was seen in: what was changed in each, by a factor of 2."""

    base: Sizes
    changes: list[Subset]
    calls: tuple["_Call", ...]

    def count(self, index: int) -> Count:
        """Of the numbers called ``index``: differences of runs, from the largest products down."""
        seen = {changed: call.counts[index] for changed, call in zip(self.changes, self.calls, strict=True)}
        terms: dict[Subset, int | Fraction] = {}
        for names in sorted(self.changes, key=len, reverse=True):
            subsets = (frozenset(s) for size in range(len(names) + 1) for s in combinations(names, size))
            rise: int | Fraction = sum((-1) ** (len(names) - len(s)) * seen[s] for s in subsets)
            rise -= sum(n * prod(self.base[name] for name in more) for more, n in terms.items() if more > names)
            factor = Fraction(rise, prod(self.base[name] for name in names))
            if factor.denominator > 1 and factor.numerator != 1:
                raise ValueError(f"{type(self.calls[0].module).__name__}: its calls are no polynomial: {seen}")
            terms[names] = int(factor) if factor.denominator == 1 else factor
        return Count.of({tuple(names): n for names, n in terms.items()})


@dataclass
class _Call:
    """One call of a layer, a norm over all heads, a slot or a switch in one run."""

    module: nn.Module
    name: str  # of a layer or norm: how it is cut; of a slot and a switch: the axis
    counts: tuple[int, ...]  # those that depend on sizes
    shape: tuple[int, ...]  # of its input
    dtype: torch.dtype
    trains: bool  # a gradient flows to it
    at: int  # how many tensors had been kept for backward when it ended
    kept_in_block: int = 0  # and when its block ended
    reads_again: bool = False  # a cut layer of the unit has read the same tensor before
    is_masked: bool = False
    is_switch: bool = False

    def as_found(self, fit: _Fit) -> Found:
        """What it is for any sizes."""
        module, name, reruns = self.module, self.name, self.kept_in_block > self.at
        if name == "norm":
            return Norm(fit.count(0), self.trains, reruns)
        if isinstance(module, nn.Linear):
            trains = module.weight.requires_grad
            sizes = (module.in_features, module.out_features, fit.count(0))
            return Layer(name, *sizes, self.trains, reruns, trains, self.reads_again)
        if self.is_switch:
            return Switch(name, prod(self.shape[3:]), self.dtype, self.trains, reruns)  # type: ignore[arg-type]
        batch, queries, keys = (fit.count(index) for index in range(3))
        heads, head_dim = self.shape[-2:]
        return Attention(name, heads, head_dim, batch, queries, keys, self.is_masked)  # type: ignore[arg-type]


class _Slot(nn.Module):
    """Stands in an attention slot and notes the call."""

    def __init__(self, note: Callable[..., None]) -> None:
        super().__init__()
        self.note = note

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None, context: Any = None
    ) -> Tensor:
        self.note(q, (q.shape[0], q.shape[1], k.shape[1]), is_masked=key_mask is not None)
        return q + (k * v).sum(dim=1, keepdim=True)


class _OutsideOfSlots(TorchFunctionMode):
    """Notes the calls of attention that is in no slot."""

    def __init__(self, note: Callable[..., None]) -> None:
        super().__init__()
        self.note = note

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is scaled_dot_product_attention:
            q, k = args[:2]  # (B, H, L, Dh)
            self.note(q.transpose(1, 2), (q.shape[0], q.shape[2], k.shape[2]))
        return func(*args, **(kwargs or {}))


class _WindowSlot(nn.Module):
    """Stands in a slot of attention in windows: the places of every frame meet the tokens of their windows."""

    def __init__(self, note: Callable[..., None], keys: Callable[[int], int]) -> None:
        super().__init__()
        self.note, self.keys = note, keys

    def forward(self, q: Tensor, k: Tensor, v: Tensor, **more: Any) -> Tensor:
        samples, frames, places = q.shape[:3]
        self.note(q, (samples * frames, places, self.keys(frames)))
        return q + k * v


class _Switched(nn.Module):
    """Stands in for an axis switch, gives frames and places their other sizes and notes the call."""

    def __init__(self, note: Callable[..., None], before: tuple[int, int], behind: tuple[int, int]) -> None:
        super().__init__()
        self.note, self.before, self.behind = note, before, behind

    def forward(self, x: Tensor, context: Any = None) -> Tensor:
        if x.shape[1:3] != self.before:
            raise ValueError(f"an axis switch must be given (B, frames, places, ...), not {tuple(x.shape)}")
        out = _Resized.apply(x, self.behind)
        self.note(x, ())
        return out


class _Resized(torch.autograd.Function):
    """Something of another size, through which gradients flow; keeps nothing, as the exchange does not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: tuple[int, int]) -> Tensor:
        return x.new_empty((x.shape[0], *sizes, *x.shape[3:]))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        raise AssertionError("only forward is run")


def _run(model: nn.Module, forward: Forward, sizes: Sizes) -> list[_Call]:
    """Every call of a linear layer, a norm over all heads, a slot and a switch, in order."""
    calls: list[_Call] = []
    order: list[nn.Module] = []
    kept = 0
    block_start = 0
    inside: nn.Module = model  # the block that runs, if one does

    def note(module: nn.Module, name: str, x: Tensor, counts: tuple[int, ...], **more: bool) -> None:
        calls.append(_Call(module, name, counts, tuple(x.shape), x.dtype, x.requires_grad, kept, **more))

    def keep(x: Tensor) -> Tensor:
        nonlocal kept
        kept += 1
        return x

    def begin(block: nn.Module, args: Any) -> None:
        nonlocal block_start, inside
        block_start, inside = len(calls), block
        order.append(block)

    def end(*_: Any) -> None:
        nonlocal inside
        inside = model
        for call in calls[block_start:]:
            call.kept_in_block = kept

    def noted_layer(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: Any, out: Any) -> None:
            again = name in protocol.SHARE_INPUT and reads[owner.get(id(layer))].of(args[0], position) < len(calls)
            note(layer, name, args[0], (prod(args[0].shape[:-1]),), reads_again=again)

        return hook

    def position() -> int:
        return len(calls)

    reads: defaultdict[int | None, Reads[int]] = defaultdict(Reads)  # of every block, and of what is outside
    kinds, owner = tensor_parallel.planned_kinds(model), protocol.block_numbers(model)
    noted = [(n, module) for n, module in model.named_modules() if isinstance(module, nn.Linear) or n in kinds]
    handles = [module.register_forward_hook(noted_layer(kinds.get(name, "whole"))) for name, module in noted]
    for block in protocol.blocks(model):
        handles += [block.register_forward_pre_hook(begin), block.register_forward_hook(end)]
    owns = _stand_in(model, note, sizes)
    dtype = next(model.parameters()).dtype
    entering = {name: size for name, size in sizes.items() if name not in INSIDE}
    try:
        if model.axis_switches:  # so that what is computed with can be told from what is kept exact
            model.to(torch.bfloat16)
        outside = _OutsideOfSlots(lambda *call: note(inside, "cross", *call))
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), outside:
            forward(model, **entering)
    finally:
        model.to(dtype)
        for handle in handles:
            handle.remove()
        for parent, attribute, own in owns:
            setattr(parent, attribute, own)
    if order != protocol.blocks(model):
        raise ValueError(f"{type(model).__name__}.block_lists: blocks must run once each, in the order of the lists")
    return calls


def _stand_in(model: nn.Module, note: Callable[..., None], sizes: Sizes) -> list[tuple[nn.Module, str, nn.Module]]:
    """Fill every slot and switch with what notes its calls.

    Returns:
        (parent, attribute, module that was there) of each.
    """
    found = []
    for pattern, axis in model.attention_cores.items():  # type: ignore[operator, union-attr]
        for parent, attribute, own in list(protocol.slots(model, [pattern])):
            found.append((parent, attribute, own))
            noted = lambda *call, own=own, axis=axis, **more: note(own, axis, *call, **more)  # noqa: E731
            stand_in = _WindowSlot(noted, own.keys) if axis == "window" else _Slot(noted)  # type: ignore[arg-type]
            setattr(parent, attribute, stand_in)
    for pattern, whole in model.axis_switches.items():  # type: ignore[operator, union-attr]
        names = (OUTSIDE, INSIDE) if whole == "space" else (INSIDE, OUTSIDE)
        before, behind = (tuple(sizes[name] for name in pair) for pair in names)
        for parent, attribute, own in list(protocol.slots(model, [pattern])):
            found.append((parent, attribute, own))
            switched = lambda *call, own=own, whole=whole: note(own, whole, *call, is_switch=True)  # noqa: E731
            setattr(parent, attribute, _Switched(switched, before, behind))  # type: ignore[arg-type]
    return found


def _parameters(model: nn.Module, owner: dict[int, int], rest: int) -> dict[int, list[Parameter]]:
    kinds = tensor_parallel.planned_kinds(model)
    shared: tuple[str, ...] = model.tensor_shared  # type: ignore[assignment]
    found: dict[int, list[Parameter]] = {}
    for prefix, module in model.named_modules():
        for key, value in module.named_parameters(recurse=False):
            name = f"{prefix}.{key}" if prefix else key
            cut_dim, used_in_part = _cut_of(prefix, key, kinds)
            is_shared = used_in_part or any(protocol.matches(name, pattern) for pattern in shared)
            parameter = Parameter(name, tuple(value.shape), value.requires_grad, cut_dim, is_shared)
            found.setdefault(owner.get(id(module), rest), []).append(parameter)
    return found


def _cut_of(prefix: str, key: str, kinds: Mapping[str, str]) -> tuple[int | None, bool]:
    """(the dim of a parameter that tensor parallelism cuts, None: whole; whether it is whole and the rest of an adapter
    is cut, so that each process has a part of its gradient)."""
    name = f"{prefix}.{key}"
    adapter = next((part for part in (lora.A, lora.B) if name.endswith(f".{part}")), None)
    kind = kinds.get(name.removesuffix(f".{adapter}") if adapter else prefix)
    if kind is None:
        return None, False
    dim = int(kind == "row")
    if adapter:
        is_cut = (adapter == lora.A) == (kind == "row")
        return (dim if is_cut else None), not is_cut
    return (None if kind == "row" and key == "bias" else dim), False
