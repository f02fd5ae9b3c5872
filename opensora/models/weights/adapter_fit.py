"""Adapters of a file for the layers of a model, whatever names, order and fusion they were made for."""

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from opensora.models.weights.adapter_names import KINDS
from opensora.models.weights.adapters import Adapter
from opensora.models.weights.format import Layout, WeightFormat
from opensora.models.weights.names import known_layers
from opensora.models.weights.rows import Rows, Shape, Target


@dataclass(frozen=True, kw_only=True)
class AdapterRows:
    """Rows of B of one adapter, and which rows of B of a layer of a model they are."""

    layer: str  # of the adapter
    rows: Tensor  # (n,) indices
    places: Tensor  # (n,) indices in the model's layer


@dataclass(frozen=True, kw_only=True)
class AdapterPlan:
    """Which rows of which adapters of a file make up the adapters of a model's layers."""

    pieces: dict[str, tuple[AdapterRows, ...]]  # by layer of the model, in its order
    prefix: str  # of all layers in the file, without which they are the model's
    guess: str  # what to say of a layout that the file does not state, where rows change places by it
    left_out: tuple[str, ...] = ()  # layers of the file that other sizes of the family have, or have wider


def plan_adapter(
    layers: Mapping[str, tuple[int, int]],
    shapes: Mapping[str, Shape],
    format: WeightFormat,
    to: Layout,
    metadata: Mapping[str, str],
) -> AdapterPlan:
    """How adapters of a file fit a model, whatever names and layout they were made for.

    Layers may go by every name that ``format`` knows, and by the same with underscores for dots, as kohya's tools write
    them; behind any prefix that all of them share.

    Args:
        layers: name in the file -> (inputs, outputs).
        shapes: of all parameters of the model, by name, in layout ``to``.
        metadata: of the file, which may state the layout of the layers.

    Raises:
        ValueError: a layer that the model does not have, or one of another size.
    """
    known = [name.removesuffix(".weight") for name in format.adapter_targets(shapes, to, to)]
    left_out = _of_other_sizes(layers, known, format)
    layers = {layer: sizes for layer, sizes in layers.items() if layer not in left_out}
    prefix, found = known_layers(layers, known, _aliases(format, known))
    source, guessed = format.adapter_layout(tuple(found.values()), metadata)
    targets = format.adapter_targets(shapes, to, source)
    _check_apart({layer: targets[f"{name}.weight"].rows for layer, name in found.items()})
    _check_names(found, shapes, format, to)
    pieces: dict[str, list[AdapterRows]] = {name.removesuffix(".weight"): [] for name in shapes}
    for layer, name in found.items():
        position, target = 0, targets[f"{name}.weight"]
        wanted = math.prod(target.shape[1:]), target.shape[0]
        if layers[layer] != wanted:
            if _reads_other_inputs(name, format) and layers[layer][1] == wanted[1]:
                left_out += (layer,)
                continue
            sizes = " -> ".join(str(size) for size in layers[layer])
            raise ValueError(f"{layer} is {sizes}, and would be {wanted[0]} -> {wanted[1]} for this model")
        for rows in target.rows:
            taken = torch.arange(position, position + rows.count)
            owner = rows.tensor.removesuffix(".weight")
            pieces[owner].append(AdapterRows(layer=layer, rows=taken, places=rows.indices()))
            position += rows.count
    moved = any(rows.order for name in found.values() for rows in targets[f"{name}.weight"].rows)
    return AdapterPlan(
        pieces={layer: tuple(rows) for layer, rows in pieces.items() if rows},
        prefix=prefix,
        guess=format.describe_guess(source, to) if guessed and moved else "",
        left_out=left_out,
    )


def plan_differences(
    adapter: Adapter, shapes: Mapping[str, Shape], format: WeightFormat, to: Layout, plan: AdapterPlan
) -> dict[tuple[str, str], Target]:
    """Which rows of the model's parameters differences of a file are added to, in the file's order.

    Args:
        shapes: of all parameters of the model, by name, in layout ``to``.
        plan: of the file's adapters, and of what is left out.

    Raises:
        ValueError: a layer that the model does not have, or has no bias or weight of.
    """
    layouts = [to, format.original, getattr(format, "diffusers", None)]
    made = {n: target for one in layouts if one is not None for n, target in format.targets(shapes, to, one).items()}
    owners = [owner(name)[0] for name in made]
    names = [key for key in adapter.differences if key[0] not in plan.left_out]
    begins, found = known_layers(dict.fromkeys(layer for layer, _ in names), owners, _aliases(format, owners))
    if plan.pieces and names and begins != plan.prefix:
        behind = f"names behind {plan.prefix or 'nothing'} and {begins or 'nothing'}"
        raise ValueError(f"{names[0][0]}: {behind}: layers of two models in one file")
    source, _ = format.adapter_layout(tuple(found.values()), adapter.metadata)
    made |= format.targets(shapes, to, source)  # as the file has the names that several layouts have
    targets = {}
    for layer, kind in names:
        name = found[layer]
        own = made.get(f"{name}.{kind}") or (made.get(name) if kind == "weight" else None)
        if own is None:
            raise ValueError(f"{layer}: the model has no {kind} there")
        targets[layer, kind] = own
    _check_apart({f"{layer} ({kind})": target.rows for (layer, kind), target in targets.items()})
    return targets


