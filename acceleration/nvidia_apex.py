"""NVIDIA's package apex: its fused layer norm, RMS norm and Adam. Only this file imports it, and only when it is used.

It is built from its repository with its CUDA extensions; what PyPI has under the name apex is another package. So it
counts as installed where the extension of the part is. Signatures are those of apex 25 and 26; not run on a GPU yet.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm as torch_layer_norm
from torch.nn.functional import rms_norm as torch_rms_norm

from acceleration.config import FusedKernel

Part: TypeAlias = Literal["norms", "adam"]

INSTALL = "APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install --no-build-isolation git+https://github.com/NVIDIA/apex"
EXTENSIONS: dict[Part, str] = {"norms": "fused_layer_norm_cuda", "adam": "amp_C"}
ADAM_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def missing(part: Part, device_type: str) -> str | None:
    """Why this machine cannot run a part of apex; None: it can. Imports nothing."""
    if device_type != "cuda":
        return f"apex runs on cuda, and this is computed on {device_type}"
    if find_spec("apex") is None or find_spec(EXTENSIONS[part]) is None:
        return f"apex is not installed with its CUDA extensions ({INSTALL})"
    return None


def chosen(choice: FusedKernel, part: Part, device_type: str) -> bool:
    """Whether a part of apex is used; ``auto``: where this machine can run it."""
    return choice == "apex" or (choice == "auto" and missing(part, device_type) is None)


class Asked(NamedTuple):
    """A key that chooses between torch's kernels and apex's."""

    key: str
    choice: FusedKernel
    part: Part
    device_type: str  # where this is computed


def check(asked: Sequence[Asked]) -> str | None:
    """What to announce of these keys: nothing, or one line, that torch's kernels stand in for apex's.

    Raises:
        ValueError: apex was asked for by name, and cannot be used.
    """
    lacking: dict[str, list[str]] = {}
    for key, choice, part, device_type in asked:
        why = missing(part, device_type) if choice != "torch" else None
        if why is not None and choice == "apex":
            raise ValueError(f"{key}=apex: {why}; use {key}=torch, or auto")
        if why is not None:
            lacking.setdefault(why, []).append(f"{key}=auto")
    lines = [f"{', '.join(keys)}: {why}, so torch's kernels are used" for why, keys in lacking.items()]
    return "; ".join(lines) or None


def layer_norm(x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Over the last dims, with the contract of torch's ``layer_norm``."""
    if x.numel() == 0 or (weight is None) != (bias is None) or not _of_type(x, weight, bias):
        return torch_layer_norm(x, list(shape), weight, bias, eps)
    from apex.normalization.fused_layer_norm import fused_layer_norm, fused_layer_norm_affine

    if weight is None or bias is None:
        return fused_layer_norm(x, tuple(shape), eps)
    return fused_layer_norm_affine(x, weight, bias, tuple(shape), eps)


def rms_norm(x: Tensor, shape: Sequence[int], weight: Tensor, eps: float) -> Tensor:
    """Over the last dims, with the contract of torch's ``rms_norm``."""
    if x.numel() == 0 or not _of_type(x, weight):
        return torch_rms_norm(x, list(shape), weight, eps)
    from apex.normalization.fused_layer_norm import fused_rms_norm_affine

    return fused_rms_norm_affine(x, weight, tuple(shape), eps)


def _of_type(x: Tensor, *of: Tensor | None) -> bool:
    """The kernels want weights of the input's own type, and at least one row."""
    return all(tensor is None or tensor.dtype == x.dtype for tensor in of)


def fused_adam(parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """``FusedAdam`` with decoupled decay over one group, whose settings are set before every step.

    It makes its state from ``exp_avg`` and ``exp_avg_sq`` of the parameters, and counts updates in ``step`` of the
    group.
    """
    from apex.optimizers import FusedAdam

    return FusedAdam(parameters, bias_correction=True, adam_w_mode=True)
