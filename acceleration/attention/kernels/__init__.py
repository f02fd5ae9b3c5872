"""Attention kernels by name, all with one contract (``base.Kernel``)."""

from importlib.util import find_spec

import torch

from acceleration.attention.kernels.base import Kernel
from acceleration.attention.kernels.flash import FLASH2, FLASH3
from acceleration.attention.kernels.flex import FLEX
from acceleration.attention.kernels.reference import MATH
from acceleration.attention.kernels.sdpa import CPU, CUDA, CUDNN

KERNELS = {
    "math": MATH,
    "cpu": CPU,
    "cuda": CUDA,
    "cudnn": CUDNN,
    "flash_attn": FLASH2,
    "flash_attn_3": FLASH3,
    "flex": FLEX,
}
# Those that need more than torch: (the module, how to get it).
PACKAGES = {
    "flash_attn": ("flash_attn", 'pip install --no-build-isolation ".[flash-attn]"'),
    "flash_attn_3": ("flash_attn_interface", "build hopper/ of the flash-attention repository"),
}
DEVICES = {"cpu": "cpu"} | dict.fromkeys(("cuda", "cudnn", "flash_attn", "flash_attn_3", "flex"), "cuda")


def kernel_for(name: str, device: torch.device) -> Kernel:
    """The kernel that ``parallel.attention`` names; ``auto`` is torch's own for the device."""
    if name == "auto":
        name = device.type if device.type in KERNELS else "math"
    return KERNELS[name]


def check_kernel(name: str, device_type: str) -> None:
    """That this machine can run the kernel that ``parallel.attention`` names; imports nothing.

    Raises:
        ValueError: what is missing, and what would work.
    """
    needs = DEVICES.get(name, device_type)
    if needs != device_type:
        raise ValueError(f"attention={name}: runs on {needs}, this machine computes on {device_type}; use auto")
    if name in PACKAGES and find_spec(PACKAGES[name][0]) is None:
        raise ValueError(f"attention={name}: not installed; {PACKAGES[name][1]}, or use attention=auto")


__all__ = ["KERNELS", "Kernel", "check_kernel", "kernel_for"]
