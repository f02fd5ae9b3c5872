"""The formulas of traffic: their bounds, and the structure they read."""

from dataclasses import replace
from functools import lru_cache, partial
from math import prod

import pytest
import torch

from acceleration.accounting.activation_memory import spread
from acceleration.accounting.comm_volume import forward_bytes, step_bytes
from acceleration.accounting.model_profile import Count, ModelProfile
from acceleration.accounting.profiling import profile_of
from acceleration.accounting.rank_layout import MicroBatch, RankLayout
from acceleration.config import LoraConfig, MeshConfig, ParallelConfig, PrecisionConfig, RecomputeConfig
from acceleration.distributed import mesh as meshes
from acceleration.sequence import SequenceParallel
from acceleration.sharding import tensor_parallel
from opensora.models.families import build_model, count_parameters
from opensora.models.mmdit import FAMILY, SIZES, MMDiTConfig
from opensora.planner import meta_model
from opensora.planner.meta_model import denoiser_inputs, run_denoiser

FP32 = ParallelConfig(zero=0, precision=PrecisionConfig(compute="fp32"))


@lru_cache
def structure(cfg: MMDiTConfig) -> ModelProfile:
    with torch.device("meta"):
        return profile_of(build_model(cfg), run_denoiser)


@pytest.mark.parametrize("size", ["debug", "demo", "11b"])
def test_structure_holds_every_parameter_slot_and_cut_layer(size: str) -> None:
    cfg = SIZES[size]
    found = structure(cfg)
    assert found.count == count_parameters(cfg)
    assert len(found.blocks) == cfg.depth + cfg.depth_single_blocks
    slots = [slot for unit in found.blocks for slot in unit.attentions]
    heads = {(slot.axis, slot.heads, slot.head_dim, slot.batch, slot.queries, slot.keys) for slot in slots}
    once, both = Count.of({(): 1}), Count.of({"txt": 1, "img": 1})
    assert heads == {("joint", cfg.num_heads, cfg.head_dim, once, both, both)}
    assert {layer.rows for layer in found.blocks[0].layers} == {Count.of({"txt": 1}), Count.of({"img": 1}), once}
    assert found.cuts_text and not found.is_factored
    assert all(layer.reruns for unit in found.blocks for layer in unit.layers)  # a gated residual comes last
    embedders = [layer for layer in found.rest.layers if layer.kind == "column"]
    assert embedders and not any(layer.input_trains for layer in embedders)


ADAPTERS = LoraConfig(rank=4, targets=FAMILY.lora_targets)
IN_FEW = LoraConfig(rank=4, targets=("double_blocks.1.*_attn.qkv", "single_blocks.3.linear1"))


@pytest.mark.parametrize("adapters", [None, ADAPTERS, IN_FEW], ids=["all weights", "adapters", "adapters in some"])
def test_a_few_blocks_tell_of_all(adapters: LoraConfig | None) -> None:
    """The planner runs the first blocks of a list and the last: each of the others is like them but for its names."""
    cfg = replace(SIZES["debug"], depth=5, depth_single_blocks=6)
    assert meta_model.structure(cfg, True, adapters) == profile_of(
        meta_model.meta_model(cfg, adapters), partial(run_denoiser, known=True)
    )


@pytest.mark.parametrize("adapters", [None, ADAPTERS], ids=["all weights", "adapters"])
def test_what_tensor_parallelism_cuts(adapters: LoraConfig | None) -> None:
    """Shapes on one of two processes, and what has a part of its gradient on each, are those of a model that is cut."""
    cfg = SIZES["debug"]
    known = {p.name: p for p in meta_model.structure(cfg, False, adapters).parameters}
    model = meta_model.meta_model(cfg, adapters)
    tensor_parallel.apply(model, meshes.view({"tensor": 2})["tensor"])
    cut = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert cut == {name: p.cut(2) for name, p in known.items()}
    assert getattr(model, tensor_parallel.SHARED) == {name for name, p in known.items() if p.is_shared}


