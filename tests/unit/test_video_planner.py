"""What the planner knows of Wan and HunyuanVideo: sizes that they depend on, cuts, bytes of any layout, memory."""

from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

import pytest
import torch

from acceleration.accounting.activation_memory import spread
from acceleration.accounting.comm_volume import step_bytes
from acceleration.accounting.model_profile import Count
from acceleration.accounting.profiling import profile_of
from acceleration.accounting.rank_layout import MicroBatch, RankLayout
from acceleration.config import LoraConfig, MeshConfig, OptimConfig, ParallelConfig, RecomputeConfig
from acceleration.distributed import mesh as meshes
from acceleration.sequence import SequenceParallel
from acceleration.sharding import tensor_parallel
from opensora.config.load import load_config
from opensora.config.run import RunConfig
from opensora.models import hunyuan_video, wan
from opensora.models.families import build_model, count_parameters, family_of
from opensora.planner.forecast import Forecaster, micro_batch_of_clip
from opensora.planner.meta_model import denoiser_inputs, meta_model, more_sizes, run_denoiser, structure
from tests.conftest import ROOT

_WAN = {"in_channels": 4, "hidden_size": 96, "num_heads": 12, "depth": 5, "ffn_dim": 144, "text_dim": 12}
MODELS: dict[str, Any] = {
    "wan": wan.WanConfig(**_WAN),  # type: ignore[arg-type]
    "wan with a picture": wan.WanConfig(**_WAN, references="clip", image_dim=16),  # type: ignore[arg-type]
    "wan with known tokens": wan.WanConfig(**_WAN, references="in_place"),  # type: ignore[arg-type]
    "hunyuan_video": replace(
        hunyuan_video.SIZES["debug"], num_heads=12, hidden_size=96, axes_dim=(4, 2, 2), depth=5, depth_single_blocks=6
    ),
}
PICTURE = 9
ONCE, TEXT = Count.of({(): 1}), Count.of({"txt": 1})


def given(name: str, **sizes: Any) -> MicroBatch:
    return MicroBatch(picture=PICTURE * ("picture" in name), **sizes)


def is_known(name: str) -> bool:
    return "known" in name


def test_sizes_that_work_depends_on() -> None:
    """Text that is read by cross-attention is whole; of text in the sequence the refiner knows all, blocks a part."""
    own = structure(MODELS["wan with a picture"])
    slots = [(slot.axis, slot.queries, slot.keys) for slot in own.blocks[0].attentions]
    image, picture = Count.of({"img": 1}), Count.of({"picture": 1})
    assert slots == [("joint", image, image), ("cross", image, TEXT), ("cross", image, picture)]
    assert [norm.rows for norm in own.blocks[0].norms] == [image, image, image, TEXT, picture]
    assert not own.cuts_text and all(norm.input_trains and norm.reruns for norm in own.blocks[0].norms)
    joint = structure(MODELS["hunyuan_video"])
    both = Count.of({"txt_here": 1, "img": 1})
    assert [(slot.axis, slot.queries, slot.keys) for slot in joint.blocks[0].attentions] == [("joint", both, both)]
    assert [(slot.axis, slot.queries) for slot in joint.rest.attentions] == [("cross", TEXT)] * 2
    assert joint.cuts_text and joint.cuts_text_itself and not any(unit.norms for unit in joint.units)


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_and_a_few_blocks_tell_of_all(name: str) -> None:
    cfg = MODELS[name]
    found = structure(cfg, is_known(name))
    assert found.count == count_parameters(cfg)
    forward = partial(run_denoiser, known=is_known(name))
    assert found == profile_of(meta_model(cfg), forward, more_sizes(cfg))


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_what_tensor_parallelism_cuts(name: str, adapters: bool) -> None:
    cfg = MODELS[name]
    lora = LoraConfig(rank=4, targets=family_of(cfg).lora_targets) if adapters else None
    known = {p.name: p for p in structure(cfg, False, lora).parameters}
    model = meta_model(cfg, lora)
    tensor_parallel.apply(model, meshes.view({"tensor": 2})["tensor"])
    assert {n: tuple(p.shape) for n, p in model.named_parameters()} == {n: p.cut(2) for n, p in known.items()}
    assert getattr(model, tensor_parallel.SHARED) == {n for n, p in known.items() if p.is_shared}


