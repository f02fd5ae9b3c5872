"""From the CPU, where everything random is drawn, to the device."""

import torch
from torch import Tensor


def upload(x: Tensor, device: torch.device) -> Tensor:
    """``x``, a tensor of the CPU, on ``device``.

    To a GPU through pinned memory: the copy is queued behind what the GPU is at, and nobody waits for it. From plain
    memory the CPU would wait, and with it all that it has not asked the GPU for yet.
    """
    if device.type == "cuda":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)