def sent(axis: str, degree: int, rank: int, batch: MicroBatch, cfg: MMDiTConfig) -> float:
    """Values per layer and sample that one process sends in forward."""
    place = RankLayout(meshes.view({axis: degree}, rank), FP32)
    layers = cfg.depth + cfg.depth_single_blocks
    return forward_bytes(structure(cfg), place, batch).get(axis, 0) / 4 / layers / batch.samples


@pytest.mark.parametrize(("txt", "img"), [(512, 8316), (5, 30), (0, 7), (3, 1)])
@pytest.mark.parametrize("degree", [2, 3, 4, 8, 24])
def test_bounds_of_sequence_parallelism(degree: int, txt: int, img: int) -> None:
    """Ulysses: 4 N D / p. Ring: 2 N D (p-1)/p, both but for the tokens by which uneven parts differ."""
    cfg = MMDiTConfig(
        in_channels=8, vec_in_dim=8, context_in_dim=8, hidden_size=24 * 6, num_heads=24, axes_dim=(2, 2, 2), depth=1,
        depth_single_blocks=1,
    )  # fmt: skip
    batch, tokens = MicroBatch(samples=3, txt=txt, img=img), txt + img
    everywhere = [sent("ulysses", degree, rank, batch, cfg) for rank in range(degree)]
    sequences = [SequenceParallel(meshes.view({"ulysses": degree}, rank)) for rank in range(degree)]
    local = [seq.sizes(txt, extra_to_last=True)[seq.rank] + seq.sizes(img)[seq.rank] for seq in sequences]
    for values, held in zip(everywhere, local, strict=True):
        surplus = max(0.0, held - tokens / degree)  # tokens above an even share
        assert values <= (4 * tokens / degree + 3 * surplus) * cfg.hidden_size
    assert sum(everywhere) <= 4 * tokens * cfg.hidden_size
    ring = [sent("ring", degree, rank, batch, cfg) for rank in range(degree)]
    assert sum(ring) == pytest.approx(2 * tokens * cfg.hidden_size * (degree - 1))
    assert all(values <= 2 * cfg.hidden_size * (tokens * (degree - 1) / degree + 1) for values in ring)


LAYOUTS = [
    ({"ulysses": 3}, "none"),
    ({"ring": 4, "ulysses": 2, "tensor": 2}, "full"),
    ({"ring": 5, "ulysses": 4}, "first"),
    ({"tensor": 4}, "full"),
]


@pytest.mark.parametrize(("degrees", "kind"), LAYOUTS)
@pytest.mark.parametrize("has_mask", [False, True])
def test_layouts_of_any_size_count_on_the_meta_device_what_is_predicted(
    degrees: dict[str, int], kind: str, has_mask: bool
) -> None:
    """What tests/dist/test_accounting.py shows with processes, for as many as one likes."""
    cfg = SIZES["debug"]
    recompute = RecomputeConfig(kind=kind, blocks=1 if kind == "first" else 0)  # type: ignore[arg-type]
    parallel = ParallelConfig(zero=3, mesh=MeshConfig(shard=1, **degrees), recompute=recompute)
    batch = MicroBatch(samples=3, txt=13, img=37, has_mask=has_mask)
    world = prod(degrees.values())
    for rank in (0, world // 2, world - 1):
        mesh = meshes.view(degrees, rank)
        with torch.device("meta"):
            model = build_model(cfg)
        spread(model, parallel, mesh, "cpu")
        model(**denoiser_inputs(cfg, batch, SequenceParallel(mesh))).sum().backward()
        place = RankLayout(meshes.view(degrees, rank), parallel)
        predicted = step_bytes(structure(cfg), place, [batch])
        once = step_bytes(structure(cfg), place, [])  # what does not depend on micro-batches
        for axis in degrees:
            assert mesh[axis].bytes_sent == predicted[axis] - once.get(axis, 0), axis
