"""How much memory this process used at its peak."""

import resource
import sys

import torch


def peak_gib(device: torch.device) -> float:
    """Peak allocation on a GPU, or peak resident set of the process on a CPU, in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)  # bytes on macOS, KiB elsewhere
