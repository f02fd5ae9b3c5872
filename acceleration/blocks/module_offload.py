"""Frozen modules that take turns on a device: one is there, the others wait in CPU memory.

A plain module keeps its weights in (pinned) CPU memory for good. On the device it has tensors without memory, which get
some while it is their turn, and are filled from there; going out copies nothing. The tensors stay the same ones, so
that what autograd has kept of them in forward is there again when it is their turn in backward, as FSDP2 has it. What
FSDP manages is moved as a whole, by the way that FSDP2 has for it.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class OffloadedModule:
    """One module whose weights do not change; out, to begin with."""

    def __init__(self, module: nn.Module, device: torch.device, stays: Collection[int] = ()) -> None:
        """``stays``: identities of parameters that are left where they are, as those that are trained."""
        self.module, self.device = module, device
        self.is_out = True
        self._is_sharded = any(isinstance(p, DTensor) for p in module.parameters() if id(p) not in stays)
        self._tensors: list[tuple[Tensor, Tensor, int]] = []  # in CPU memory, on the device, bytes there
        if self._is_sharded:
            module.to("cpu")
        else:
            self._replace(stays)

    def fetch(self, stream: "torch.cuda.Stream | None" = None) -> None:
        """Start copying the weights to the device, on ``stream``.

        Memory is of the current stream, which uses it last; whoever gives another stream orders the two.
        """
        if not self.is_out:
            return
        self.is_out = False
        if self._is_sharded:
            self.module.to(self.device)
            return
        for _, here, size in self._tensors:
            here.untyped_storage().resize_(size)
        with torch.cuda.stream(stream) if stream is not None else nullcontext(), torch.no_grad():
            for host, here, _ in self._tensors:
                with torch.autograd._unsafe_preserve_version_counter(here):  # the same values as ever
                    here.copy_(host, non_blocking=True)

    def bring_in(self) -> None:
        """Its weights are on the device afterwards."""
        self.fetch()

    def send_out(self) -> None:
        """Its weights are in CPU memory afterwards."""
        if self.is_out:
            return
        self.is_out = True
        if self._is_sharded:
            self.module.to("cpu")
        for _, here, _ in self._tensors:
            here.untyped_storage().resize_(0)

    def _replace(self, stays: Collection[int]) -> None:
        """Tensors without memory in the place of the module's own, whose values go to CPU memory."""
        replaced: dict[int, Tensor] = {}  # by the identity of what was there: what is tied stays tied
        for owner in self.module.modules():
            places: list[dict[str, Any]] = [owner._parameters, owner._buffers]
            for held in places:
                for name, was in held.items():
                    if was is None or id(was) in stays or not was.numel():
                        continue
                    if id(was) not in replaced:
                        replaced[id(was)] = self._without_memory(was)
                    held[name] = replaced[id(was)]

    def _without_memory(self, was: Tensor) -> Tensor:
        host = self._on_host(was.detach())
        here = torch.empty_like(host, device=self.device)
        if isinstance(was, nn.Parameter):
            here = nn.Parameter(here, requires_grad=False)
        self._tensors.append((host, here, here.untyped_storage().nbytes()))
        here.untyped_storage().resize_(0)
        return here

    def _on_host(self, values: Tensor) -> Tensor:
        """In page-locked memory, which copies leave at the speed of the bus."""
        host = values.to("cpu")  # the same tensor, where it is there already
        return host.pin_memory() if self.device.type == "cuda" and not host.is_pinned() else host


class Visits:
    """Modules that are on the device only while they are used; all together."""

    def __init__(self, modules: Sequence[nn.Module], device: torch.device) -> None:
        self._modules = [OffloadedModule(module, device) for module in modules]

    @contextmanager
    def here(self) -> Iterator[None]:
        """Their weights are on the device; afterwards what they took there is free."""
        try:
            for module in self._modules:
                module.bring_in()
            yield
        finally:
            for module in self._modules:
                module.send_out()
