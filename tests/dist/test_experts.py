"""Two experts in one clip, on any layout, and known frames of a Wan: what a loop on one process makes, to 1e-10."""

from dataclasses import replace
from fractions import Fraction
from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from acceleration.config import MeshConfig, ParallelConfig
from acceleration.distributed import mesh as meshes
from acceleration.parallelize import parallelize
from opensora.assembly.components import LowNoiseExpert
from opensora.inference.pipeline import build_sampler
from opensora.models.families import build_model
from opensora.sampling.cache_config import FirstBlockCache, PyramidAttentionBroadcast
from opensora.sampling.experts import Phase, expert_of, guided_by, phases
from opensora.sampling.guidance import passes_per_step
from opensora.schedulers import build_solver
from opensora.schedulers.base import SolverOptions
from opensora.schedulers.rectified_flow import RectifiedFlowConfig
from opensora.utils.tokens import Grid
from tests.dist.harness import run_distributed
from tests.dist.layouts import FP64
from tests.dist.parity import TOLERANCE, relative
from tests.wan_clips import (
    CLIP,
    GRID,
    IN_PLACE,
    NEGATIVES,
    OPTION,
    PLAIN,
    PROMPTS,
    SEEDS,
    by_hand,
    components,
    fill,
    filled_model,
)

CPU = torch.device("cpu")
MODELS = {"text": PLAIN, "clip": CLIP, "in_place": IN_PLACE}
BOUNDARY = 0.85  # three of five steps are before
GUIDED = replace(OPTION, guidance_low=2.5)
Case = tuple[dict[str, int], Any, tuple[str, ...]]  # degrees, zero, models


def given(name: str) -> list[Tensor | None]:
    """Five frames for one of two clips, where the model takes any."""
    frames = torch.rand(3, 5, 32, 48, generator=torch.Generator().manual_seed(7), dtype=torch.float64) * 2 - 1
    return [None, None if name == "text" else frames[:, :1]]


def sampled(name: str, parts: Any, option: Any = GUIDED) -> Tensor:
    refs = [None if frames is None else [frames] for frames in given(name)]
    kind = "t2v" if name == "text" else "i2v_head"
    made = build_sampler(parts)(option, kind, seed=SEEDS, text=PROMPTS, neg=NEGATIVES, ref=refs)
    return made.latents


def on_these_layouts(cases: list[Case]) -> list[dict[str, Tensor]]:
    """Runs in every process of the group."""
    torch.set_num_threads(1)
    found = []
    for degrees, zero, names in cases:
        parallel = ParallelConfig(zero=zero, mesh=MeshConfig(**degrees), precision=FP64)
        mesh = meshes.build(parallel.mesh, dist.get_world_size(), CPU)
        made = {}
        for name in names:
            experts = {}
            for expert in ("high", "low"):
                with torch.device("meta"):
                    model = build_model(MODELS[name])
                experts[expert] = parallelize(model, parallel, mesh, CPU, fill(expert)).requires_grad_(False)
            low = LowNoiseExpert(model=experts["low"], boundary=BOUNDARY)
            made[name] = sampled(name, components(MODELS[name], experts["high"], mesh, low_noise=low))
        found.append(made)
    return found


def truth(name: str) -> Tensor:
    models = {expert: filled_model(MODELS[name], expert) for expert in ("high", "low")}
    return by_hand(models, GUIDED, given(name), boundary=BOUNDARY, guidance_low=2.5)


LAYOUTS: dict[int, list[Case]] = {
    1: [({}, 0, tuple(MODELS))],
    2: [
        ({"ulysses": 2}, 3, tuple(MODELS)),
        ({"ring": 2}, 0, ("in_place",)),
        ({"cfg": 2}, 3, ("clip",)),
        ({"tensor": 2}, 3, tuple(MODELS)),
    ],
    3: [({"ulysses": 3}, 3, ("text",)), ({"shard": 3}, 3, ("in_place",))],
    4: [
        ({"ring": 2, "ulysses": 2}, 3, ("clip", "in_place")),
        ({"ulysses": 2, "tensor": 2}, 3, ("clip",)),
        ({"cfg": 2, "tensor": 2}, 0, ("in_place",)),
    ],
}


