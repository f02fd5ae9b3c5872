"""What a tensor is made of: rows of other tensors, one after the other.

Files of the same model differ in names, in what is fused, in the order of channels and in the number of dims, never in
values. So every conversion is a table of such rows; it can be undone exactly, and any part of a converted tensor is
read without the rest. "Rows" are along the first dim. The dims behind it may be cut otherwise in the other tensor, as
those of a convolution over patches that is a linear layer elsewhere: its values are taken in the order of memory.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

Shape: TypeAlias = tuple[int, ...]
Get: TypeAlias = Callable[[str, tuple[slice, ...]], Tensor]  # a part of a stored tensor, by its name


@dataclass(frozen=True)
class Rows:
    """Rows ``start`` to ``stop`` of a tensor, counted after ``order`` was applied.

    ``order``: rows change places within every group of ``len(order)``: row i of a group is its row ``order[i]``. Groups
    are the heads where channels of attention are permuted, or the whole tensor for any other permutation.
    """

    tensor: str
    start: int
    stop: int
    order: tuple[int, ...] | None = None

    @property
    def count(self) -> int:
        return self.stop - self.start

    def part(self, first: int, last: int) -> "Rows":
        """Rows ``first`` to ``last`` of these."""
        return replace(self, start=self.start + first, stop=self.start + last)

    def span(self) -> tuple[int, int]:
        """First and last row to read of the tensor: whole groups where rows change places."""
        size = len(self.order) if self.order else 1
        return self.start // size * size, -(-self.stop // size) * size

    def indices(self) -> Tensor:
        """(count,) where each of these is in the tensor."""
        wanted = torch.arange(self.start, self.stop)
        if self.order is None:
            return wanted
        size = len(self.order)
        return wanted // size * size + torch.tensor(self.order)[wanted % size]


@dataclass(frozen=True)
class Target:
    """A tensor of a layout, made of rows of other tensors."""

    shape: Shape
    rows: tuple[Rows, ...]

    def unchanged(self, sources: Mapping[str, Shape]) -> str | None:
        """The tensor that this one is, if it needs no change."""
        first = self.rows[0] if len(self.rows) == 1 else None
        if first is None or first.order is not None or sources[first.tensor] != self.shape:
            return None
        return first.tensor if (first.start, first.stop) == (0, height(self.shape)) else None

    def fits(self, sources: Mapping[str, Shape]) -> bool:
        """Whether the other tensors have as many values as are to be read of them."""
        size = math.prod(self.shape[1:])
        return all(rows.span()[1] * size <= math.prod(sources[rows.tensor]) for rows in self.rows)


def height(shape: Shape) -> int:
    """Rows of a tensor; a single number is one."""
    return shape[0] if shape else 1


def whole(name: str, shape: Shape, to: Shape | None = None, order: tuple[int, ...] | None = None) -> Target:
    """All of a tensor, in the shape ``to`` if it is another, its rows permuted by ``order``.

    A tensor that has another number of values, or no whole groups of rows, is as it is, and then fits no model.
    """
    if to is not None and math.prod(to) == math.prod(shape):
        shape = to
    count = height(shape)
    return Target(shape, (Rows(name, 0, count, order if order and count % len(order) == 0 else None),))


def joined(*targets: Target) -> Target:
    """One tensor of several, one after the other; neighbouring rows of the same tensor are taken as one run."""
    rows: list[Rows] = []
    for new in (rows for target in targets for rows in target.rows):
        old = rows[-1] if rows else None
        if old and (old.tensor, old.stop, old.order) == (new.tensor, new.start, new.order):
            rows[-1] = replace(old, stop=new.stop)
        else:
            rows.append(new)
    return Target((sum(height(target.shape) for target in targets), *targets[0].shape[1:]), tuple(rows))


def read_rows(
    rows: Rows, shape: Shape, stored: Mapping[str, Shape], get: Get, columns: tuple[slice, ...] = ()
) -> Tensor:
    """(count, *shape) values, of each row only the ``columns``; no other rows are read, but for the rest of a group.

    Args:
        shape: of one row.
        stored: shapes of the tensors that ``get`` reads from.
    """
    full, (low, high) = stored[rows.tensor], rows.span()
    if full and full[1:] == shape:
        found = get(rows.tensor, (slice(low, high), *columns))
    else:
        size, stored_size = math.prod(shape), max(math.prod(full[1:]), 1)
        first, last = low * size // stored_size, -(-high * size // stored_size)
        flat = get(rows.tensor, (slice(first, last),) if full else ()).flatten()
        start = first * stored_size
        index = (slice(None), *columns)
        found = flat[low * size - start : high * size - start].view(high - low, *shape)[index]
    return found if rows.order is None else found[rows.indices() - low]


def build(target: Target, stored: Mapping[str, Shape], get: Get) -> Tensor:
    """The whole tensor; a view where its rows are neighbours that keep their order, and ``get`` gives views."""
    pieces = [read_rows(rows, target.shape[1:], stored, get) for rows in target.rows]
    return (pieces[0] if len(pieces) == 1 else torch.cat(pieces)).reshape(target.shape)
