"""Blocks of a frozen model that stream through a device: the one that runs is there, and the next one is on its way.

For one process that keeps all weights, as a single GPU with little memory: FSDP2, which gathers ahead over several
processes, does not look ahead on one. Weights stay in pinned CPU memory; copies to the device run on a stream of their
own beside the block that computes, and are forgotten behind the block that used them. Not run on a GPU yet.
"""

from typing import Any

import torch
from torch import nn

from acceleration import protocol
from acceleration.blocks.module_offload import OffloadedModule


class BlockStream:
    """The blocks of one model."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        """Everything outside of the blocks goes to the device and stays, every block into (pinned) CPU memory."""
        self._device = device
        self._copies = torch.cuda.Stream() if device.type == "cuda" else None
        self._done: dict[int, torch.cuda.Event] = {}  # the copies of a block, by its index
        blocks = protocol.blocks(model)
        inside = {id(part) for block in blocks for part in block.modules()}
        for part in model.modules():
            if id(part) not in inside:
                _move(part, device)
        self._blocks = [OffloadedModule(block, device) for block in blocks]
        for index, offloaded in enumerate(self._blocks):
            offloaded.send_out()
            self._hook(index, offloaded)

    def bring_in(self, block: nn.Module) -> None:
        """A block's weights, for a look at them outside its forward."""
        self._before(next(i for i, offloaded in enumerate(self._blocks) if offloaded.module is block))

    def send_out(self, block: nn.Module) -> None:
        """Forget what ``bring_in`` copied."""
        next(offloaded for offloaded in self._blocks if offloaded.module is block).send_out()

    def _hook(self, index: int, offloaded: OffloadedModule) -> None:
        def before(block: nn.Module, args: Any) -> None:
            self._before(index)

        def after(block: nn.Module, args: Any, out: Any) -> None:
            offloaded.send_out()

        offloaded.module.register_forward_pre_hook(before)
        offloaded.module.register_forward_hook(after)

    def _before(self, index: int) -> None:
        """Block ``index`` is there, and the copies of the next one begin."""
        self._fetch(index)
        if self._copies is not None and index in self._done:
            torch.cuda.current_stream().wait_event(self._done.pop(index))
        self._blocks[index].bring_in()
        if index + 1 < len(self._blocks):
            self._fetch(index + 1)

    def _fetch(self, index: int) -> None:
        if self._copies is None:
            self._blocks[index].fetch()
        elif self._blocks[index].is_out:
            self._copies.wait_stream(torch.cuda.current_stream())  # the memory that copies go to is free
            self._blocks[index].fetch(self._copies)
            self._done[index] = self._copies.record_event()


def _move(module: nn.Module, device: torch.device) -> None:
    """What a module holds itself, without what is below it."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        setattr(module, name, nn.Parameter(parameter.detach().to(device), requires_grad=False))
    for name, buffer in list(module.named_buffers(recurse=False)):
        setattr(module, name, buffer.to(device))


STREAM = "block_stream"  # where a block knows who streams it


def apply(model: nn.Module, device: torch.device) -> None:
    """Stream the blocks of a model whose weights are whole and in CPU memory, in place."""
    stream = BlockStream(model, device)
    for block in protocol.blocks(model):
        object.__setattr__(block, STREAM, stream)


def stream_of(block: nn.Module) -> BlockStream | None:
    """Who streams a block; None: nobody."""
    return getattr(block, STREAM, None)
