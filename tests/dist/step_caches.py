"""One job of sampling with a step cache, on any layout; for tests of what processes decide."""

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from acceleration.config import MeshConfig, ParallelConfig
from acceleration.distributed import mesh as meshes
from acceleration.distributed.mesh import FSDP, Mesh
from acceleration.distributed.tasks import DistributedRunner
from acceleration.parallelize import parallelize
from acceleration.protocol import block_names
from acceleration.sequence import SequenceParallel
from opensora.assembly.components import Components
from opensora.assembly.step_caches import step_cache
from opensora.assembly.token_layout import token_layout
from opensora.inference.pipeline import build_api
from opensora.models.base import Autoencoder, ModelConfig
from opensora.models.families import build_model
from opensora.sampling.caches import (
    CacheConfig,
    DBCache,
    Decision,
    FirstBlockCache,
    MagCache,
    NoCache,
    PyramidAttentionBroadcast,
    TeaCache,
)
from opensora.sampling.denoisers import I2VDenoiser
from opensora.sampling.options import SamplingOption
from opensora.schedulers.rectified_flow import RectifiedFlowConfig
from opensora.schedulers.timesteps import get_schedule
from opensora.utils.rng import torch_generator
from opensora.utils.tokens import image_ids
from tests.dist.factored import MODEL as FACTORED
from tests.dist.factored import Latents
from tests.dist.layouts import FP64
from tests.dist.parity import fill
from tests.dist.problem import MODEL, FakeText, PassThrough
from tests.factored_family import GaussianFlowConfig

CPU = torch.device("cpu")
STEPS = 14  # guidance is off in steps 11 and 13: then one pass is evaluated, by processes of another one too
OPTION = SamplingOption(num_steps=STEPS, num_frames=5, guidance=4.0, text_osci=True, fps=8.0)
CLIP, FACTORED_CLIP = replace(OPTION, resolution="5px", aspect_ratio="2.39:1"), replace(OPTION, width=14, height=2)
# Thresholds at which these small models reuse some steps and not others.
CACHES: dict[str, CacheConfig] = {
    "none": NoCache(),
    "first_block": FirstBlockCache(threshold=1.0),
    "dbcache": DBCache(threshold=1.3, first_blocks=1, last_blocks=1, warmup_steps=2, max_in_a_row=2),
    "teacache": TeaCache(threshold=1.5, coefficients=(1.0, 0.0)),
    "magcache": MagCache(threshold=0.2, ratios=(1.0, 0.9, 1.05, 1.1, 0.95), max_in_a_row=2),
    "pyramid_attention": PyramidAttentionBroadcast(spatial=2, temporal=3, cross=2, time_range=(100.0, 900.0)),
}
FACTORED_CACHES = {
    "first_block": FirstBlockCache(threshold=0.3),
    "dbcache": DBCache(threshold=0.3, first_blocks=1, last_blocks=1, warmup_steps=2, max_in_a_row=2),
    "magcache": CACHES["magcache"],
    "pyramid_attention": CACHES["pyramid_attention"],
}
Choices = list[tuple[int, int, str, bool]]  # (pass, step, part, computed), in order


@dataclass(frozen=True)
class Clips:
    """What one data-parallel group samples."""

    prompts: tuple[str, ...]
    negatives: tuple[str, ...]
    seeds: tuple[int, ...]


# Two clips and one: the groups of a layout work on other ones, and decide otherwise.
GROUPS = (Clips(("a fox runs", "two"), ("blur", ""), (3, 11)), Clips(("red",), ("",), (5,)))


@dataclass(frozen=True)
class Layout:
    """A mesh and a stage of ZeRO."""

    degrees: tuple[tuple[str, int], ...] = ()
    zero: int = 3
    prefetch: int = 0


def option(cache: str, model: ModelConfig) -> SamplingOption:
    if model == MODEL:
        return replace(CLIP, cache=CACHES[cache])
    return replace(FACTORED_CLIP, cache=FACTORED_CACHES[cache])


