"""Weights of any family from one layout to another, and into safetensors files."""

import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from opensora.models.weights.format import Layout, WeightFormat
from opensora.models.weights.rows import Shape, Target, build
from opensora.utils.files.safetensors_files import SHARD_BYTES, write_file, write_weights


def convert_state_dict(
    state: Mapping[str, Tensor], format: WeightFormat, *, to: Layout, source: Layout | None = None
) -> dict[str, Tensor]:
    """The same weights in layout ``to``; tensors that need no change are passed through, not copied.

    Args:
        state: full (unsharded) tensors by name.
        source: layout of ``state``; None: as their names tell.

    Raises:
        UserError: ``state`` is of another family.
    """
    shapes = shapes_of(state)
    source = format.detect_layout(shapes, {}) if source is None else source
    return assemble(state, format.targets(shapes, source, to))


def convert_shapes(
    shapes: Mapping[str, Shape], format: WeightFormat, *, source: Layout, to: Layout
) -> dict[str, Shape]:
    """Names and shapes of the same weights in layout ``to``."""
    return {name: target.shape for name, target in format.targets(shapes, source, to).items()}


def assemble(state: Mapping[str, Tensor], targets: Mapping[str, Target]) -> dict[str, Tensor]:
    """The tensors that ``targets`` describes, of rows of those in ``state``."""
    shapes = shapes_of(state)
    made = {}
    for name, target in targets.items():
        unchanged = target.unchanged(shapes)
        made[name] = state[unchanged] if unchanged else build(target, shapes, lambda tensor, at: state[tensor][at])
    return made


def shapes_of(state: Mapping[str, Tensor]) -> dict[str, Shape]:
    """Shapes by name."""
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def save_state_dict(
    state: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    format: WeightFormat,
    *,
    source: Layout,
    to: Layout | None = None,
    metadata: Mapping[str, str] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> list[Path]:
    """Write full tensors as safetensors; the files written, each whole or absent.

    Args:
        path: a ``*.safetensors`` file, or a folder for shards of about ``shard_bytes`` and their index.
        source: layout of ``state``.
        to: layout to write; None: as it is.
    """
    to, target = source if to is None else to, Path(path)
    stated = {**(metadata or {}), **to.metadata()}
    tensors = convert_state_dict(state, format, to=to, source=source)
    if target.suffix == ".safetensors":
        return [write_file(target, tensors, stated)]
    return write_weights(target, tensors.items(), stated, shard_bytes=shard_bytes)
