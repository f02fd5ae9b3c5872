"""Parameters that tensor parallelism has cut, as torch.distributed.checkpoint sees them: chunks of the full parameter.

A checkpoint knows full parameters only, so that any layout can read what any other wrote. A process's part of a fused
layer is several chunks (its rows of q, of k, of v), each again cut by sharding; a DTensor can only say one.
"""

from collections.abc import Mapping
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
    cut: Cut
    chunks: dict[tuple[int, ...], Tensor]  # offset in the full parameter -> view of what is held

    @staticmethod
    def __new__(cls, held: Tensor, cut: Cut) -> "Pieces":
        pieces: Pieces = Tensor._make_wrapper_subclass(cls, cut.shape, dtype=held.dtype, device=held.device)
        pieces.held, pieces.cut = held, cut
        pieces.chunks = dict(sharding.chunks(held, cut))
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
    return value.cut.join(list(collectives.all_gather(sharding.full(value.held)[None], 0, [1] * axis.degree, axis)))


def _wrapped(key: str, value: Any, cuts: Mapping[str, Cut]) -> Any:
    """Keys are parameter names, or ``state.NAME.QUANTITY`` of an optimizer."""
    name = key.removeprefix("state.").rpartition(".")[0] if key.startswith("state.") else key
    cut = cuts.get(name)
    if cut is None or not isinstance(value, Tensor) or value.dim() != len(cut.shape):
        return value
    return Pieces(value, cut)
