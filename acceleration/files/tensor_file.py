"""Tensors as the bytes of a safetensors file: the same tensors in the same order are always the same bytes."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def parts(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Iterator[Any]:
    """The bytes of a file that holds ``tensors``, piece by piece; no copy but of one tensor at a time.

    The widest types come first, as readers map tensors where they lie.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    yield header({name: tensors[name] for name in names}, metadata)
    for name in names:
        yield raw(tensors[name])


def header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """The first bytes of a safetensors file that holds ``tensors`` in this order."""
    table: dict[str, Any] = {"__metadata__": dict(sorted((metadata or {"format": "pt"}).items()))}
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
    flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return memoryview(flat.numpy())  # type: ignore[arg-type]
