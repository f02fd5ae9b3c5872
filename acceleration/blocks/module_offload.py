"""Frozen modules that take turns on a device: one is there, the others wait in CPU memory.

A plain module keeps its weights in (pinned) CPU memory for good, and a copy on the device while it is its turn: going
out copies nothing. What FSDP manages is moved as a whole, by the way that FSDP2 has for it.
"""

from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule


class OffloadedModule:
    """One module whose weights do not change."""

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self.module, self.device = module, device
        self._on_host: dict[int, Tensor] = {}  # by the address of the copy on the device
        self._fetched: dict[int, Tensor] = {}  # copies on the device, by the address in CPU memory

    @property
    def is_out(self) -> bool:
        """Nothing of it is on the device, nor on its way."""
        return not self._fetched and not self._on_host

    def fetch(self, stream: "torch.cuda.Stream | None" = None) -> None:
        """Start copying a plain module's weights, on ``stream``; ``bring_in`` puts the copies in their place.

        Memory is of the current stream, which uses it last; whoever gives another stream orders the two.
        """
        if not self.is_out:
            return
        tensors = [x.detach() for x in (*self.module.parameters(), *self.module.buffers()) if x.numel()]
        copies = [torch.empty_like(x, device=self.device) for x in tensors]
        with torch.cuda.stream(stream) if stream is not None else nullcontext():
            for copy, values in zip(copies, tensors, strict=True):
                copy.copy_(values, non_blocking=True)
        self._fetched = {values.data_ptr(): copy for values, copy in zip(tensors, copies, strict=True)}

    def bring_in(self) -> None:
        """Its weights are on the device afterwards."""
        if isinstance(self.module, FSDPModule):
            self.module.to(self.device)
        else:
            self.module._apply(self._to_device)
            self._fetched.clear()

    def send_out(self) -> None:
        """Its weights are in CPU memory afterwards."""
        if isinstance(self.module, FSDPModule):
            self.module.to("cpu")
        else:
            self.module._apply(self._to_host)
            self._on_host.clear()

    def _to_device(self, values: Tensor) -> Tensor:
        if values.device == self.device:  # tied to one that came before
            return values
        copy = self._fetched.get(values.data_ptr())
        if copy is None or copy.shape != values.shape:
            copy = values.detach().to(self.device, non_blocking=True)
        self._on_host[copy.data_ptr()] = values.detach()
        return copy

    def _to_host(self, copy: Tensor) -> Tensor:
        if (values := self._on_host.get(copy.data_ptr())) is not None and values.shape == copy.shape:
            return values
        values = copy.detach().to("cpu")  # the same tensor, where it is there already
        return values.pin_memory() if self.device.type == "cuda" and not values.is_pinned() else values
