"""One file per process, in the safetensors format; entries are boxes, named ``KEY@OFFSET,OFFSET,...``.

Reading finds, for every box that is wanted, the stored boxes that overlap it, in any of the files: what wrote them does
not matter. Nothing that is read here can run code.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from acceleration.checkpoint.pieces import Boxes, Offset

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def file_name(rank: int) -> str:
    """Of what process ``rank`` writes."""
    return f"shard-{rank:05d}.safetensors"


def entry(key: str, offset: Offset) -> str:
    """Name of a box in a file."""
    return f"{key}@{','.join(map(str, offset))}"


def to_write(state: Mapping[str, Boxes]) -> dict[str, Tensor]:
    """The boxes that this process writes, by their names in the file."""
    return {
        entry(key, offset): view.detach()
        for key, held in state.items()
        if held.first_copy
        for offset, view in held.views.items()
    }


def header(tensors: Mapping[str, Tensor]) -> bytes:
    """The first bytes of a safetensors file that holds ``tensors`` in this order."""
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        table[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, position + size],
        }
        position += size
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def raw(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, on the CPU."""
    flat = tensor.cpu().contiguous().flatten().view(torch.uint8)
    return memoryview(flat.numpy())  # type: ignore[arg-type]


def read(files: Iterable[Path], wanted: Mapping[str, Boxes]) -> None:
    """Fill the views of ``wanted`` in place from the files of one checkpoint.

    Raises:
        ValueError: a file that is not what it should be, or a tensor that is not there whole, by name.
    """
    missing = {(key, offset): view.numel() for key, held in wanted.items() for offset, view in held.views.items()}
    for path in files:
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                for key, stored in _stored(file.keys()).items():
                    if key in wanted:
                        _fill(file, key, stored, wanted[key], missing)
        except SafetensorError as error:
            raise ValueError(f"{path}: {error}") from None
    short = next((key for (key, _), count in missing.items() if count), None)
    if short is not None:
        raise ValueError(f"{Path(path).parent}: {short} is not there, or not whole")


def _stored(names: Iterable[str]) -> dict[str, list[Offset]]:
    found: dict[str, list[Offset]] = defaultdict(list)
    for name in names:
        key, _, offset = name.rpartition("@")
        found[key].append(tuple(int(part) for part in offset.split(",") if part))
    return found


def _fill(file: Any, key: str, stored: list[Offset], held: Boxes, missing: dict[tuple[str, Offset], int]) -> None:
    for offset in stored:
        name = entry(key, offset)
        source = file.get_slice(name)
        shape = source.get_shape()
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
