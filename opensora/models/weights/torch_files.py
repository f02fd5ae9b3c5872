"""Files of ``torch.save``, as some families were published, opened like safetensors: tensors only, mapped if zips.

Nothing but tensors, numbers, text, containers of them and the options of argparse is unpickled (``weights_only``); a
file with anything else is refused. Only a family that says so (``WeightFormat.torch_keys``) has such files read.
"""

import argparse
import pickle
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opensora.utils.errors import UserError
from opensora.utils.files.safetensors_files import OpenWeights, check_regular
from opensora.utils.files.untrusted import parsing, short

_ZIP = b"PK\x03\x04"
# A pickle of its own, of torch's magic number, in the protocol that torch.save has had as its default.
_OLD = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
# Beside weights in many a checkpoint: holds attributes, and runs nothing when it is made.
_INERT = (argparse.Namespace,)
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
    """Whether a file is a zip, as those of ``torch.save`` are since its version 1.6, or begins as those before it."""
    return _start(path).startswith((_ZIP, _OLD))


def _start(path: Path) -> bytes:
    with parsing(lambda reason: UserError(f"{path}: cannot be read ({reason})")):
        check_regular(path)
        with path.open("rb") as file:
            return file.read(len(_OLD))


def open_torch_file(path: Path, keys: Collection[str]) -> OpenWeights:
    """The tensors of a file, of the first of ``keys`` that it has where it is a checkpoint with more than weights.

    Raises:
        UserError: it cannot be read, holds anything but tensors, numbers and text, or no tensors by name.
    """

    def refuse(reason: str) -> UserError:
        return UserError(f"{path}: cannot be read as a file of torch.save ({reason}): fetch or export it again")

    mapped = _start(path).startswith(_ZIP)  # files before torch 1.6 are read as a whole
    with parsing(refuse), torch.serialization.safe_globals([*_INERT]), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of torch, on pickles of a strange protocol
        try:
            found: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
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
