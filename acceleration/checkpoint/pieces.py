"""Parts of a parameter that a DTensor cannot say, as torch.distributed.checkpoint sees them: chunks of the full one.

A checkpoint knows full parameters only, so that any layout can read what any other wrote. Under tensor parallelism a
process's part of a fused layer is several chunks (its rows of q, of k, of v), each again cut by sharding. An engine
that shards flat memory holds a run of elements, which is up to two parts of a row around whole rows.
"""

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from acceleration import collectives, sharding, tensor_parallel
from acceleration.mesh import Axis
from acceleration.tensor_parallel import Cut


class Pieces(Tensor):
    """Stands for the full parameter in a state dict; its memory is that of ``held``, which is read and written."""

    held: Tensor
    cut: Cut | None  # None: parts of a flat copy of everything
    chunks: dict[tuple[int, ...], Tensor]  # offset in the full parameter -> view of what is held

    @staticmethod
    def __new__(
        cls, held: Tensor, shape: Sequence[int], chunks: Mapping[tuple[int, ...], Tensor], cut: Cut | None = None
    ) -> "Pieces":
        pieces: Pieces = Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=held.dtype, device=held.device)
        pieces.held, pieces.cut = held, cut
        pieces.chunks = dict(chunks)
        return pieces

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise NotImplementedError(f"{func}: Pieces only stand in a checkpoint's state")

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Pieces({tuple(self.shape)}, {list(self.chunks)})"

    def __create_write_items__(self, fqn: str, value: Any) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(fqn, torch.Size(offset)),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=ChunkStorageMetadata(offsets=torch.Size(offset), sizes=chunk.shape),
                    properties=TensorProperties.create_from_tensor(chunk),
                    size=self.shape,
                ),
            )
            for offset, chunk in self.chunks.items()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(offset), chunk.shape) for offset, chunk in self.chunks.items()]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None
        return self.chunks[tuple(index.offset)]


def run(values: Tensor, shape: Sequence[int], start: int) -> Pieces:
    """``values`` (n,) stand for the elements from ``start`` on, in row-major order, of a parameter of this shape."""
    return Pieces(values, shape, dict(_boxes(values, tuple(shape), start)))


def wrap(model: nn.Module, values: Mapping[str, Any]) -> dict[str, Any]:
    """A section of a state dict with every parameter that was cut, and every moment of one, as ``Pieces``."""
    cuts = tensor_parallel.cuts(model)
    return {key: _wrapped(key, value, cuts) for key, value in values.items()}


def unwrap(values: Mapping[str, Any]) -> dict[str, Any]:
    """What ``wrap`` was given."""
    return {key: value.held if isinstance(value, Pieces) else value for key, value in values.items()}


def whole(value: Tensor, axis: Axis) -> Tensor:
    """The full value of anything in a state dict; ``axis`` is the tensor axis. Collective."""
    if not isinstance(value, Pieces):
        return sharding.full(value)
    assert value.cut is not None, "what a vendor's engine holds is put together by reading a checkpoint"
    return value.cut.join(list(collectives.all_gather(sharding.full(value.held)[None], 0, [1] * axis.degree, axis)))


def _wrapped(key: str, value: Any, cuts: Mapping[str, Cut]) -> Any:
    """Keys are parameter names, or ``state.NAME.QUANTITY`` of an optimizer."""
    name = key.removeprefix("state.").rpartition(".")[0] if key.startswith("state.") else key
    cut = cuts.get(name)
    if cut is None or not isinstance(value, Tensor) or value.dim() != len(cut.shape):
        return value
    return Pieces(value, cut.shape, dict(sharding.chunks(value, cut)), cut)


def _boxes(values: Tensor, shape: tuple[int, ...], start: int) -> Iterator[tuple[tuple[int, ...], Tensor]]:
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