def sampled(
    layout: Layout,
    names: tuple[str, ...],
    model: ModelConfig = MODEL,
    groups: tuple[int, ...] = (),
    seen: list[Mesh] | None = None,
) -> dict[str, dict[int, tuple[Tensor, Choices]]]:
    """Runs in every process of a group: {cache: {clips: (latents, this process's decisions)}}.

    Args:
        groups: clips that every process works on, one after the other; none: those of its data-parallel group.
        seen: is given the mesh, which has counted bytes.
    """
    zero: Any = layout.zero
    parallel = ParallelConfig(
        zero=zero, mesh=MeshConfig(**dict(layout.degrees)), precision=FP64, prefetch=layout.prefetch
    )
    mesh = meshes.build(parallel.mesh, dist.get_world_size(), CPU)
    with torch.device("meta"):
        built = build_model(model)
    if seen is not None:
        seen.append(mesh)
    joint = model == MODEL
    codec: Autoencoder = PassThrough() if joint else Latents()
    parts = Components(
        model=parallelize(built, parallel, mesh, CPU, fill).requires_grad_(False),
        cfg=model,
        autoencoder=codec,
        text_encoder=FakeText(),
        objective=RectifiedFlowConfig() if joint else GaussianFlowConfig(),
        layout=token_layout(model, SequenceParallel(mesh)),
        mesh=mesh,
        device=CPU,
        prompt_suffix=False,
    )
    found: dict[str, dict[int, tuple[Tensor, Choices]]] = {}
    log: list[Decision] = []
    api = build_api(parts, log.append)
    for name in names:
        for group in groups or (mesh.data_rank,):
            clips = GROUPS[group]
            log.clear()
            latents = api(option(name, model), seed=clips.seeds, text=clips.prompts, neg=clips.negatives)
            found.setdefault(name, {})[group] = (latents, [(d.at.number, d.at.step, d.part, d.computed) for d in log])
    return found


THREE_PASSES: dict[str, Any] = {"guidance": 4.0, "guidance_img": 3.0}
THREE_PASSES |= dict.fromkeys(("text_osci", "image_osci", "scale_temporal_osci"), True)


def with_references(layout: Layout, names: tuple[str, ...]) -> dict[str, tuple[Tensor, Choices]]:
    """Three passes of guidance, as for known frames: {cache: (tokens, this process's decisions)}."""
    zero: Any = layout.zero
    parallel = ParallelConfig(zero=zero, mesh=MeshConfig(**dict(layout.degrees)), precision=FP64)
    mesh = meshes.build(parallel.mesh, dist.get_world_size(), CPU)
    with torch.device("meta"):
        built = build_model(MODEL)
    model = parallelize(built, parallel, mesh, CPU, fill).requires_grad_(False)
    sequence, grid, tokens = SequenceParallel(mesh), (3, 1, 5), 15

    def draw(channels: int, key: str) -> Tensor:
        return sequence.shard(torch.randn(2, tokens, channels, generator=torch_generator(key), dtype=torch.float64))

    features = FakeText().encode(["a fox runs", "two", *["blur", ""] * 2])
    txt = sequence.shard(features.txt, extra_to_last=True)
    found: dict[str, tuple[Tensor, Choices]] = {}
    for name in names:
        log: list[Decision] = []
        cache = step_cache(CACHES[name], model, mesh, log.append)
        with cache.during(model):
            local = I2VDenoiser().denoise(
                model,
                draw(8, "noise"),
                get_schedule(STEPS, 5, 3),
                **THREE_PASSES,
                img_ids=sequence.shard(image_ids(grid, 1).expand(6, -1, -1)),
                txt=txt,
                txt_ids=torch.zeros(*txt.shape[:2], 3),
                y_vec=features.y_vec,
                context=sequence.context(features.txt.shape[1], tokens),
                cond=draw(MODEL.cond_channels, "references"),
                latent_frames=3,
                run=DistributedRunner(mesh["cfg"]),
                watch=cache.watch,
            )
        choices = [(d.at.number, d.at.step, d.part, d.computed) for d in log]
        found[name] = (sequence.gather(local, tokens), choices)
    return found


def gathered() -> tuple[int, int, int, list[bool]]:
    """Of a first-block cache with two data-parallel groups: (bytes sent to gather weights, those of the first block and
    of what is outside of all blocks, those of the other blocks, this process's decisions)."""
    seen: list[Mesh] = []
    found = sampled(Layout((("shard", 2),)), ("first_block",), seen=seen)
    ((_, choices),) = found["first_block"].values()
    with torch.device("meta"):
        model = build_model(MODEL)
    blocks = block_names(model)
    sizes: Counter[bool] = Counter()
    for name, parameter in model.named_parameters():
        rows = -(-parameter.shape[0] // 2)  # of each of two processes
        is_middle = any(name.startswith(f"{block}.") for block in blocks[1:])
        sizes[is_middle] += 8 * rows * parameter[0].numel()
    votes = 8 * len(choices)
    return seen[0][FSDP].bytes_sent - votes, sizes[False], sizes[True], [by for *_, by in choices]


__all__ = [
    "CACHES",
    "FACTORED",
    "FACTORED_CACHES",
    "MODEL",
    "STEPS",
    "Choices",
    "Layout",
    "gathered",
    "sampled",
    "with_references",
]
