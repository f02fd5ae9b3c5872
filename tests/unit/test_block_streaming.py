"""Copies of blocks that stream: what waits for them, which a device that is simulated cannot show.

Streams are recorded, and tensors are on the CPU: the order in which things are asked for is that on a GPU.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from acceleration.blocks.block_streaming import BlockStream
from acceleration.blocks.module_offload import OffloadedModule

COUNT = 4


class Block(nn.Module):
    """A frozen layer beside a trained one."""

    def __init__(self, log: list[tuple[str, int]], index: int) -> None:
        super().__init__()
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.adapter = nn.Linear(3, 3)
        self.log, self.index = log, index

    def forward(self, x: Tensor) -> Tensor:
        self.log.append(("runs", self.index))
        out = self.frozen(x) + self.adapter(x)
        if out.requires_grad:  # its own backward, behind the hooks on its outputs
            inner = out.clone()
            out.register_hook(lambda _: self.log.append(("runs", self.index)))
            return inner
        return out


class Model(nn.Module):
    block_lists = ("blocks",)

    def __init__(self, log: list[tuple[str, int]]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(log, index) for index in range(COUNT)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Streams:
    """The stream of copies and that of the blocks, in one log."""

    def __init__(self) -> None:
        self.log: list[tuple[str, int]] = []
        self.copied = -1  # the block whose copies were started last

    def wait_stream(self, other: Any) -> None:
        self.log.append(("memory is free", -1))

    def record_event(self) -> int:
        return self.copied

    def wait_event(self, event: int) -> None:
        self.log.append(("waits", event))


@contextmanager
def streaming() -> Iterator[tuple[Model, BlockStream, list[tuple[str, int]]]]:
    streams = Streams()
    model = Model(streams.log)
    stream = BlockStream(model, torch.device("cpu"))
    stream._copies = streams  # type: ignore[assignment]
    fetch, send_out = OffloadedModule.fetch, OffloadedModule.send_out

    def fetched(self: Any, stream: Any = None) -> None:
        streams.copied = self.module.index
        streams.log.append(("copies", self.module.index))
        fetch(self)

    def sent_out(self: Any) -> None:
        if not self.is_out:
            streams.log.append(("is gone", self.module.index))
        send_out(self)

    with (
        mock.patch.object(OffloadedModule, "fetch", fetched),
        mock.patch.object(OffloadedModule, "send_out", sent_out),
        mock.patch.object(torch.cuda, "current_stream", lambda: streams),
        mock.patch.object(torch.cuda, "stream", nullcontext),
    ):
        yield model, stream, streams.log


def check(log: list[tuple[str, int]]) -> None:
    """Copies start when their memory is free; a block runs, and its memory is given up, when its copies are done."""
    state = dict.fromkeys(range(COUNT), "out")
    for position, (what, index) in enumerate(log):
        if what == "copies":
            assert log[position - 1][0] == "memory is free" and state[index] == "out"
            state[index] = "on its way"
        if what == "waits":
            assert state[index] == "on its way"
            state[index] = "there"
        if what in ("runs", "is gone"):
            assert state[index] == "there", (what, index, log[:position])
            state[index] = "out" if what == "is gone" else "there"
    assert set(state.values()) == {"out"}


def test_training() -> None:
    with streaming() as (model, _, log):
        for _ in range(2):
            model(torch.ones(2, 3)).sum().backward()
            check(log)
    assert [index for what, index in log if what == "runs"] == 2 * [0, 1, 2, 3, 3, 2, 1, 0]
    assert sum(what == "copies" for what, _ in log) == 2 * (2 * COUNT - 1)  # the last stays for its backward


def test_sampling() -> None:
    with streaming() as (model, _, log), torch.no_grad():
        model(torch.ones(2, 3))
    check(log)
    starts = {index: log.index(("copies", index)) for index in range(COUNT)}
    assert all(starts[index + 1] < log.index(("runs", index)) for index in range(COUNT - 1))  # one ahead


def test_a_block_that_is_passed_by_is_waited_for() -> None:
    with streaming() as (model, stream, log):
        stream.bring_in(model.blocks[0])  # so that copies of the next one begin
        stream.send_out(model.blocks[1])
        stream.send_out(model.blocks[0])
    check(log)
