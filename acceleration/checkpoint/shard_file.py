"""One file per process, in the safetensors format; entries are boxes, named ``KEY@OFFSET,OFFSET,...``.

Reading finds, for every box that is wanted, the stored boxes that overlap it, in any of the files: what wrote them does
not matter. Nothing that is read here can run code.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from acceleration.checkpoint.tensor_shards import Offset, Slices
from acceleration.files.atomic_write import require_file
from acceleration.files.tensor_file import DTYPES as DTYPES
from acceleration.files.tensor_file import header as header
from acceleration.files.tensor_file import raw as raw
from acceleration.files.untrusted import parsing

MAX_DIGITS = 19  # of a number in the name of a box


def file_name(rank: int) -> str:
    """Of what process ``rank`` writes."""
    return f"shard-{rank:05d}.safetensors"


def entry(key: str, offset: Offset) -> str:
    """Name of a box in a file."""
    return f"{key}@{','.join(map(str, offset))}"


def to_write(state: Mapping[str, Slices]) -> dict[str, Tensor]:
    """The boxes that this process writes, by their names in the file."""
    return {
        entry(key, offset): view.detach()
        for key, held in state.items()
        if held.first_copy
        for offset, view in held.views.items()
    }


def read(files: Iterable[Path], wanted: Mapping[str, Slices]) -> None:
    """Fill the views of ``wanted`` in place from the files of one checkpoint.

    Raises:
        ValueError: a file that is not what it should be, or a tensor that is not there whole, by name.
    """
    missing = {(key, offset): view.numel() for key, held in wanted.items() for offset, view in held.views.items()}
    for path in files:
        with _opened(path) as (file, names):
            for key, stored in _stored(names).items():
                if key in wanted:
                    _fill(path, file, key, stored, wanted[key], missing)
    short = next((key for (key, _), count in missing.items() if count), None)
    if short is not None:
        raise ValueError(f"{Path(path).parent}: {short} is not there, or not whole")


def counted(path: Path, tensors: Mapping[str, Any]) -> dict[str, int]:
    """How many elements of every tensor the boxes in a file hold.

    Args:
        tensors: name -> (type, shape) of the full tensors, as a manifest has them.

    Raises:
        ValueError: not a safetensors file, or a box that is in none of the tensors, by name.
    """
    counts: dict[str, int] = defaultdict(int)
    with _opened(path) as (file, names):
        for key, stored in _stored(names).items():
            dtype, full = tensors.get(key, (None, ()))
            for offset in stored:
                with parsing(lambda problem: ValueError(f"{path.name}: {problem}")):
                    box = file.get_slice(entry(key, offset))
                    found, shape = box.get_dtype(), box.get_shape()
                ends = [start + size for start, size in zip(offset, shape, strict=False)]
                inside = len(offset) == len(shape) == len(full) and all(a <= b for a, b in zip(ends, full, strict=True))
                if found != dtype or not inside:
                    what = f"{entry(key, offset)[:99]} ({found} {shape})"
                    raise ValueError(f"{path.name}: {what} belongs to no tensor of the manifest")
                counts[key] += prod(shape)
    return counts


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, list[str]]]:
    """A safetensors file, and the names in it.

    Raises:
        ValueError: it is none.
    """
    with parsing(lambda problem: ValueError(f"{path}: {problem}")):
        file = safe_open(require_file(path), framework="pt", device="cpu")
        names = list(file.keys())
    with file:
        yield file, names


def _stored(names: Iterable[str]) -> dict[str, list[Offset]]:
    found: dict[str, list[Offset]] = defaultdict(list)
    for name in names:
        key, _, offset = name.rpartition("@")
        parts = [part for part in offset.split(",") if part]
        if not all(part.isascii() and part.isdecimal() and len(part) <= MAX_DIGITS for part in parts):
            raise ValueError(f"{name[:200]}: the name of no box")
        found[key].append(tuple(map(int, parts)))
    return found


def _fill(
    path: Path, file: Any, key: str, stored: list[Offset], held: Slices, missing: dict[tuple[str, Offset], int]
) -> None:
    for offset in stored:
        name = entry(key, offset)
        with parsing(lambda problem: ValueError(f"{path}: {problem}")):
            source = file.get_slice(name)
            shape = source.get_shape()
        if len(offset) != len(shape) or len(shape) != len(held.shape):
            raise ValueError(f"{path}: {name} has {len(shape)} dims, and should have {len(held.shape)}")
        for target_offset, target in held.views.items():
            overlap = list(_overlap(offset, shape, target_offset, target.shape))
            if any(low >= high for low, high in overlap):
                continue
            # Slices of a scalar are refused.
            part = source[_within(overlap, offset)] if shape else file.get_tensor(name)
            with torch.no_grad():
                target[_within(overlap, target_offset)].copy_(part)
            missing[key, target_offset] -= part.numel()


def _within(box: list[tuple[int, int]], offset: Offset) -> tuple[slice, ...]:
    return tuple(slice(low - at, high - at) for (low, high), at in zip(box, offset, strict=True))


def _overlap(
    offset: Offset, shape: Iterable[int], other: Offset, other_shape: Iterable[int]
) -> Iterator[tuple[int, int]]:
    for start, size, other_start, other_size in zip(offset, shape, other, other_shape, strict=True):
        yield max(start, other_start), min(start + size, other_start + other_size)
