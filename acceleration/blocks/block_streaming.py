"""Blocks of frozen weights that stream through a device: the one that runs is there, and the next one is on its way.

For weights that a process keeps whole, as a single GPU with little memory: FSDP2, which gathers ahead over several
processes, does not look ahead on one. Weights stay in pinned CPU memory; copies to the device run on a stream of their
own beside the block that computes, and are forgotten behind the block that used them. Sampling goes through the blocks
once a forward. In training adapters stay on the device (LoRA), and backward goes through the blocks the other way
round: the last block waits for it, and every block is fetched again. Not run on a GPU yet.
"""

from typing import Any

import torch
from torch import Tensor, nn

from acceleration import protocol
from acceleration.blocks.block_hooks import on_backward_begin, on_backward_end
from acceleration.blocks.module_offload import OffloadedModule


class BlockStream:
    """The blocks of one model."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        """Everything outside of the blocks goes to the device and stays, as does what is trained; every frozen weight
        of a block into (pinned) CPU memory."""
        self._device = device
        self._copies = torch.cuda.Stream() if device.type == "cuda" else None
        self._done: dict[int, torch.cuda.Event] = {}  # the copies of a block, by its index
        self._awaited: set[int] = set()  # blocks whose backward is still to come
        self._is_watched = False  # a backward runs, and at its end all blocks go out
        blocks = protocol.blocks(model)
        inside = {id(part) for block in blocks for part in block.modules()}
        for part in model.modules():
            if id(part) not in inside:
                _move(part, device)
        trained = {id(parameter) for _, parameter in protocol.trainable(model)}
        self._blocks = [OffloadedModule(block, device, stays=trained) for block in blocks]
        for index, offloaded in enumerate(self._blocks):
            self._hook(index, offloaded)

    def bring_in(self, block: nn.Module) -> None:
        """A block's weights, for a look at them outside its forward."""
        self._before(next(i for i, offloaded in enumerate(self._blocks) if offloaded.module is block))

    def send_out(self, block: nn.Module) -> None:
        """Forget what ``bring_in`` copied."""
        self._leave(next(i for i, offloaded in enumerate(self._blocks) if offloaded.module is block))

    def _hook(self, index: int, offloaded: OffloadedModule) -> None:
        def before(block: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            self._awaited.discard(index)
            self._before(index)
            return on_backward_end(args, lambda: self._leave(index)) if torch.is_grad_enabled() else args

        def after(block: nn.Module, args: Any, out: Any) -> None:
            if torch.is_grad_enabled() and on_backward_begin(out, lambda: self._before_backward(index)):
                self._awaited.add(index)
                if index + 1 == len(self._blocks):  # the first in backward
                    return
            self._leave(index)

        offloaded.module.register_forward_pre_hook(before)
        offloaded.module.register_forward_hook(after)

    def _before(self, index: int) -> None:
        """Block ``index`` is there, and the copies of the next one begin."""
        self._arrive(index)
        if index + 1 < len(self._blocks):
            self._fetch(index + 1)

    def _before_backward(self, index: int) -> None:
        """The same in backward, where the next one is the one before; told by every output of the block."""
        if index not in self._awaited:
            return
        self._awaited.discard(index)
        if not self._is_watched:  # by the end, as a block whose inputs need no gradient has none of its own
            self._is_watched = True
            torch.autograd.Variable._execution_engine.queue_callback(self._end_backward)
        self._arrive(index)
        if index - 1 in self._awaited:
            self._fetch(index - 1)

    def _end_backward(self) -> None:
        self._is_watched = False
        for index in range(len(self._blocks)):
            self._leave(index)

    def _arrive(self, index: int) -> None:
        self._fetch(index)
        self._settle(index)

    def _leave(self, index: int) -> None:
        self._settle(index)  # copies that nobody has waited for still write to its memory
        self._blocks[index].send_out()

    def _settle(self, index: int) -> None:
        if (event := self._done.pop(index, None)) is not None:
            torch.cuda.current_stream().wait_event(event)

    def _fetch(self, index: int) -> None:
        if self._copies is None:
            self._blocks[index].fetch()
        elif self._blocks[index].is_out:
            self._copies.wait_stream(torch.cuda.current_stream())  # the memory that copies go to is free
            self._blocks[index].fetch(self._copies)
            self._done[index] = self._copies.record_event()


def _move(module: nn.Module, device: torch.device) -> None:
    """What a module holds itself, without what is below it; what is there already stays as it is."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        if parameter.device != device:
            setattr(module, name, nn.Parameter(parameter.detach().to(device), requires_grad=False))
    for name, buffer in list(module.named_buffers(recurse=False)):
        setattr(module, name, buffer.to(device))


STREAM = "block_stream"  # where a block knows who streams it


def apply(model: nn.Module, device: torch.device) -> None:
    """Stream the blocks of a model whose frozen weights are whole, and those of blocks in CPU memory, in place."""
    stream = BlockStream(model, device)
    for block in protocol.blocks(model):
        object.__setattr__(block, STREAM, stream)


def stream_of(block: nn.Module) -> BlockStream | None:
    """Who streams a block; None: nobody."""
    return getattr(block, STREAM, None)


def frozen(model: nn.Module) -> list[Tensor]:
    """The weights that stream."""
    return [p for block in protocol.blocks(model) for p in block.parameters() if not p.requires_grad]
