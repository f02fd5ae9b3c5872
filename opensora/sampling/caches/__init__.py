"""Step caches: steps of sampling that reuse what earlier ones computed. A new kind is a configuration, and a file."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from opensora.sampling.cache_config import (
    CACHE_CONFIGS,
    CacheConfig,
    DBCache,
    FirstBlockCache,
    MagCache,
    NoCache,
    PyramidAttentionBroadcast,
    TeaCache,
)
from opensora.sampling.caches.attention import AttentionCache, AttentionSlot
from opensora.sampling.caches.base import Decision, NoStepCache, OnDecision, StepCache
from opensora.sampling.caches.blocks import BlockCache, BlockPlan
from opensora.sampling.caches.decisions import DBDecisions, FirstBlockDecisions, MagDecisions, TeaDecisions
from opensora.sampling.caches.together import Alone, Together

__all__ = [
    "CACHE_CONFIGS",
    "Alone",
    "AttentionSlot",
    "CacheConfig",
    "DBCache",
    "Decision",
    "FirstBlockCache",
    "MagCache",
    "NoCache",
    "OnDecision",
    "PyramidAttentionBroadcast",
    "StepCache",
    "TeaCache",
    "Together",
    "build_step_cache",
    "needs",
]


def plan_of(cfg: CacheConfig) -> BlockPlan:
    """Which blocks always run under a cache that reuses blocks."""
    if isinstance(cfg, DBCache):
        return BlockPlan(cfg.first_blocks, cfg.last_blocks)
    return BlockPlan(first=int(isinstance(cfg, FirstBlockCache)), modulated=isinstance(cfg, TeaCache))


def needs(cfg: CacheConfig) -> tuple[str, int]:
    """(what a denoiser must state for it: "", "blocks" or "modulated"; the least number of blocks that leaves any)."""
    if isinstance(cfg, NoCache | PyramidAttentionBroadcast):
        return "", 1
    plan = plan_of(cfg)
    return "modulated" if plan.modulated else "blocks", plan.first + plan.last + 1


def build_step_cache(
    cfg: CacheConfig, *, together: Together, slots: Sequence[AttentionSlot], on_decision: OnDecision
) -> StepCache:
    """The cache of one model.

    Args:
        slots: the model's attention slots.
        on_decision: told of every decision of this process.
    """
    decisions: Any = {
        FirstBlockCache: FirstBlockDecisions,
        DBCache: DBDecisions,
        TeaCache: TeaDecisions,
        MagCache: MagDecisions,
    }
    if isinstance(cfg, NoCache):
        return NoStepCache()
    if isinstance(cfg, PyramidAttentionBroadcast):
        return AttentionCache(cfg, slots, on_decision)
    return BlockCache(plan_of(cfg), partial(decisions[type(cfg)], cfg), together, on_decision)
