"""Files of ``torch.save``, as some families were published, opened like safetensors: tensors only, and mapped.

Nothing but tensors, numbers, text and containers of them is unpickled (``weights_only``); a file with anything else is
refused. Only a family that says so (``WeightFormat.torch_keys``) has such files read.
"""

import pickle
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opensora.utils.errors import UserError
from opensora.utils.files.safetensors_files import OpenWeights, check_regular
from opensora.utils.files.untrusted import parsing, short

SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
_TYPES = {  # as safetensors calls them
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}


class _Loaded:
    """What ``OpenWeights`` asks of a file."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def get_tensor(self, name: str) -> Tensor:
        return self._tensors[name]

    def get_slice(self, name: str) -> Tensor:
        return self._tensors[name]


def is_torch_file(path: Path) -> bool:
    """Whether a file is a zip, as those of ``torch.save`` are since its version 1.6."""
    with parsing(lambda reason: UserError(f"{path}: cannot be read ({reason})")):
        check_regular(path)
        with path.open("rb") as file:
            return file.read(4) == b"PK\x03\x04"


def open_torch_file(path: Path, keys: Collection[str]) -> OpenWeights:
    """The tensors of a file, of the first of ``keys`` that it has where it is a checkpoint with more than weights.

    Raises:
        UserError: it cannot be read, holds anything but tensors, numbers and text, or no tensors by name.
    """

    def refuse(reason: str) -> UserError:
        return UserError(f"{path}: cannot be read as a file of torch.save ({reason}): fetch or export it again")

    with parsing(refuse):
        try:
            found: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except pickle.UnpicklingError:
            raise UserError(
                f"{path}: holds more than tensors, which could be a program, and is not unpickled: save its tensors by "
                "safetensors.torch.save_file"
            ) from None
    key = next((key for key in keys if isinstance(found, dict) and isinstance(found.get(key), dict)), None)
    state = found if key is None else found[key]
    if not isinstance(state, dict) or not state:
        raise refuse("it holds no tensors by name")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor) or value.layout != torch.strided:
            where = f"; a checkpoint has its weights under {' or '.join(keys)}" if keys else ""
            raise refuse(f"{short(repr(name), 80)} is no tensor{where}")
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    types = {name: _TYPES.get(tensor.dtype, str(tensor.dtype)) for name, tensor in state.items()}
    return OpenWeights(path, _Loaded(state), {}, shapes, types)
