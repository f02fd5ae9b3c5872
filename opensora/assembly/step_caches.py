"""Where step caches meet processes and models.

A clip's tokens are cut over ring x ulysses, its layers over tensor: these processes decide alike, on sums that all
add up in the same order. Weights are gathered over shard x cfg x ring x ulysses with ZeRO 3: data-parallel groups with
other clips, and processes with another pass of guidance, decide for themselves, and gather along with one another.
"""

import torch
from torch import Tensor, nn

from acceleration.blocks.block_streaming import stream_of
from acceleration.distributed import collectives
from acceleration.distributed.mesh import FSDP, Mesh
from acceleration.protocol import slots
from acceleration.sharding import fsdp
from opensora.models.base import Denoising
from opensora.sampling.caches import AttentionSlot, CacheConfig, OnDecision, StepCache, build_step_cache, needs


class OnMesh:
    """``Together`` of a model that is spread over a mesh."""

    def __init__(self, model: nn.Module, mesh: Mesh) -> None:
        self.mesh = mesh
        self._votes = fsdp.frees_weights(model) and mesh[FSDP].degree > 1

    def total(self, values: Tensor) -> Tensor:
        for name in ("ulysses", "ring"):
            axis = self.mesh[name]
            gathered = collectives.all_gather(values, 0, [len(values)] * axis.degree, axis)
            values = gathered.view(axis.degree, -1).sum(dim=0)  # in rank order, so that all have the same bits
        tensor = self.mesh["tensor"]  # whose processes hold the same tokens: all take the first one's
        return collectives.all_gather(values, 0, [len(values)] * tensor.degree, tensor)[: len(values)]

    def anyone(self, computes: bool) -> bool:
        if not self._votes:
            return computes
        votes = torch.tensor([int(computes)], device=self.mesh.device_type)
        return bool(collectives.all_reduce_(votes, self.mesh[FSDP]).item())

    def gather(self, block: nn.Module) -> None:
        if stream := stream_of(block):
            stream.bring_in(block)
        fsdp.gather(block)

    def let_go(self, block: nn.Module) -> None:
        if stream := stream_of(block):
            stream.send_out(block)
        fsdp.let_go(block)


def step_cache(cfg: CacheConfig, model: nn.Module, mesh: Mesh, on_decision: OnDecision) -> StepCache:
    """The cache of a model that is spread over ``mesh``."""
    names = {id(module): name for name, module in model.named_modules()}
    found = [
        AttentionSlot(parent, attribute, f"{names[id(parent)]}.{attribute}", axis)
        for pattern, axis in model.attention_cores.items()  # type: ignore[operator, union-attr]
        for parent, attribute, _ in slots(model, [pattern])
    ]
    return build_step_cache(cfg, together=OnMesh(model, mesh), slots=found, on_decision=on_decision)


def check_cache(cfg: CacheConfig, kind: str, denoising: Denoising, blocks: int) -> None:
    """That a model has what a cache reuses.

    Args:
        kind: of the model, for the message.
        blocks: of the model, over all block lists.

    Raises:
        ValueError: it has not: the key, and what would work.
    """
    what, least = needs(cfg)
    lacks = {
        "blocks": "runs its blocks by a loop of its own",
        "modulated": "does not state the modulated input of its first block",
    }
    if what and what not in denoising.reusable:
        others = ["first_block"] if "blocks" in denoising.reusable else []
        raise ValueError(
            f"cache.kind={cfg.kind}: model.kind={kind} {lacks[what]}; use {' or '.join([*others, 'pyramid_attention'])}"
        )
    if blocks < least:
        raise ValueError(
            f"cache.kind={cfg.kind}: runs {least - 1} blocks in every step, and model.kind={kind} has {blocks}; the "
            "blocks that always run must leave one to reuse"
        )