def _aliases(format: WeightFormat, known: Collection[str]) -> Mapping[str, str]:
    made: Mapping[str, str] = getattr(format, "aliases", lambda names: {})(known)
    return made


def _of_other_sizes(layers: Collection[str], known: Collection[str], format: WeightFormat) -> tuple[str, ...]:
    """Layers that this model lacks and others of its family have, where the format says which may be left out."""
    pattern = getattr(format, "of_some_sizes", None)
    if pattern is None or any(re.search(pattern, layer) for layer in known):
        return ()
    return tuple(layer for layer in layers if re.search(pattern, layer))


def _reads_other_inputs(layer: str, format: WeightFormat) -> bool:
    """Whether other sizes of the family have this layer with more inputs or fewer."""
    pattern = getattr(format, "of_some_widths", None)
    return pattern is not None and re.search(pattern, layer) is not None


def _check_names(found: Mapping[str, str], shapes: Mapping[str, Shape], format: WeightFormat, layout: Layout) -> None:
    """That not some layers go by diffusers' names and some by those of the release: what wrote such a file?"""
    diffusers = getattr(format, "diffusers", None)
    if diffusers is None:
        return
    theirs = format.targets(shapes, layout, diffusers)
    ours = {*shapes, *format.targets(shapes, layout, format.original)}
    named = {layer: f"{name}.weight" for layer, name in found.items()}
    by_diffusers = next((layer for layer, name in named.items() if name in theirs and name not in ours), None)
    by_others = next((layer for layer, name in named.items() if name not in theirs), None)
    if by_diffusers and by_others:
        raise ValueError(f"{by_diffusers} and {by_others}: names of two forms in one file; give a file of one")


def _check_apart(rows_of: Mapping[str, Sequence[Rows]]) -> None:
    """That no two adapters are for the same rows, as those of a fused layer and of its parts would be."""
    owners: dict[str, list[tuple[Rows, str]]] = {}
    for layer, parts in rows_of.items():
        for rows in parts:
            for other, owner in owners.setdefault(rows.tensor, []):
                if _overlap(rows, other):
                    raise ValueError(f"{owner} and {layer}: two adapters for the same place")
            owners[rows.tensor].append((rows, layer))


def _overlap(first: Rows, second: Rows) -> bool:
    (low, high), (other_low, other_high) = first.span(), second.span()
    if low >= other_high or other_low >= high:
        return False
    return bool(torch.isin(first.indices(), second.indices()).any())


