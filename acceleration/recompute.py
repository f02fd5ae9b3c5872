"""Gradient checkpointing: a recomputed block keeps its inputs only and runs again in backward."""

import functools

from torch import nn
from torch.utils.checkpoint import checkpoint

from acceleration import plan
from acceleration.config import RecomputeConfig


def apply(model: nn.Module, cfg: RecomputeConfig) -> None:
    """Recompute all blocks (``full``), the first ``blocks`` of them over all block lists (``first``), or none."""
    blocks = plan.blocks(model)
    count = {"none": 0, "full": len(blocks), "first": min(cfg.blocks, len(blocks))}[cfg.kind]
    for block in blocks[:count]:
        # The forward is replaced, not the module wrapped: parameter names stay what checkpoints say.
        # No generator state is saved: blocks draw no random numbers.
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
