"""Convolutions that are causal in time and padded by zeros, as both autoencoders of clips have them."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from opensora.models.vae.hunyuan_network import CONV_VALUES, runs


def causal(conv: nn.Conv3d, x: Tensor, past: int) -> Tensor:
    """``conv``, which pads height and width, with so many zero frames in front of ``x``.

    A few output frames at a time, so that the padded copy is small beside a long clip.
    """
    kernel, stride = conv.kernel_size[0], conv.stride[0]
    count = (x.shape[2] + past - kernel) // stride + 1
    pieces = min(count, -(-x.numel() // CONV_VALUES))
    if pieces <= 1:
        return conv(_frames(x, -past, x.shape[2]))
    found = []
    for first, last in runs(count, pieces):
        found.append(conv(_frames(x, first * stride - past, (last - 1) * stride - past + kernel)))
    return torch.cat(found, 2)


def _frames(x: Tensor, start: int, stop: int) -> Tensor:
    """Frames ``start`` to ``stop``; a negative ``start`` is before the first frame."""
    part, before = x[:, :, max(0, start) : stop], max(0, -start)
    return F.pad(part, (0, 0, 0, 0, before, 0)) if before else part


class CausalConv3d(nn.Module):
    """A frame sees itself and the frames before."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int = 3,
        stride: tuple[int, int, int] = (1, 1, 1),
        *,
        past: int | None = None,
        bias: bool = True,
    ) -> None:
        """``past``: zero frames in front; None: ``kernel - 1``."""
        super().__init__()
        around = kernel // 2
        self.conv = nn.Conv3d(inputs, outputs, kernel, stride, padding=(0, around, around), bias=bias)
        self.past = kernel - 1 if past is None else past

    def forward(self, x: Tensor) -> Tensor:
        return causal(self.conv, x, self.past)