@dataclass(frozen=True)
class FittedAdapter:
    """Adapters as the layers of a model need them, put together from those of a file when they are asked for.

    A layer that is made of several of the file's (q, k, v in one) has the sum of their ranks, and zeros in B where a
    row has no part in one of them; those with the same A were one, and share its rank. A layer that is a part of a
    file's has rows of its B.
    """

    adapter: Adapter
    pieces: Mapping[str, Sequence[AdapterRows]]  # by layer of the model
    outputs: Mapping[str, int]  # of every layer of the model
    differences: Mapping[str, Tensor] = field(default_factory=dict)  # whole, by parameter of the model: added to it

    def sizes(self) -> dict[str, tuple[int, float]]:
        """Layer of the model -> (rank, what B A is multiplied by)."""
        return {layer: (self._rank(layer), self._scale(layer)) for layer in self.pieces}

    def tensor(self, name: str) -> Tensor:
        """A or B of a layer of the model, by its parameter's name."""
        kind = KINDS[0] if name.endswith(KINDS[0]) else KINDS[1]
        layer = name.removesuffix(kind)
        return self._down(layer) if kind == KINDS[0] else self._up(layer)

    def plain(self) -> Adapter:
        """The same by the names of the model's layers, as if they were a file's, in fp64 only where that is."""
        sizes = self.sizes()
        tensors = {f"{layer}{kind}": self.tensor(f"{layer}{kind}") for layer in sizes for kind in KINDS}
        if all(tensor.dtype != torch.float64 for tensor in self.adapter.tensors.values()):
            tensors = {n: tensor.float() if tensor.dtype == torch.float64 else tensor for n, tensor in tensors.items()}
        return replace(
            self.adapter,
            tensors=tensors,
            scales={layer: scale for layer, (_, scale) in sizes.items()},
            differences={owner(name): tensor for name, tensor in self.differences.items()},
        )

    def _down(self, layer: str) -> Tensor:
        found = {columns.start: source for source, columns in reversed(self._columns(layer).items())}
        parts = [self.adapter.matrices(found[start])[0] for start in sorted(found)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _up(self, layer: str) -> Tensor:
        columns, scale = self._columns(layer), self._scale(layer)
        dtypes = {self.adapter.matrices(source)[1].dtype for source in columns}
        whole = torch.zeros(self.outputs[layer], self._rank(layer), dtype=_widest(dtypes))
        for piece in self.pieces[layer]:
            own = self.adapter.scales[piece.layer]
            b = self.adapter.matrices(piece.layer)[1][piece.rows]
            if own != scale:  # exactly, and rounded once where the value is used
                whole, b = whole.double(), b.double() * own / scale
            whole[piece.places, columns[piece.layer]] = b.to(whole.dtype)
        return whole

    def _columns(self, layer: str) -> dict[str, slice]:
        """Adapter of the file -> its columns in B of a layer of the model, which are its rows in A."""
        found: dict[str, slice] = {}
        end = 0
        for source in dict.fromkeys(piece.layer for piece in self.pieces[layer]):
            down = self.adapter.matrices(source)[0]
            same = next((other for other in found if _equal(self.adapter.matrices(other)[0], down)), None)
            found[source] = found[same] if same else slice(end, end + down.shape[0])
            end = max(end, found[source].stop)
        return found

    def _rank(self, layer: str) -> int:
        return max(columns.stop for columns in self._columns(layer).values())

    def _scale(self, layer: str) -> float:
        scales = {self.adapter.scales[piece.layer] for piece in self.pieces[layer]}
        return scales.pop() if len(scales) == 1 else 1.0


def fit_adapter(
    adapter: Adapter, shapes: Mapping[str, Shape], format: WeightFormat, to: Layout
) -> tuple[FittedAdapter, AdapterPlan]:
    """Adapters as the layers of a model of these parameters need them.

    Args:
        shapes: of all parameters of the model, in layout ``to``.

    Raises:
        ValueError: a layer that the model does not have, or one of another size.
    """
    plan = plan_adapter(adapter.sizes(), shapes, format, to, adapter.metadata)
    outputs = {name.removesuffix(".weight"): shape[0] for name, shape in shapes.items() if shape}
    known = [owner(name)[0] for name in shapes]
    others = _of_other_sizes(dict.fromkeys(layer for layer, _ in adapter.differences), known, format)
    plan = replace(plan, left_out=tuple(dict.fromkeys((*plan.left_out, *others))))
    differences, wider = fit_differences(adapter, shapes, format, to, plan)
    plan = replace(plan, left_out=tuple(dict.fromkeys((*plan.left_out, *wider))))
    if not plan.pieces and not differences:
        raise ValueError(f"{next(iter(adapter.layers), 'its differences')}: the model has none of its layers")
    return FittedAdapter(adapter, plan.pieces, outputs, differences), plan


def fit_differences(
    adapter: Adapter, shapes: Mapping[str, Shape], format: WeightFormat, to: Layout, plan: AdapterPlan
) -> tuple[dict[str, Tensor], list[str]]:
    """(differences of a file by parameter of a model, whole, zeros where the file says nothing; layers left out)."""
    made: dict[str, Tensor] = {}
    left_out = []
    for key, target in plan_differences(adapter, shapes, format, to, plan).items() if adapter.differences else ():
        tensor, position = adapter.differences[key], 0
        if tuple(tensor.shape) != target.shape and tensor.numel() != math.prod(target.shape):
            if _reads_other_inputs(owner(target.rows[0].tensor)[0], format) and tensor.shape[:1] == target.shape[:1]:
                left_out.append(key[0])
                continue
            raise ValueError(f"{key[0]}: its {key[1]} is {tuple(tensor.shape)}, and would be {target.shape} here")
        for rows in target.rows:
            shape = shapes[rows.tensor]
            if rows.tensor not in made:
                made[rows.tensor] = torch.zeros(shape, dtype=torch.promote_types(tensor.dtype, torch.float32))
            part = tensor.reshape(target.shape)[position : position + rows.count]
            made[rows.tensor][rows.indices()] = part.reshape(-1, *shape[1:]).to(made[rows.tensor].dtype)
            position += rows.count
    return made, left_out


def owner(name: str) -> tuple[str, str]:
    """(layer, weight or bias) of a parameter; a table that belongs to no layer is called as one."""
    layer, _, kind = name.rpartition(".")
    return (layer, kind) if kind in ("weight", "bias") else (name, "weight")


def parameter(layer: str, kind: str, shapes: Mapping[str, Shape]) -> str:
    """The inverse of ``owner``."""
    return f"{layer}.{kind}" if f"{layer}.{kind}" in shapes else layer


def _equal(first: Tensor, second: Tensor) -> bool:
    return first.dtype == second.dtype and torch.equal(first, second)


def _widest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    widest = None
    for dtype in dtypes:
        widest = dtype if widest is None else torch.promote_types(widest, dtype)
    assert widest is not None
    return widest
