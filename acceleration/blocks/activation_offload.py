"""Tensors that wait on the CPU for backward, fetched back one block ahead of their use.

On CUDA the copies run on a stream of their own, from and to pinned memory, beside the computation; not run on a GPU
yet. On a CPU every copy is a plain one, so that the same code runs.
"""

import weakref
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

Packed: TypeAlias = int | Tensor  # the number of a tensor that was moved, or a tensor that stayed


class Offload:
    """The parcels of one model, one per run of a block."""

    def __init__(self) -> None:
        self._last: weakref.ref[Parcel] | None = None
        self._addresses: set[int] = set()  # of the inputs of the block before
        self._stream: torch.cuda.Stream | None = None
        self._moving: list[tuple[torch.cuda.Event, Tensor, Tensor]] = []

    def parcel(self, inputs: Sequence[object]) -> "Parcel":
        """For a block that is about to run on ``inputs``. What the block before was given too stays where it is."""
        self.settle()
        addresses = {x.untyped_storage().data_ptr() for x in inputs if isinstance(x, Tensor)}
        parcel = Parcel(self, before=self._last, stays=addresses & self._addresses)
        self._last, self._addresses = weakref.ref(parcel), addresses
        return parcel

    def move(self, x: Tensor, device: torch.device) -> Tensor:
        """A copy of ``x`` on ``device``, to be read after ``settle``."""
        if x.device.type == "meta" or device.type == "meta":  # whoever counts bytes finds none on the CPU
            shape = torch.empty((), dtype=x.dtype) if x.device.type == "meta" else torch.empty_like(x, device="meta")
            return shape.expand(x.shape)
        if "cuda" not in (x.device.type, device.type):
            return x.clone()
        target = torch.empty_like(x, device=device, pin_memory=device.type == "cpu")
        self._stream = self._stream or torch.cuda.Stream()
        self._stream.wait_stream(torch.cuda.current_stream())  # x is computed, and the memory of target is free
        with torch.cuda.stream(self._stream):
            target.copy_(x, non_blocking=True)
        self._moving.append((self._stream.record_event(), x, target))
        return target

    def settle(self) -> None:
        """Let the computation wait for the copies under way; only then may the memory of either end be used again.

        Called where a block starts, when the copies started with the block before: a whole block hides them. (The
        alternative, ``record_stream``, frees memory as late as the host runs ahead.)
        """
        for event, _, _ in self._moving:
            torch.cuda.current_stream().wait_event(event)
        self._moving.clear()


class Parcel:
    """What one run of a block needs in backward. Alive as long as the graph of that run."""

    def __init__(self, offload: Offload, before: "weakref.ref[Parcel] | None", stays: set[int]) -> None:
        self._offload, self._before, self._stays = offload, before, stays
        self._there: list[tuple[Tensor, torch.device]] = []  # the copy on the CPU, and where it came from
        self._here: dict[int, Tensor] = {}

    def pack(self, x: Tensor) -> Packed:
        """Move ``x`` to the CPU, unless it stays. The block's inputs come first."""
        x = x.detach()
        if x.numel() == 0 or x.untyped_storage().data_ptr() in self._stays:
            return x
        self._there.append((self._offload.move(x, torch.device("cpu")), x.device))
        return len(self._there) - 1

    def unpack(self, packed: Packed) -> Tensor:
        """The tensor again. The first one asked for starts the way back of the block that is next in backward."""
        if isinstance(packed, Tensor):
            return packed
        if packed == 0:
            self.fetch()
            self._offload.settle()
            before = self._before() if self._before else None
            if before:
                before.fetch()
        return self._here.pop(packed)

    def fetch(self) -> None:
        """Start the way back of everything, unless it has started."""
        if not self._here:
            self._here = {i: self._offload.move(x, device) for i, (x, device) in enumerate(self._there)}
