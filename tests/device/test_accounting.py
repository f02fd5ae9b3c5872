"""Bytes on the simulated device against their forecasts: packs, encoders beside training, forwards, validation, caches.

Every byte of a tensor is counted, and where the forecast is exact it may be off by five percent either way. Where it is
a bound, it says so here.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from acceleration.accounting import peak_memory
from acceleration.accounting.rank_layout import MicroBatch, RankLayout
from acceleration.config import MeshConfig, ParallelConfig
from acceleration.distributed import mesh as meshes
from opensora.inference.memory import reuse_of
from opensora.models.text import build_text_encoder
from opensora.planner import search
from opensora.planner.devices import DEVICES
from opensora.planner.forecast import Forecaster
from opensora.planner.layout_forecast import Forecast
from opensora.planner.meta_model import structure
from opensora.planner.sampling_forecast import SamplingJob, forward_line, reused_bytes
from opensora.planner.search import Planner
from opensora.sampling.caches import (
    CacheConfig,
    DBCache,
    FirstBlockCache,
    MagCache,
    NoCache,
    PyramidAttentionBroadcast,
    TeaCache,
)
from tests.device import problem
from tests.device.accounting import CLIP, Forward, a_round, a_step, forwards, trained, with_caches
from tests.device.lora import LORA, Case
from tests.device.offload import MODEL
from tests.device.test_lora_offload import forecast
from tests.dist.harness import run_distributed
from tests.dist.layouts import FP64
from tests.dist.problem import TEXT_TOKENS
from tests.published_autoencoders import write_small

slow = pytest.mark.slow
LIMIT = pytest.mark.timeout(900)


def close(measured: int, forecast: int) -> bool:
    print(f"{measured} of {forecast} forecast: {measured / forecast:.4f}")
    return 0.95 * forecast < measured <= 1.05 * forecast


LONG = MicroBatch(samples=2, txt=4, img=150)
FORWARDS = [
    (2, Forward()),
    pytest.param(1, Forward(), marks=slow),
    pytest.param(2, Forward(zero=2), marks=slow),
    pytest.param(2, Forward(zero=1, batch=LONG), marks=slow),
    pytest.param(2, Forward(batch=LONG, mesh=(("ulysses", 2),)), marks=slow),
    pytest.param(2, Forward(batch=LONG, mesh=(("tensor", 2),)), marks=slow),
    pytest.param(3, Forward(batch=LONG), marks=slow),
]


@LIMIT
@pytest.mark.parametrize(("world", "case"), FORWARDS, ids=str)
def test_a_forward_takes_what_is_forecast(world: int, case: Forward) -> None:
    """With the buffer that a block was gathered in, which stays until the next one is copied out of its own."""
    degrees, profile = meshes.resolve(case.parallel.mesh, world), structure(case.model)
    for rank, (most, left) in enumerate(run_distributed(forwards, world, case, timeout=800)):
        place = RankLayout(meshes.view(degrees, rank), case.parallel)
        line = forward_line(case.model, case.batch, place, "cuda")
        assert close(most, peak_memory.forward_peak(profile, place, line).total)
        assert left == peak_memory.gathered_behind(profile, place)


WHOLE = Case(adapters=replace(LORA, rank=0), samples=1, packed=3, txt=12, img=150, batches=1)
PACKS = [
    (1, WHOLE),
    pytest.param(1, replace(WHOLE, adapters=LORA, recompute="full"), marks=slow),
    pytest.param(2, replace(WHOLE, batches=2, mesh=(("ulysses", 2),)), marks=slow),
    pytest.param(2, replace(WHOLE, zero=2, recompute="selective", img=151, txt=13), marks=slow),
    pytest.param(2, replace(WHOLE, zero=1, batches=2, samples=2, mesh=(("tensor", 2),)), marks=slow),
]


@LIMIT
@pytest.mark.parametrize(("world", "case"), PACKS, ids=str)
def test_packs_take_what_is_forecast(world: int, case: Case) -> None:
    assert close(max(run_distributed(trained, world, case, timeout=800)), forecast(case, world))


# A run with small encoders that have weights; few enough tokens that encoding decides, and enough that a step does.
BIG = {"model.hidden_size": 256, "model.num_heads": 8, "model.axes_dim": [8, 12, 12]}
RUN: dict[str, Any] = {"model.in_channels": 4, "text.depth": 1, "train.vae_parallel": "off"}
FULL = {"parallel.recompute.kind": "full"}
ENCODED = {
    "encoding": (RUN | FULL, (2, 9, 64, 64), 1),
    "step": (RUN | BIG | {"parallel.precision.compute": "bf16"}, (2, 5, 16, 16), 2),
    "step of zero 1": (RUN | BIG | {"parallel.zero": 1}, (2, 5, 16, 16), 2),
    "encoding of the second": (RUN | FULL | {"parallel.zero": 1}, (2, 9, 64, 64), 2),
}


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small("hunyuan", tmp_path_factory.mktemp("autoencoder") / "hunyuan.safetensors")


def with_encoders(changes: dict[str, Any], autoencoder: Path, shape: tuple[int, ...], batches: int) -> dict[str, Any]:
    samples, frames, height, width = shape
    assert height == width  # a bucket by its resolution
    return changes | {
        "vae": f"{{kind: hunyuan, path: {autoencoder}}}",
        "data.buckets": f"{{{height}px: {{{frames}: [1.0, {samples}]}}}}",
        "data.micro_batches": batches,
    }


def weights_of(changes: dict[str, Any], autoencoder: Path) -> int:
    """Bytes of the encoders; those that the planner knows are the published ones."""
    encoder: Any = build_text_encoder(problem.config(changes).text, "cpu", torch.float32)
    held = [x for x in vars(encoder).values() if isinstance(x, torch.Tensor)]
    modules = [x for x in vars(encoder).values() if isinstance(x, torch.nn.Module)]
    held += [x for module in modules for x in (*module.parameters(), *module.buffers())]
    itemsize = 2 if changes.get("parallel.precision.compute") == "bf16" else 4
    return sum(x.nbytes for x in held) + itemsize * sum(x.numel() for x in load_file(autoencoder).values())


def planned(changes: dict[str, Any], autoencoder: Path, world: int, clips: SamplingJob | None = None) -> Forecast:
    cfg, frozen = problem.config(changes), weights_of(changes, autoencoder)
    with mock.patch.object(search, "frozen_bytes", lambda cfg, world: frozen):
        planner = Planner(cfg, world, DEVICES["rtx4090"], device_type="cuda", exact=True, clips=clips)
    return planner.one(cfg.parallel, planner.shapes[-1])


@LIMIT
@pytest.mark.parametrize("name", [name if name == "encoding" else pytest.param(name, marks=slow) for name in ENCODED])
def test_encoders_beside_training(name: str, autoencoder: Path) -> None:
    """The whole step: pixels, prompts, latents, noise, the model, the update."""
    changes, shape, batches = ENCODED[name]
    changes = with_encoders(changes, autoencoder, shape, batches)
    (most,) = run_distributed(a_step, 1, changes, [shape] * batches, timeout=800)
    found = planned(changes, autoencoder, 1)
    assert (found.encoding > found.memory.total) == name.startswith("encoding")
    assert close(most, found.peak)


@slow
@LIMIT
def test_packs_of_unequal_samples() -> None:
    """A bound: a forecast is of full packs of equal samples, and no pack has more tokens."""
    shapes = [(2, 5, 16, 24), (1, 1, 32, 16), (3, 5, 16, 16)]
    changes = BIG | {"data.tokens_per_sequence": 64, "data.micro_batches": 2, "data.balance_group": 2}
    (most,) = run_distributed(a_step, 1, changes, shapes, timeout=800)
    cfg = problem.config(changes)
    place, count = RankLayout(meshes.view({}), cfg.parallel), sum(samples for samples, *_ in shapes)
    batch = MicroBatch(samples=1, txt=6 * count, img=64, packed=count)
    forecaster = Forecaster(cfg.model, cfg.optim, device_type="cuda")
    limit = forecaster.memory(place, batch).total
    print(most, limit)
    assert 0.8 * limit < most <= 1.05 * limit


ROUNDS = {
    "zero 3": (RUN | BIG | {"parallel.precision.compute": "bf16"}, 1),
    "zero 2": (RUN | BIG | {"parallel.zero": 2}, 1),
    "two processes": (RUN | BIG, 2),
}


@slow
@LIMIT
@pytest.mark.parametrize("name", ROUNDS)
def test_a_round_of_validation(name: str, autoencoder: Path) -> None:
    """The loss is exact; for clips the forecast is a bound, as it counts latents as often as they may be held."""
    changes, world = ROUNDS[name]
    shape = (2, 5, 32, 32)
    changes = with_encoders(changes, autoencoder, shape, world)
    changes |= {"validate.every": 1, "validate.table": "none.csv", "validate.samples": 2, "validate.prompts": "[a, b]"}
    found = run_distributed(a_round, world, changes, [shape] * world, timeout=800)
    cfg = problem.config(changes)
    clips = SamplingJob(
        model=cfg.model,
        vae=cfg.vae,
        text=cfg.text,
        parallel=cfg.parallel,
        offload="none",
        samples=2,
        frames=5,
        height=16,
        width=24,
        passes_of_steps=(2, 2),
        clips=2,
    )
    validation = planned(changes, autoencoder, world, clips).validation
    assert validation is not None
    assert close(max(held_out for held_out, _ in found), validation.held_out)
    most = max(clips for _, clips in found)
    print(most, validation.clips)
    assert 0.8 * validation.clips < most <= 1.05 * validation.clips


TOKENS = CLIP["width"] * CLIP["height"] * CLIP["num_frames"]
CACHES: list[CacheConfig] = [
    FirstBlockCache(threshold=0.0),
    DBCache(threshold=0.0, first_blocks=2, last_blocks=1, warmup_steps=0),
    TeaCache(threshold=0.0),
    MagCache(ratios=(2.0,), threshold=0.0),
    PyramidAttentionBroadcast(spatial=2, time_range=(0.0, 1000.0)),
]


@LIMIT
@pytest.mark.parametrize("caches", [CACHES[::4], pytest.param(CACHES[1:4], marks=slow)], ids=["two kinds", "others"])
def test_what_step_caches_keep(caches: list[CacheConfig]) -> None:
    """What a cache adds to what is there without one. Of a cache of first and last blocks it is a bound: where most is
    held, one of the two copies of the tokens that are carried while blocks run is gone."""
    ((plain, *most),) = run_distributed(with_caches, 1, [NoCache(), *caches], timeout=800)
    place = RankLayout(meshes.view({}), ParallelConfig(zero=3, mesh=MeshConfig(), precision=FP64))
    batch = MicroBatch(samples=2, txt=TEXT_TOKENS, img=TOKENS, has_mask=True)
    for cache, bytes_then in zip(caches, most, strict=True):
        kept = reused_bytes(reuse_of(cache), 2, MODEL, batch, structure(MODEL), place)
        print(f"{cache.kind}: {bytes_then - plain} of {kept} forecast, beside {plain}")
        assert (0.8 if cache.kind == "dbcache" else 0.95) * kept <= bytes_then - plain <= 1.05 * kept
    assert reused_bytes(reuse_of(NoCache()), 2, MODEL, batch, structure(MODEL), place) == 0