LAYOUTS = [
    ({"ulysses": 8}, "none"),  # twelve heads
    ({"ring": 3, "ulysses": 5}, "full"),
    ({"ring": 2, "ulysses": 2, "tensor": 2}, "full"),
    ({"tensor": 4}, "selective"),
]


@pytest.mark.parametrize(("degrees", "kind"), LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_layouts_of_any_size_count_on_the_meta_device_what_is_predicted(
    name: str, degrees: dict[str, int], kind: str
) -> None:
    cfg, batch = MODELS[name], given(name, samples=3, txt=13, img=37, has_mask=True)
    parallel = ParallelConfig(zero=3, mesh=MeshConfig(shard=1, **degrees), recompute=RecomputeConfig(kind=kind))  # type: ignore[arg-type]
    profile = structure(cfg, is_known(name))
    for rank in {0, prod(degrees.values()) // 2, prod(degrees.values()) - 1}:
        mesh = meshes.view(degrees, rank)
        with torch.device("meta"):
            model = build_model(cfg)
        spread(model, parallel, mesh, "cpu")
        inputs = denoiser_inputs(cfg, batch, SequenceParallel(mesh), known=is_known(name))
        model(**inputs).sum().backward()
        place = RankLayout(meshes.view(degrees, rank), parallel)
        predicted, once = step_bytes(profile, place, [batch]), step_bytes(profile, place, [])
        for axis in degrees:
            assert mesh[axis].bytes_sent == predicted[axis] - once.get(axis, 0) > 0, axis


@pytest.mark.parametrize("name", ["wan with a picture", "hunyuan_video"])
def test_interpolation_is_close_to_running_the_shape(name: str) -> None:
    forecaster = Forecaster(MODELS[name], OptimConfig(), device_type="cuda")
    uneven = {"ulysses": 8}  # of twelve heads
    for kind, mesh in (("none", {"ulysses": 4}), ("full", {"ring": 2, "tensor": 2}), ("none", uneven)):
        cfg = ParallelConfig(zero=3, mesh=MeshConfig(**mesh), recompute=RecomputeConfig(kind=kind))  # type: ignore[arg-type]
        place = RankLayout(meshes.view(meshes.resolve(cfg.mesh, 8)), cfg)
        batch = given(name, samples=3, txt=300, img=8320, has_mask=True)
        exact, quick = (forecaster.memory(place, batch, exact=exact).total for exact in (True, False))
        assert quick == pytest.approx(exact, rel=0.03), (kind, mesh)


def test_every_sample_has_a_picture_of_its_own() -> None:
    """Of stills, which are many at a time and have few tokens, pictures are much of what is kept."""
    forecaster = Forecaster(MODELS["wan with a picture"], OptimConfig(), device_type="cuda")
    cfg = ParallelConfig(zero=3, mesh=MeshConfig(ulysses=4), recompute=RecomputeConfig(kind="none"))
    place = RankLayout(meshes.view(meshes.resolve(cfg.mesh, 8)), cfg)
    batch = MicroBatch(samples=16, txt=100, img=320, picture=257)
    exact, quick = (forecaster.memory(place, batch, exact=exact).activations for exact in (True, False))
    assert quick == pytest.approx(exact, rel=0.03)


def test_a_run_reckons_with_the_tokens_of_a_picture() -> None:
    """Where none is read there are none."""
    wan_i2v = ["model={kind: wan, size: i2v_14b}", "vae={kind: wan, path: vae}", "text={kind: umt5, umt5_path: umt5}"]
    common = ["data.table=t.csv", "data.buckets={480p: {81: [1.0, 1]}}", "conditioning.masks={}"]
    seen = ["image_encoder={kind: clip_vision, path: clip}"]
    cfg = load_config(RunConfig, ROOT / "configs" / "train" / "demo.yaml", [*common, *wan_i2v, *seen])
    batch = micro_batch_of_clip(cfg, 81, (480, 832))
    assert (batch.txt, batch.img, batch.picture, batch.has_mask) == (512, 32760, 257, False)
    blind = [wan_i2v[0].replace("i2v_14b", "t2v_14b"), *wan_i2v[1:]]
    cfg = load_config(RunConfig, ROOT / "configs" / "train" / "demo.yaml", [*common, *blind])
    assert micro_batch_of_clip(cfg, 81, (480, 832)).picture == 0
