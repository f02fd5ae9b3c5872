"""What this process holds of a full tensor: boxes at offsets, whatever cut them.

A checkpoint knows full tensors only, so that any layout can read what any other wrote. Sharding leaves a process some
rows, which a DTensor can say. ``TensorShards`` can say the rest: under tensor parallelism rows of several places of a
fused layer (of q, of k, of v), and who writes what is not cut; of an engine that shards flat memory a run of elements,
which is up to two parts of a row around whole rows.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from acceleration.distributed import collectives
from acceleration.distributed.mesh import Axis
from acceleration.sharding import fsdp, tensor_parallel
from acceleration.sharding.tensor_parallel import Cut

Offset = tuple[int, ...]


@dataclass(frozen=True)
class Slices:
    """Parts of one full tensor; the views are of the memory that the run uses."""

    shape: tuple[int, ...]  # of the full tensor
    dtype: torch.dtype
    views: dict[Offset, Tensor]
    first_copy: bool  # False where another process holds the same boxes, and writes them


@dataclass(frozen=True, eq=False)
class TensorShards:
    """Stands for the full parameter in a state dict, or for a quantity that the optimizer keeps of it."""

    held: Tensor
    slices: Slices
    cut: Cut | None = None  # by tensor parallelism


def slices_of(value: Tensor | TensorShards) -> Slices:
    """What this process holds of ``value``; a plain tensor is the same everywhere."""
    if isinstance(value, TensorShards):
        return value.slices
    if isinstance(value, DTensor):
        return Slices(tuple(value.shape), value.dtype, dict(fsdp.chunks(value)), _is_first_replica(value))
    return Slices(tuple(value.shape), value.dtype, {(0,) * value.dim(): value}, dist.get_rank() == 0)


def run(values: Tensor, shape: Sequence[int], start: int, *, first_copy: bool = True) -> TensorShards:
    """``values`` (n,) stand for the elements from ``start`` on, in row-major order, of a parameter of this shape."""
    views = dict(_boxes(values, tuple(shape), start))
    return TensorShards(values, Slices(tuple(shape), values.dtype, views, first_copy))


def wrap(model: nn.Module, values: Mapping[str, Any], *, first_copy: bool = True) -> dict[str, Any]:
    """A section of a state dict with every parameter that was cut, and every moment of one, as ``TensorShards``.

    Args:
        first_copy: False on processes where what was not cut is a copy of another place's on the tensor axis.
    """
    cuts = tensor_parallel.cuts(model)
    return {key: _wrapped(key, value, cuts, first_copy) for key, value in values.items()}


def unwrap(values: Mapping[str, Any]) -> dict[str, Any]:
    """What ``wrap`` was given."""
    return {key: value.held if isinstance(value, TensorShards) else value for key, value in values.items()}


def whole(value: Tensor | TensorShards, axis: Axis) -> Tensor:
    """The full value of anything in the native engine's state dict; ``axis`` is the tensor axis. Collective."""
    if not isinstance(value, TensorShards):
        return fsdp.full(value)
    if value.cut is None:
        assert value.held.shape == value.slices.shape, "flat memory is put together by reading a checkpoint"
        return fsdp.full(value.held)
    return value.cut.join(list(collectives.all_gather(fsdp.full(value.held)[None], 0, [1] * axis.degree, axis)))


def _wrapped(key: str, value: Any, cuts: Mapping[str, Cut], first_copy: bool) -> Any:
    """Keys are parameter names, or ``state.NAME.QUANTITY`` of an optimizer."""
    name = key.removeprefix("state.").rpartition(".")[0] if key.startswith("state.") else key
    cut = cuts.get(name)
    if not isinstance(value, Tensor):
        return value
    if cut is None or value.dim() != len(cut.shape):
        return value if first_copy else TensorShards(value, replace(slices_of(value), first_copy=False))
    held = Slices(cut.shape, value.dtype, dict(fsdp.chunks(value, cut)), _is_first_replica(value))
    return TensorShards(value, held, cut)


def _boxes(values: Tensor, shape: tuple[int, ...], start: int) -> Iterator[tuple[Offset, Tensor]]:
    """(offset, view) of the boxes that a run of elements consists of: the end of a row, whole rows, a start of one."""
    if not values.numel():
        return
    if len(shape) < 2:
        yield (start,)[: len(shape)], values.view(-1 if shape else ())
        return
    width = prod(shape[1:])
    row, inside = divmod(start, width)
    if inside:
        begun = values[: width - inside]
        for offset, box in _boxes(begun, shape[1:], inside):
            yield (row, *offset), box[None]
        row, values = row + 1, values[len(begun) :]
    rows = len(values) // width
    if rows:
        yield (row, *(0 for _ in shape[1:])), values[: rows * width].view(rows, *shape[1:])
    for offset, box in _boxes(values[rows * width :], shape[1:], 0):
        yield (row + rows, *offset), box[None]


def _is_first_replica(value: Tensor) -> bool:
    if not isinstance(value, DTensor):
        return True
    place = value.device_mesh.get_coordinate()
    assert place is not None
    return all(index == 0 for index, kind in zip(place, value.placements, strict=True) if isinstance(kind, Replicate))
