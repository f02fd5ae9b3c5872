"""Caches that reuse what blocks add to their streams: first-block cache, DBCache, TeaCache, MagCache.

Blocks are in three parts: the first ones and the last ones always run; what those between add is kept, and added again
in a step that reuses. Whether it does is decided behind the first part, by ``decisions.py``, from how much a signal has
changed: what the first part adds to the image tokens, or the modulated input of the first block.

All processes that share the tokens of a clip see the same sums and decide alike. Processes that share the weights but
work on other clips, or on another pass of guidance, decide for themselves: as long as one of them computes, all gather.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf
from typing import NamedTuple

import torch
from torch import Tensor, nn

from opensora.models.layers.stages import Stage, Streams, run_in_order
from opensora.sampling.caches.base import Decision, OnDecision
from opensora.sampling.caches.decisions import Decisions
from opensora.sampling.caches.together import Together
from opensora.sampling.evaluation import Evaluation


@dataclass(frozen=True)
class BlockPlan:
    """Which blocks always run, and what is looked at."""

    first: int = 0
    last: int = 0
    modulated: bool = False  # look at the first block's modulated input, before any block runs


class _Part(NamedTuple):
    """A block, or the way from one stage's streams to the next one's, which always runs."""

    stage: Stage
    block: nn.Module | None

    def run(self, streams: Streams) -> Streams:
        if self.block is not None:
            return self.stage.run(self.block, streams)
        assert self.stage.enter is not None
        return self.stage.enter(streams)


@dataclass
class _Kept:
    """What one pass of guidance has left behind."""

    decisions: Decisions
    signal: Tensor | None = None  # that a change is measured from
    added: Streams | None = None  # by the blocks in the middle


class BlockCache:
    """A loop over blocks (``run_stages``) that runs what must be run."""

    def __init__(
        self, plan: BlockPlan, new_pass: Callable[[], Decisions], together: Together, on_decision: OnDecision
    ) -> None:
        """``new_pass`` makes the decisions of a pass of guidance of a new clip."""
        self.plan, self.new_pass, self.together, self.on_decision = plan, new_pass, together, on_decision
        self._passes: dict[int, _Kept] = {}
        self._at: Evaluation | None = None

    @contextmanager
    def during(self, model: nn.Module) -> Iterator[None]:
        before = model.run_stages
        model.run_stages = self  # type: ignore[assignment]
        try:
            yield
        finally:
            model.run_stages = before
            self._passes.clear()

    @contextmanager
    def watch(self, at: Evaluation) -> Iterator[None]:
        self._at = at
        try:
            yield
        finally:
            self._at = None

    def __call__(self, stages: Sequence[Stage], streams: Streams) -> Tensor:
        if self._at is None:
            return run_in_order(stages, streams)
        kept = self._passes.setdefault(self._at.number, _Kept(self.new_pass()))
        first, middle, last = self._parts(stages)
        signal, streams = self._look(first or middle, bool(first), streams)
        change = None if signal is None else self._change(signal, kept.signal)
        reuses = kept.decisions.reuses(change, self._at)
        self.on_decision(Decision(self._at, "blocks", not reuses, change))
        if signal is not None and (kept.decisions.since == "before" or not reuses):
            kept.signal = signal
        streams = self._middle(middle, streams, kept, computes=not reuses)
        return stages[-1].image(_run(last, streams))

    def _parts(self, stages: Sequence[Stage]) -> tuple[list[_Part], list[_Part], list[_Part]]:
        """The first blocks, those between, the last ones."""
        parts: list[_Part] = []
        for stage in stages:
            parts += [_Part(stage, None)] if stage.enter else []
            parts += [_Part(stage, block) for block in stage.blocks]
        blocks = [index for index, part in enumerate(parts) if part.block is not None]
        assert self.plan.first + self.plan.last < len(blocks), (self.plan, len(blocks))
        start = blocks[self.plan.first - 1] + 1 if self.plan.first else 0
        end = blocks[-self.plan.last] if self.plan.last else len(parts)
        return parts[:start], parts[start:end], parts[end:]

    def _look(self, parts: list[_Part], runs: bool, streams: Streams) -> tuple[Tensor | None, Streams]:
        """(the signal, the streams behind the first part)."""
        if runs:
            before = parts[0].stage.image(streams)
            streams = _run(parts, streams)
            return parts[-1].stage.image(streams) - before, streams
        stage, block = parts[0]
        if not self.plan.modulated:
            return None, streams
        assert stage.modulated is not None and block is not None
        self.together.gather(block)
        return stage.modulated(block, streams), streams

    def _change(self, signal: Tensor, before: Tensor | None) -> float | None:
        """Mean |signal - before| / mean |before| over the tokens of all processes and clips; None: nothing before."""
        if before is None:
            return None
        exact = torch.promote_types(signal.dtype, torch.float32)
        size = before.to(exact).abs()
        difference = (signal.to(exact) - before.to(exact)).abs()
        sums = torch.stack([x.sum(dtype=torch.float64) for x in (difference, size)])
        changed, of = self.together.total(sums).tolist()
        return changed / of if of else inf if changed else 0.0  # NaN is below no threshold

    def _middle(self, parts: list[_Part], streams: Streams, kept: _Kept, *, computes: bool) -> Streams:
        """The streams behind the blocks in the middle, whose weights every process gathers as long as one computes."""
        carried = _run([part for part in parts if part.block is None], streams)  # as if no block added anything
        anyone = self.together.anyone(computes)
        if computes:
            streams = _run(parts, streams)
            kept.added = tuple(x - y for x, y in zip(streams, carried, strict=True))
            return streams
        for block in (part.block for part in parts if part.block is not None):
            if anyone:
                self.together.gather(block)
            if anyone or self.plan.modulated:
                self.together.let_go(block)
        assert kept.added is not None
        return tuple(x + y for x, y in zip(carried, kept.added, strict=True))


def _run(parts: Sequence[_Part], streams: Streams) -> Streams:
    for part in parts:
        streams = part.run(streams)
    return streams
