"""Pyramid attention broadcast: every attention keeps its output for some steps; a clock decides, not the numbers."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from opensora.models.base import AttentionAxis
from opensora.sampling.cache_config import PyramidAttentionBroadcast
from opensora.sampling.caches.base import Decision, OnDecision
from opensora.sampling.evaluation import Evaluation


class AttentionSlot(NamedTuple):
    """Where a model calls attention."""

    parent: nn.Module
    attribute: str
    name: str  # of the whole path
    axis: AttentionAxis


class AttentionCache:
    """Stands in every attention slot while a clip is sampled.

    All processes of a clip call the same attentions at the same times, so they agree without a word; also where an
    attention exchanges tokens, which a reused one does not.
    """

    def __init__(self, cfg: PyramidAttentionBroadcast, slots: Sequence[AttentionSlot], on_decision: OnDecision) -> None:
        self.cfg, self.slots, self.on_decision = cfg, slots, on_decision
        self.every: Mapping[AttentionAxis, int] = {
            "joint": cfg.spatial,
            "space": cfg.spatial,
            "time": cfg.temporal,
            "window": cfg.temporal,
            "cross": cfg.cross,
        }
        self.at: Evaluation | None = None

    @contextmanager
    def during(self, model: nn.Module) -> Iterator[None]:
        reused = [slot for slot in self.slots if self.every[slot.axis] > 1]
        cores = [getattr(slot.parent, slot.attribute) for slot in reused]
        for slot, core in zip(reused, cores, strict=True):
            setattr(slot.parent, slot.attribute, _Broadcast(core, self, slot))
        try:
            yield
        finally:
            for slot, core in zip(reused, cores, strict=True):
                setattr(slot.parent, slot.attribute, core)

    @contextmanager
    def watch(self, at: Evaluation) -> Iterator[None]:
        self.at = at
        try:
            yield
        finally:
            self.at = None

    def computes(self, call: int, at: Evaluation, axis: AttentionAxis) -> bool:
        """Whether an attention computes in its ``call``-th call of a pass, counted from 0."""
        low, high = self.cfg.time_range
        return call % self.every[axis] == 0 or not low < 1000 * at.time < high


class _Broadcast(nn.Module):
    """An attention core with what it gave before, of every pass of guidance."""

    def __init__(self, core: nn.Module, cache: AttentionCache, slot: AttentionSlot) -> None:
        super().__init__()
        self.core, self.cache, self.slot = core, cache, slot
        self._kept: dict[int, tuple[int, Tensor]] = {}  # pass -> (calls so far, output)

    @torch.compiler.disable  # other steps take other ways
    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None, context: Any = None, **more: Any
    ) -> Tensor:
        """As the core's."""
        at = self.cache.at
        if at is None:
            return self.core(q, k, v, key_mask=key_mask, context=context, **more)
        if (output := self.kept()) is not None:
            return output
        self.cache.on_decision(Decision(at, self.slot.name, True, None))
        output = self.core(q, k, v, key_mask=key_mask, context=context, **more)
        self._kept[at.number] = (self._calls(at) + 1, output)
        return output

    @torch.compiler.disable
    def kept(self) -> Tensor | None:
        """What it gave before, where this call gives it again: it counts as the call, and needs no queries. None: it
        computes, when it is called."""
        at = self.cache.at
        if at is None or at.number not in self._kept or self.cache.computes(self._calls(at), at, self.slot.axis):
            return None
        calls, output = self._kept[at.number]
        self.cache.on_decision(Decision(at, self.slot.name, False, None))
        self._kept[at.number] = (calls + 1, output)
        return output

    def _calls(self, at: Evaluation) -> int:
        return self._kept[at.number][0] if at.number in self._kept else 0