@pytest.mark.parametrize("world", LAYOUTS)
def test_two_experts_make_what_a_loop_makes(world: int) -> None:
    wanted = {name: truth(name) for name in {name for *_, names in LAYOUTS[world] for name in names}}
    for process in run_distributed(on_these_layouts, world, LAYOUTS[world], timeout=110):
        for (degrees, *_), made in zip(LAYOUTS[world], process, strict=True):
            for name, latents in made.items():
                assert relative(latents, wanted[name]) <= TOLERANCE, (degrees, name)


def test_one_expert_alone_makes_something_else() -> None:
    """So that the switch is seen at all: one model for all steps, the boundary elsewhere, one guidance for both."""
    models = {expert: filled_model(PLAIN, expert) for expert in ("high", "low")}
    right = truth("text")
    for other in (
        by_hand(models, GUIDED, given("text"), boundary=0.0),
        by_hand(models, GUIDED, given("text"), boundary=0.6, guidance_low=2.5),
        by_hand(models, GUIDED, given("text"), boundary=BOUNDARY),
    ):
        assert relative(other, right) > 1e-3


@pytest.mark.parametrize("solver", ["unipc", "dpm++"])
def test_a_solver_goes_on_across_the_switch(solver: str) -> None:
    """With what it remembers: two experts of the same weights are one model."""
    option = replace(GUIDED, solver=solver, guidance_low=None)
    model, other = filled_model(PLAIN, "high"), filled_model(PLAIN, "high")
    low = LowNoiseExpert(model=other, boundary=BOUNDARY)
    seen: list[tuple[int, int]] = []
    both = components(PLAIN, model, low_noise=low)
    build_sampler(both)(option, seed=[1], text=["a"], on_step=lambda done, total: seen.append((done, total)))
    assert seen == [(step, 5) for step in range(6)]
    assert torch.equal(sampled("text", both, option), sampled("text", components(PLAIN, model), option))


@pytest.mark.parametrize("cache", [FirstBlockCache(), PyramidAttentionBroadcast()], ids=["first_block", "pyramid"])
def test_a_step_cache_keeps_nothing_of_the_other_expert(cache: Any) -> None:
    """Where each expert makes one step, nothing can be reused."""
    option = replace(OPTION, num_steps=2, cache=cache)
    low = LowNoiseExpert(model=filled_model(PLAIN, "low"), boundary=0.9)
    parts = components(PLAIN, filled_model(PLAIN, "high"), low_noise=low)
    assert torch.equal(sampled("text", parts, option), sampled("text", parts, replace(OPTION, num_steps=2)))


@pytest.mark.parametrize(
    ("solver", "start"), [("euler", 1), ("unipc", Fraction(999, 1000)), ("dpm++", Fraction(999, 1000))]
)
def test_a_step_at_the_boundary_is_of_high_noise(solver: str, start: Fraction) -> None:
    """Where a step is by its formula: 2 x 0.6 / 1.6 is 0.75, and one bit less in floating point."""
    for shift, count in product((1, 2, 3, 5, 7, 12), (1, 2, 3, 5, 10, 40, 50)):
        even = [start * (1 - Fraction(step, count)) for step in range(count)]
        for number, u in enumerate(even):
            boundary = float(shift * u / (1 + (shift - 1) * u))
            made = build_solver(
                solver, RectifiedFlowConfig(flow_shift=shift), SolverOptions(count), Grid(GRID, (1, 2, 2))
            )
            wanted = ["high"] * (number + 1) + ["low"] * (count - number - 1)
            assert [expert_of(time, boundary) for time in made.times[:-1]] == wanted, (shift, count, number)


def test_which_expert_a_step_is_for() -> None:
    assert expert_of(0.875, 0.875) == "high" and expert_of(0.874, 0.875) == "low" and expert_of(0.1, None) == "high"
    assert phases([1.0, 0.9, 0.5, 0.0], 0.875) == [Phase("high", range(2)), Phase("low", range(2, 3))]
    assert phases([0.8, 0.5, 0.0], 0.875) == [Phase("low", range(2))]
    assert phases([1.0, 0.5, 0.0], None) == [Phase("high", range(2))]
    assert guided_by(GUIDED, "high").guidance == 4.0 and guided_by(GUIDED, "low").guidance == 2.5
    assert guided_by(OPTION, "low").guidance == 4.0
    for high, low_, passes in ((1.0, None, 1), (1.0, 1.0, 1), (1.0, 3.0, 2), (3.0, 1.0, 2)):
        assert passes_per_step(replace(OPTION, guidance=high, guidance_low=low_)) == passes
