"""Memory of activations, block by block, found by running forward and backward on the meta device.

Everything that a process would do is done with shapes only: its layers are cut, its slots exchange, its blocks are
recomputed; tensors live and die as autograd has it. So a new kind of recomputation or of slot needs no line here.
"""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from acceleration import protocol, sequence
from acceleration.blocks import activation_checkpoint
from acceleration.blocks.block_hooks import on_backward_begin, on_backward_end
from acceleration.config import ParallelConfig
from acceleration.distributed.mesh import Mesh
from acceleration.sharding import tensor_parallel
from acceleration.sharding.precision import DTYPES


@dataclass(frozen=True)
class Segment:
    """A part of a step: bytes of live tensors, from what they were before the step on."""

    start: int
    peak: int
    end: int


@dataclass(frozen=True)
class Timeline:
    """One micro-batch. Gradients of parameters are among the live tensors, and stay."""

    before: Segment  # forward up to the first block, inputs included
    forward: tuple[Segment, ...]  # of every block, in the order in which they run
    between: Segment  # forward from the last block on, loss, and backward down to it
    backward: tuple[Segment, ...]  # of every block, in the same order
    after: Segment  # backward below the first block


def assemble(parts: Sequence[tuple[Timeline, int]], head: Timeline) -> Timeline:
    """A micro-batch of other blocks than were run: each takes as much memory, and frees as much, as its model.

    Args:
        parts: for every block, a timeline and the number of a block in it.
        head: what is before, between and after them.
    """
    at = head.before.end
    forward, backward = [], []
    for line, index in parts:
        forward.append(_moved(line.forward[index], at))
        at = forward[-1].end
    between = _moved(head.between, at)
    at = between.end
    for line, index in reversed(parts):
        backward.append(_moved(line.backward[index], at))
        at = backward[-1].end
    return Timeline(head.before, tuple(forward), between, tuple(reversed(backward)), _moved(head.after, at))


def interpolate(low: Timeline, *highs: tuple[Timeline, float]) -> Timeline:
    """Between, or beyond, sizes of the same micro-batch: every count is linear in its tokens.

    Args:
        highs: timelines with more of something, and how much of the way from ``low`` to each is gone.
    """
    shares = [share for _, share in highs]

    def mix(a: Segment, *more: Segment) -> Segment:
        columns = zip(astuple(a), *(astuple(b) for b in more), strict=True)
        return Segment(*(round(x + sum((y - x) * s for y, s in zip(ys, shares, strict=True))) for x, *ys in columns))

    lines = [low, *(high for high, _ in highs)]
    return Timeline(
        mix(*(line.before for line in lines)),
        tuple(mix(*same) for same in zip(*(line.forward for line in lines), strict=True)),
        mix(*(line.between for line in lines)),
        tuple(mix(*same) for same in zip(*(line.backward for line in lines), strict=True)),
        mix(*(line.after for line in lines)),
    )


def _moved(segment: Segment, start: int) -> Segment:
    by = start - segment.start
    return Segment(start, segment.peak + by, segment.end + by)


def spread(model: nn.Module, cfg: ParallelConfig, mesh: Mesh, device_type: str) -> nn.Module:
    """A meta model as one process of a layout has it while it computes, but for sharding. See ``parallelize``."""
    tensor_parallel.apply(model, mesh["tensor"])
    kernel = cfg.attention if cfg.attention != "auto" else device_type
    sequence.fill_slots(model, mesh, kernel)
    activation_checkpoint.apply(model, cfg.recompute)
    return model.to(DTYPES[cfg.precision.compute])


def timeline(model: nn.Module, loss: Callable[[], Tensor], *, accumulates: bool = False) -> Timeline:
    """Run ``loss`` and its backward on a meta model that was ``spread``.

    Args:
        loss: makes the inputs, runs the model, gives the scalar.
        accumulates: gradients exist already, from an earlier micro-batch.
    """
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter) if accumulates and parameter.requires_grad else None
    blocks = protocol.blocks(model)
    with _Live() as live:
        marks = _Marks(live, len(blocks))
        handles = [block.register_forward_pre_hook(marks.forward(i)) for i, block in enumerate(blocks)]
        handles.append(blocks[-1].register_forward_hook(marks.last))
        try:
            loss().backward()
        finally:
            for handle in handles:
                handle.remove()
        return marks.timeline()


def forward_timeline(model: nn.Module, run: Callable[[], Any]) -> Timeline:
    """The same of a forward without gradients, as in sampling; there is no backward in it."""
    blocks = protocol.blocks(model)
    with _Live() as live, torch.no_grad():
        marks = _Marks(live, len(blocks))
        handles = [block.register_forward_pre_hook(marks.forward(i)) for i, block in enumerate(blocks)]
        handles.append(blocks[-1].register_forward_hook(marks.last))
        try:
            out = run()  # held to the end, as its caller does
        finally:
            for handle in handles:
                handle.remove()
        line = marks.timeline()
        del out
    return line


class _Live(TorchDispatchMode):
    """Bytes of the storages that were made inside and are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {id(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and id(x.untyped_storage()) not in given:
                self._add(x.untyped_storage())
        return out

    def _add(self, storage: Any) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._known:
            return

        def gone(_: Any) -> None:
            self.bytes -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, gone)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)


class _Marks:
    """Where one segment ends and the next begins."""

    def __init__(self, live: _Live, blocks: int) -> None:
        self.live, self.blocks = live, blocks
        self.found: dict[str, Segment] = {}
        self.name, self.start = "before", 0
        self.begun = 0  # blocks

    def forward(self, index: int) -> Callable[..., Any]:
        """For the outside of a block, before it runs."""

        def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            assert self.begun == index, "blocks run in another order than block_lists says"
            self.begun += 1
            self._begin(f"forward {index}")
            return on_backward_end(args, lambda: self._begin(f"backward {index - 1}"))

        return hook

    def last(self, module: nn.Module, args: Any, out: Any) -> None:
        """For the last block, after it ran."""
        on_backward_begin(out, lambda: self._begin(f"backward {self.blocks - 1}"))
        self._begin("between")

    def timeline(self) -> Timeline:
        self._begin("end")
        level = self.found["between"].end
        backward = []
        for index in reversed(range(self.blocks)):  # below the first adapter there is none
            backward.append(self.found.get(f"backward {index}", Segment(level, level, level)))
            level = backward[-1].end
        return Timeline(
            before=self.found["before"],
            forward=tuple(self.found[f"forward {i}"] for i in range(self.blocks)),
            between=self.found["between"],
            backward=tuple(reversed(backward)),
            after=self.found.get("backward -1", Segment(level, level, level)),
        )

    def _begin(self, name: str) -> None:
        if name == self.name:
            return  # the second output of the last block
        self.found[self.name] = Segment(self.start, self.live.peak, self.live.bytes)
        self.name, self.start, self.live.peak = name, self.live.bytes, self.live.bytes
